// fake_quantize_rows: what execution does to inputs.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "quant/matrix.h"
#include "quant/scalars.h"

namespace servoflow::quant {
namespace {

std::vector<float> rows(std::size_t n, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> distribution(0.0f, 1.5f);
  std::vector<float> values(n);
  for (float& v : values) v = distribution(generator);
  return values;
}

InputFormat input(const char* text) { return parse_format(text)->input; }

TEST(Inputs, EveryRowHasItsOwnScaleAndPaddingIsLeftAlone) {
  constexpr std::int64_t kRows = 5, kCols = 37, kPitch = 40;
  for (const char* text :
       {"int8-w8a8", "fp8-w8a8", "nvfp4-w4a4-dynamic", "mxfp8-w8a8", "mxfp4-w4a4", "fp8-block"}) {
    std::vector<float> x = rows(kRows * kPitch, 3);
    for (std::int64_t k = 0; k < kCols; ++k) x[static_cast<std::size_t>(2 * kPitch + k)] *= 1000.0f;
    std::vector<float> y = x;
    fake_quantize_rows(input(text), y.data(), kRows, kCols, kPitch);
    for (std::int64_t r = 0; r < kRows; ++r) {
      std::vector<float> alone(x.begin() + r * kPitch, x.begin() + r * kPitch + kCols);
      fake_quantize_rows(input(text), alone.data(), 1, kCols, kCols);
      for (std::int64_t k = 0; k < kCols; ++k)
        ASSERT_EQ(y[static_cast<std::size_t>(r * kPitch + k)], alone[static_cast<std::size_t>(k)]) << text;
      for (std::int64_t k = kCols; k < kPitch; ++k)
        ASSERT_EQ(y[static_cast<std::size_t>(r * kPitch + k)], x[static_cast<std::size_t>(r * kPitch + k)])
            << text;
    }
  }
}

TEST(Inputs, Int8TokensAreIntegersTimesAmaxBy127) {
  std::vector<float> x = rows(256, 5), y = x;
  fake_quantize_rows(input("int8-w8a8"), y.data(), 1, 256, 256);
  const float amax = max_magnitude(x), scale = amax / 127, inverse = 127 / amax;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const float code = std::nearbyint(x[i] * inverse);  // the default rounding mode: ties to even
    EXPECT_LE(std::fabs(code), 127.0f);
    EXPECT_EQ(y[i], code * scale);
    EXPECT_LE(std::fabs(y[i] - x[i]), 0.5001f * scale);
  }
}

TEST(Inputs, Fp8TokensUseTheWholeRange) {
  std::vector<float> x = rows(256, 6), y = x;
  fake_quantize_rows(input("fp8-w8a8"), y.data(), 1, 256, 256);
  const float amax = max_magnitude(x);
  for (std::size_t i = 0; i < x.size(); ++i)
    EXPECT_EQ(y[i], decode_e4m3(encode_e4m3(x[i] * (448 / amax))) * (amax / 448));
  EXPECT_NEAR(max_magnitude(y), amax, 1e-6f * amax);
}

TEST(Inputs, StaticScalesSaturateAndZeroPointsShift) {
  std::vector<float> x = {-10.0f, -0.26f, 0.0f, 0.26f, 10.0f};
  std::vector<float> y = x;
  fake_quantize_rows(input("int8-w8a8-static"), y.data(), 1, 5, 5, 0.01f);
  EXPECT_FLOAT_EQ(y[0], -1.28f);
  EXPECT_FLOAT_EQ(y[1], -0.26f);
  EXPECT_EQ(y[2], 0.0f);
  EXPECT_FLOAT_EQ(y[4], 1.27f);
  y = x;
  fake_quantize_rows(input("int8-channel/int8-tensor-static-asym"), y.data(), 1, 5, 5, 0.01f, -100);
  EXPECT_FLOAT_EQ(y[0], -0.28f);  // code -128
  EXPECT_FLOAT_EQ(y[4], 2.27f);   // code 127
  EXPECT_EQ(y[2], 0.0f);
  y = x;
  fake_quantize_rows(input("fp8-w8a8-static"), y.data(), 1, 5, 5, 0.01f);
  EXPECT_FLOAT_EQ(y[4], 4.48f);
}

// Trap: |x| > 2688 g saturates: the block scale cannot exceed 448.
TEST(Inputs, Nvfp4SaturatesBeyond2688TimesItsGlobalScale) {
  std::vector<float> x(32, 0.0f);
  x[0] = 2688.0f;
  x[16] = 5000.0f;
  fake_quantize_rows(input("nvfp4-w4a4"), x.data(), 1, 32, 32, 1.0f);
  EXPECT_EQ(x[0], 2688.0f);
  EXPECT_EQ(x[16], 2688.0f);
}

TEST(Inputs, QuantizingTwiceChangesNothing) {
  for (const char* text : {"mxfp8-w8a8", "mxfp4-w4a4", "nvfp4-w4a4"}) {
    std::vector<float> x = rows(300, 8);
    const std::optional<float> scale = input(text).dynamic ? std::nullopt : std::optional<float>(0.005f);
    fake_quantize_rows(input(text), x.data(), 3, 100, 100, scale);
    std::vector<float> y = x;
    fake_quantize_rows(input(text), y.data(), 3, 100, 100, scale);
    EXPECT_EQ(x, y) << text;
  }
}

TEST(Inputs, RowsOfZerosAndTinyRowsStayFinite) {
  for (const char* text : {"int8-w8a8", "fp8-w8a8", "nvfp4-w4a4-dynamic", "mxfp8-w8a8", "mxfp4-w4a4",
                           "fp8-block", "int8-channel/int8-tensor"}) {
    std::vector<float> x(64, 0.0f);
    fake_quantize_rows(input(text), x.data(), 2, 32, 32);
    for (const float v : x) EXPECT_EQ(v, 0.0f) << text;
    for (const float tiny : {1e-38f, 1e-44f, 3e38f}) {
      std::fill(x.begin(), x.end(), 0.0f);
      x[3] = tiny;
      fake_quantize_rows(input(text), x.data(), 2, 32, 32);
      if (tiny < 1) {
        for (const float v : x) EXPECT_TRUE(std::isfinite(v)) << text << " " << tiny;
      }
    }
  }
}

TEST(Inputs, UnquantizedFormatsTouchNothing) {
  std::vector<float> x = rows(64, 9), y = x;
  fake_quantize_rows(input("nvfp4-w4a16"), y.data(), 2, 32, 32);
  EXPECT_EQ(x, y);
}

}  // namespace
}  // namespace servoflow::quant
