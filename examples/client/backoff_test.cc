#include "backoff.h"

#include <gtest/gtest.h>

#include <set>

namespace robot {
namespace {

TEST(Backoff, DoublesUpToTheLongestAndBeginsAnew) {
  Backoff backoff(0.1, 0.5, 1);
  for (int round = 0; round < 2; ++round) {
    for (double pause : {0.1, 0.2, 0.4, 0.5, 0.5, 0.5}) {
      const double waited = backoff.next();
      EXPECT_GE(waited, 0.5 * pause);
      EXPECT_LE(waited, pause);
    }
    backoff.reset();
  }
}

TEST(Backoff, RobotsDoNotComeBackTogether) {
  std::set<double> pauses;
  for (std::uint64_t seed = 0; seed < 64; ++seed) pauses.insert(Backoff(0.1, 5, seed).next());
  EXPECT_EQ(pauses.size(), 64u);
}

}  // namespace
}  // namespace robot
