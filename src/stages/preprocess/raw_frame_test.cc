// Raw frames on every backend against the stage's own resizing, to the bit.
#include <gtest/gtest.h>

#include <bit>
#include <cstring>
#include <random>

#include "ops/backend.h"
#include "stages/preprocess/resize.h"

namespace servoflow::stages {
namespace {

using contract::Resize;

struct Size {
  int width, height, size;
};
constexpr Size kSizes[] = {
    {1, 1, 224},     {224, 224, 224}, {640, 480, 224}, {480, 640, 224}, {1280, 720, 224}, {1280, 960, 224},
    {641, 479, 224}, {225, 223, 224}, {100, 100, 224}, {30, 17, 224},   {4096, 300, 224}, {300, 4096, 28},
    {56, 56, 28},    {33, 57, 28},    {28, 28, 28},    {3, 2, 225},     {256, 256, 448},  {1920, 640, 224}};

void expect_same_pictures(ops::Backend& backend, Resize mode) {
  RawFrame raw;  // one for all sizes, as a session keeps it
  Letterbox letterbox(mode);
  for (const auto& [width, height, size] : kSizes) {
    std::mt19937 random(static_cast<unsigned>(width + height));
    const std::size_t area = static_cast<std::size_t>(width) * static_cast<std::size_t>(height);
    std::vector<std::uint8_t> bytes(3 * area), planes(3 * area);
    for (std::size_t i = 0; i < area; ++i)
      for (std::size_t c = 0; c < 3; ++c)
        bytes[3 * i + c] = planes[c * area + i] = static_cast<std::uint8_t>(random());
    const std::size_t pixels =
        std::size_t{3} * static_cast<std::size_t>(size) * static_cast<std::size_t>(size);
    std::vector<float> want(pixels), got(pixels);
    ASSERT_TRUE(letterbox.run(bytes, width, height, size, want).ok());
    for (const bool in_planes : {false, true}) {
      ASSERT_TRUE(Letterbox::fits_device(width, height));
      ASSERT_TRUE(letterbox.describe(in_planes ? planes : bytes, width, height, in_planes, size, raw).ok());
      std::vector<std::byte> data(ops::max_table_bytes(size) + ops::max_pixel_bytes(size));
      std::size_t used = 0;
      const auto append = [&](const void* from, std::size_t count) {
        const std::size_t at = used;
        std::memcpy(data.data() + at, from, count);
        used = (at + count + 15) / 16 * 16;
        return static_cast<std::int64_t>(at);
      };
      ops::Frame frame = raw.frame;
      frame.column_table = append(raw.columns.table.data(), raw.columns.table.size() * sizeof(std::int32_t));
      frame.row_table = append(raw.rows.table.data(), raw.rows.table.size() * sizeof(std::int32_t));
      frame.pixels = append(raw.bytes.data(), raw.bytes.size());
      const Status fine = ops::check_frame(frame, {data.data(), used}, used, size);
      ASSERT_TRUE(fine.ok()) << fine.message();
      void *frames = *backend.allocate(sizeof(frame)), *block = *backend.allocate(used),
           *out = *backend.allocate(pixels * sizeof(float));
      std::memset(got.data(), 0xff, pixels * sizeof(float));
      backend.upload(out, got.data(), pixels * sizeof(float));
      backend.upload(frames, &frame, sizeof(frame));
      backend.upload(block, data.data(), used);
      backend.letterbox({.frames = static_cast<const ops::Frame*>(frames),
                         .data = static_cast<const std::byte*>(block),
                         .pictures = {1},
                         .image = size,
                         .pixels = static_cast<float*>(out)});
      backend.download(got.data(), out, pixels * sizeof(float));
      const Status status = backend.finish();
      ASSERT_TRUE(status.ok()) << status.message();
      ASSERT_EQ(std::memcmp(got.data(), want.data(), pixels * sizeof(float)), 0)
          << width << "x" << height << " to " << size << (in_planes ? ", in planes" : "");
    }
  }
}

class RawFrameOn : public testing::TestWithParam<const char*> {};

TEST_P(RawFrameOn, GivesTheSamePictures) {
  auto made = ops::make_backend({.device = GetParam(), .precision = "fp32"});
  ASSERT_TRUE(made.ok()) << made.status().message();
  for (const Resize mode : {Resize::kPillow, Resize::kOpenpiFloat, Resize::kLerobotFloat}) {
    SCOPED_TRACE("mode " + std::to_string(static_cast<int>(mode)));
    expect_same_pictures(*made->backend, mode);
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, RawFrameOn, testing::Values("reference", "cpu", "cuda"),
                         [](const auto& info) { return std::string(info.param); });

TEST(RawFrame, LargeFramesStayOnTheHost) {
  EXPECT_TRUE(Letterbox::fits_device(1280, 960));
  EXPECT_TRUE(Letterbox::fits_device(ops::kMaxFrameSide, 1));
  EXPECT_FALSE(Letterbox::fits_device(1281, 960));
  EXPECT_FALSE(Letterbox::fits_device(ops::kMaxFrameSide + 1, 1));
  EXPECT_FALSE(Letterbox::fits_device(0, 10));
  EXPECT_FALSE(Letterbox::fits_device(1 << 30, 1 << 30));
}

TEST(RawFrame, RefusesWhatRunRefuses) {
  Letterbox letterbox(Resize::kPillow);
  RawFrame raw;
  const std::vector<std::uint8_t> bytes(3 * 3 * 700);
  EXPECT_FALSE(letterbox.describe(bytes, 3, 700, false, 224, raw).ok()) << "a side vanishes";
  EXPECT_FALSE(letterbox.describe(bytes, 3, 699, false, 224, raw).ok()) << "bytes and sizes disagree";
  EXPECT_FALSE(letterbox.describe(bytes, -3, -700, false, 224, raw).ok());
}

}  // namespace
}  // namespace servoflow::stages
