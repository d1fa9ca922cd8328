#include "stages/preprocess/resize.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "core/safetensors.h"
#include "stages/preprocess/image_decode.h"

namespace servoflow::stages {
namespace {

using contract::Resize;

TEST(Letterbox, EveryRecordedPicture) {
  const auto file = SafetensorsFile::open("tests/golden/images/resize.safetensors");
  ASSERT_TRUE(file.ok()) << file.status().message();
  int exact = 0, floating = 0;
  double worst[2] = {0, 0};
  for (const SafeTensor& tensor : file->tensors()) {
    SCOPED_TRACE(tensor.name);
    const std::string name = tensor.name.substr(0, tensor.name.find('/')),
                      kind = tensor.name.substr(name.size() + 1);
    const auto image = read_image_file("tests/golden/images/" + name + ".png");
    ASSERT_TRUE(image.ok()) << image.status().message();
    if (kind == "pillow") {
      Letterbox letterbox(Resize::kPillow);
      std::vector<std::uint8_t> out(3 * 224 * 224);
      ASSERT_TRUE(letterbox.run_u8(image->rgb, image->width, image->height, 224, out).ok());
      ASSERT_EQ(tensor.bytes.size(), out.size());
      EXPECT_EQ(std::memcmp(tensor.bytes.data(), out.data(), out.size()), 0);
      ++exact;
      continue;
    }
    Letterbox letterbox(kind == "openpi_float" ? Resize::kOpenpiFloat : Resize::kLerobotFloat);
    std::vector<float> out(3 * 224 * 224);
    ASSERT_TRUE(letterbox.run(image->rgb, image->width, image->height, 224, out).ok());
    const auto want = to_floats(tensor);
    ASSERT_TRUE(want.ok());
    ASSERT_EQ(want->size(), out.size());
    for (std::size_t i = 0; i < out.size(); ++i) {
      worst[kind == "openpi_float"] =
          std::max<double>(worst[kind == "openpi_float"], std::abs(out[i] - (*want)[i]));
    }
    ++floating;
  }
  EXPECT_EQ(exact, 17);
  EXPECT_EQ(floating, 5);
  // Allowed is 1e-4; the coordinates have torch's own rounding, so that only the last bit of a pixel is left
  // to differ.
  EXPECT_LT(worst[0], 5e-7) << "lerobot";
  EXPECT_LT(worst[1], 5e-7) << "openpi";
}

TEST(Letterbox, OtherModelSizes) {
  for (const int size : {1, 16, 128, 225, 448}) {
    for (const Resize mode : {Resize::kPillow, Resize::kOpenpiFloat, Resize::kLerobotFloat}) {
      Letterbox letterbox(mode);
      const std::vector<std::uint8_t> white(3 * 60 * 40, 255);
      std::vector<float> out(3 * size * size, 7);
      const Status status = letterbox.run(white, 60, 40, size, out);
      if (size == 1) {
        EXPECT_FALSE(status.ok());  // 1 x 0.67
        continue;
      }
      ASSERT_TRUE(status.ok()) << status.message();
      double sum = 0;
      for (const float x : out) {
        ASSERT_TRUE(x >= -1 && x <= 1);
        sum += (x + 1) / 2;
      }
      EXPECT_NEAR(sum / out.size(), static_cast<int>(40 / (60.0 / size)) / static_cast<double>(size), 1e-5);
    }
  }
}

TEST(Letterbox, RefusesUnusableFrames) {
  Letterbox letterbox(Resize::kPillow);
  std::vector<float> out(3 * 224 * 224);
  const std::vector<std::uint8_t> bytes(3 * 3 * 700);
  const Status narrow = letterbox.run(bytes, 3, 700, 224, out);
  EXPECT_EQ(narrow.code(), StatusCode::kInvalidInput);
  EXPECT_NE(narrow.message().find("3x700"), std::string::npos);
  EXPECT_FALSE(letterbox.run(bytes, 700, 3, 224, out).ok());
  for (const auto& [width, height] : std::vector<std::pair<int, int>>{
           {0, 700}, {-3, -700}, {3, 699}, {3, 701}, {1 << 30, 1 << 30}, {20000, 1}, {2147483647, 3}}) {
    EXPECT_FALSE(letterbox.run(bytes, width, height, 224, out).ok()) << width << "x" << height;
  }
  EXPECT_FALSE(letterbox.run(bytes, 3, 700, 0, out).ok());
  EXPECT_FALSE(letterbox.run({}, 224, 224, 224, out).ok());
  std::vector<float> small(10);
  EXPECT_FALSE(letterbox.run(bytes, 700, 3, 224, small).ok());
}

TEST(Letterbox, ManySizesKeepTheCacheBounded) {
  Letterbox letterbox(Resize::kPillow), fresh(Resize::kPillow);
  std::vector<std::uint8_t> out(3 * 32 * 32), again(out.size());
  for (int round = 0; round < 2; ++round) {
    for (int side = 20; side < 120; ++side) {
      std::vector<std::uint8_t> frame(3 * side * (side + 7));
      for (std::size_t i = 0; i < frame.size(); ++i) frame[i] = static_cast<std::uint8_t>(i * 31 + side);
      ASSERT_TRUE(letterbox.run_u8(frame, side, side + 7, 32, out).ok());
      Letterbox alone(Resize::kPillow);
      ASSERT_TRUE(alone.run_u8(frame, side, side + 7, 32, again).ok());
      ASSERT_EQ(out, again) << side;
    }
  }
}

}  // namespace
}  // namespace servoflow::stages
