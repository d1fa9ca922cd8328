#include "toolkit/statistics.h"

#include <gtest/gtest.h>

#include <cmath>

namespace servoflow::toolkit {
namespace {

TEST(Statistics, AgreesWithNumpy) {
  // numpy.percentile([4, 1, 3, 2, 10], [50, 95, 99]) = 3, 8.8, 9.76; numpy.std(…, ddof=1)
  // = 3.5355339059327378
  const Distribution d = describe({4, 1, 3, 2, 10});
  EXPECT_DOUBLE_EQ(d.min, 1);
  EXPECT_DOUBLE_EQ(d.p50, 3);
  EXPECT_DOUBLE_EQ(d.mean, 4);
  EXPECT_NEAR(d.std, std::sqrt(12.5), 1e-14);
  EXPECT_NEAR(d.p95, 8.8, 1e-14);
  EXPECT_NEAR(d.p99, 9.76, 1e-14);
  EXPECT_EQ(d.samples, (std::vector<double>{4, 1, 3, 2, 10})) << "kept in the order they were taken";
}

TEST(Statistics, OneSampleAndNone) {
  const Distribution one = describe({7});
  EXPECT_EQ(one.p99, 7);
  EXPECT_EQ(one.std, 0);
  EXPECT_EQ(describe({}).mean, 0);
  EXPECT_EQ(distribution_to_json(one).size(), 7u);
}

}  // namespace
}  // namespace servoflow::toolkit
