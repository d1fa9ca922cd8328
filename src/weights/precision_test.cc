#include "weights/precision.h"

#include <gtest/gtest.h>

#include <random>

namespace servoflow::weights {
namespace {

// By blocks of rows and threads, or at once.
TEST(RoundMatrix, GivesTheBitsOfQuantize) {
  const int rows = 300, cols = 16384;  // three blocks
  std::mt19937 random(1);
  std::vector<float> w(static_cast<std::size_t>(rows) * cols);
  for (float& v : w) v = static_cast<float>(random() % 4096) / 2048 - 1;
  w[static_cast<std::size_t>(299) * cols + 7] = 5;  // the largest, in the last block
  const ops::HostMatrix host{DType::kF32, rows, cols, std::as_bytes(std::span(w)), "w"};
  for (const char* name : {"int8-w8a8", "int4-g128-w4a16", "nvfp4-w4a16", "fp8-block", "fp8-tensor/none"}) {
    const quant::LinearFormat format = *quant::parse_format(name);
    const auto want = quant::quantize(w, rows, cols, format);
    const auto got = round_matrix(host, format, 5.0f, 3);
    ASSERT_TRUE(want.ok() && got.ok()) << name;
    EXPECT_TRUE(std::equal(want->codes.begin(), want->codes.end(), got->codes.begin(), got->codes.end()))
        << name;
    EXPECT_TRUE(std::equal(want->scales.begin(), want->scales.end(), got->scales.begin(), got->scales.end()))
        << name;
    EXPECT_EQ(want->zero_points, got->zero_points) << name;
    EXPECT_EQ(want->global_scale, got->global_scale) << name;
    EXPECT_EQ(want->scale_rows, got->scale_rows) << name;
    EXPECT_EQ(got->rows, rows);
  }
  w[static_cast<std::size_t>(150) * cols + 3] = std::numeric_limits<float>::quiet_NaN();
  const auto bad = round_matrix(host, *quant::parse_format("int8-w8a8"), 5.0f, 3);
  ASSERT_FALSE(bad.ok());
  EXPECT_NE(bad.status().message().find("w: element [150, 3] is NaN"), std::string::npos)
      << bad.status().message();
}

TEST(LinearLayers, AreWhatPlansMayName) {
  const std::vector<quant::Linear> layers = linear_layers(pi05_architecture());
  // 27 blocks of 6; 18 layers of 7, twice; 2 · 18 + 1 modulations; the projector; 4 projections.
  EXPECT_EQ(layers.size(), 27u * 6 + 2 * 18 * 7 + 37 + 1 + 4);
  std::int64_t parameters = 0;
  for (const quant::Linear& layer : layers) {
    EXPECT_FALSE(layer.name.ends_with(".weight"));
    parameters += layer.rows * layer.cols;
  }
  EXPECT_GT(parameters, 2'700'000'000);
}

}  // namespace
}  // namespace servoflow::weights
