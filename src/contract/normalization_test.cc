#include "contract/normalization.h"

#include <gtest/gtest.h>

#include <cmath>

namespace servoflow::contract {
namespace {

const Statistics kStats{.mean = {1, 2}, .std = {0.5, 0}, .q01 = {-1, 3}, .q99 = {1, 3}};

TEST(Normalization, OpenpiInDouble) {
  const Normalization quantile{NormKind::kQuantile, NormStyle::kOpenpi, kStats};
  const std::vector<double> x{0.3, 3.5, 42};  // the third has no statistics
  std::vector<double> n(3), back(3);
  normalize(quantile, x, n);
  EXPECT_EQ(n[0], (0.3 + 1) / (2 + 1e-6) * 2 - 1);
  EXPECT_EQ(n[1], 0.5 / 1e-6 * 2 - 1);  // a degenerate range is only widened
  EXPECT_EQ(n[2], 42);
  unnormalize(quantile, std::vector<float>{0.25f, -1.0f, 7.0f}, back);
  EXPECT_EQ(back[0], static_cast<double>(1.25f / 2.0f) * (2 + 1e-6) - 1);
  EXPECT_EQ(back[1], 3);
  EXPECT_EQ(back[2], 7);
  const Normalization zscore{NormKind::kMeanStd, NormStyle::kOpenpi, kStats};
  normalize(zscore, x, n);
  EXPECT_EQ(n[0], (0.3 - 1) / (0.5 + 1e-6));
  unnormalize(zscore, std::vector<float>{0.25f, 1.0f, 7.0f}, back);
  EXPECT_EQ(back[0], 0.25 * (0.5 + 1e-6) + 1);
  EXPECT_EQ(back[1], 1e-6 + 2);
}

TEST(Normalization, LerobotInFloat) {
  const Normalization quantile{NormKind::kQuantile, NormStyle::kLerobot, kStats};
  const std::vector<double> x{0.3, 3.5};
  std::vector<double> n(2), back(2);
  normalize(quantile, x, n);
  EXPECT_EQ(n[0], static_cast<double>(2.0f * (0.3f + 1.0f) / 2.0f - 1.0f));
  EXPECT_EQ(n[1], static_cast<double>(2.0f * 0.5f / 1e-8f - 1.0f));
  unnormalize(quantile, std::vector<float>{0.25f, 1.0f}, back);
  EXPECT_EQ(back[0], static_cast<double>(1.25f * 2.0f / 2.0f - 1.0f));
  const Normalization zscore{NormKind::kMeanStd, NormStyle::kLerobot, kStats};
  normalize(zscore, x, n);
  EXPECT_EQ(n[1], static_cast<double>(1.5f / 1e-8f));
  unnormalize(zscore, std::vector<float>{0.25f, 1.0f}, back);
  EXPECT_EQ(back[0], 1.125);
  EXPECT_EQ(back[1], 2.0);  // no epsilon on the way out
}

TEST(Normalization, IdentityAndWidths) {
  const Normalization none{NormKind::kIdentity, NormStyle::kOpenpi, kStats};
  EXPECT_EQ(statistics_width(none), 0);
  EXPECT_EQ(statistics_width({NormKind::kQuantile, NormStyle::kOpenpi, kStats}), 2);
  std::vector<double> n(1);
  normalize(none, std::vector<double>{5.5}, n);
  EXPECT_EQ(n[0], 5.5);
  // Statistics longer than the vector are cut.
  normalize({NormKind::kQuantile, NormStyle::kOpenpi, kStats}, std::vector<double>{-1}, n);
  EXPECT_EQ(n[0], -1);
}

}  // namespace
}  // namespace servoflow::contract
