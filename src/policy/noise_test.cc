#include "policy/noise.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <vector>

namespace servoflow::policy {
namespace {

TEST(Noise, MatchesThePublishedValues) {
  std::array<float, 4> x{};
  fill_noise(0, 0, x);
  EXPECT_EQ(x, (std::array<float, 4>{0.9911377f, -0.9246626f, -0.61760896f, -0.4820686f}));
  fill_noise(7, 3, x);
  EXPECT_EQ(x, (std::array<float, 4>{0.728884f, 0.71782035f, -1.543246f, -1.1179985f}));
}

TEST(Noise, ShorterRequestsArePrefixes) {
  std::vector<float> whole(103), part(50);
  fill_noise(1ull << 40, 9, whole);
  fill_noise(1ull << 40, 9, part);
  for (std::size_t i = 0; i < part.size(); ++i) EXPECT_EQ(whole[i], part[i]);
}

TEST(Noise, IsStandardNormal) {
  std::vector<float> x(200000);
  fill_noise(5, 0, x);
  double sum = 0, squares = 0;
  for (const float v : x) sum += v, squares += static_cast<double>(v) * v;
  EXPECT_NEAR(sum / 200000, 0, 0.01);       // 4.5 standard errors
  EXPECT_NEAR(squares / 200000, 1, 0.015);  // 4.7 standard errors
}

}  // namespace
}  // namespace servoflow::policy
