// How frames and tokens enter, on a backend and on the reference, to the bit.
#pragma once

#include <algorithm>
#include <bit>

#include "ops/conformance.h"

namespace servoflow::ops {

// One axis of a frame with weights that no resizing has, so that sums leave a byte's range on both sides.
inline std::vector<std::int32_t> axis_table(Resampling kind, int in, int out, int taps,
                                            std::mt19937& random) {
  std::vector<std::int32_t> first, second, weights;
  std::uniform_real_distribution<float> fraction(0, 1);
  for (int i = 0; i < out; ++i) {
    const int low = static_cast<int>(static_cast<std::int64_t>(i) * in / out),
              most = std::min(taps, in - low);
    first.push_back(low);
    second.push_back(kind == Resampling::kFixedPoint
                         ? most - static_cast<int>(random() % 2) * (most > 1 ? 1 : 0)
                         : std::min(low + 1, in - 1));
    for (int k = 0; k < taps; ++k) {
      const float share = k == 0 ? fraction(random) : (fraction(random) - 0.4f) / static_cast<float>(taps);
      weights.push_back(kind == Resampling::kFixedPoint
                            ? static_cast<std::int32_t>(share * (1 << kResamplingBits))
                            : std::bit_cast<std::int32_t>(fraction(random)));
    }
  }
  for (const auto* part : {&second, &weights}) first.insert(first.end(), part->begin(), part->end());
  return first;
}

// Frames of all sizes and kinds side by side, to the bit. stages/preprocess compares with its own resizing.
TEST_P(Ops, Letterbox) {
  struct Size {
    int width, height, image, columns, rows;
  };
  for (const auto& [width, height, image, columns, rows] : {Size{1, 1, 1, 1, 1},
                                                            {1, 1, 28, 28, 28},
                                                            {28, 28, 28, 28, 28},
                                                            {5, 3, 28, 28, 17},
                                                            {31, 57, 28, 15, 28},
                                                            {64, 48, 225, 225, 169},
                                                            {640, 480, 224, 224, 168},
                                                            {1280, 960, 56, 56, 42},
                                                            {4096, 300, 64, 64, 5},
                                                            {300, 4096, 64, 5, 64}}) {
    std::mt19937 random(static_cast<unsigned>(width * 7 + height));
    const auto area = static_cast<std::size_t>(image) * static_cast<std::size_t>(image);
    std::vector<std::byte> data;
    const auto append = [&](const void* from, std::size_t bytes) {
      const auto at = static_cast<std::int64_t>(data.size());
      data.resize((data.size() + bytes + 3) / 4 * 4);
      std::memcpy(data.data() + at, from, bytes);
      return at;
    };
    std::vector<Frame> frames;
    for (const Resampling kind : {Resampling::kFixedPoint, Resampling::kSymmetric, Resampling::kUnit})
      for (const int planes : {0, 1}) {
        Frame f{.resampling = kind,
                .width = width,
                .height = height,
                .planes = planes,
                .left = (image - columns) / 2,
                .top = image - rows,
                .columns = columns,
                .rows = rows};
        f.column_taps = kind == Resampling::kFixedPoint ? width / columns + 2 : 1;
        f.row_taps = kind == Resampling::kFixedPoint ? height / rows + 2 : 1;
        const auto x = axis_table(kind, width, columns, f.column_taps, random),
                   y = axis_table(kind, height, rows, f.row_taps, random);
        f.column_table = append(x.data(), x.size() * 4);
        f.row_table = append(y.data(), y.size() * 4);
        std::vector<std::uint8_t> bytes(static_cast<std::size_t>(width) * static_cast<std::size_t>(height) *
                                        3);
        for (std::uint8_t& b : bytes) b = static_cast<std::uint8_t>(random());
        f.pixels = append(bytes.data(), bytes.size());
        const Status fine = check_frame(f, data, data.size(), image);
        ASSERT_TRUE(fine.ok()) << fine.message();
        frames.push_back(f);
      }
    const auto ready = normal(area * 3, 5);
    frames.push_back({.width = image, .height = image, .pixels = append(ready.data(), ready.size() * 4)});
    frames.push_back(frames[0]);  // beyond the count
    const std::vector<std::int32_t> count = {7};
    std::vector<std::vector<float>> out;
    for (Device* d : {&reference, &device}) {
      const Matrix pixels = d->matrix(1, static_cast<int>(8 * area * 3), DType::kF32);
      d->b->letterbox({.frames = d->array(frames),
                       .data = d->array(data),
                       .pictures = {8, d->array(count)},
                       .image = image,
                       .pixels = static_cast<float*>(pixels.data)});
      const Status status = d->b->finish();
      ASSERT_TRUE(status.ok()) << status.message();
      out.push_back(d->get(pixels, 1));
    }
    for (std::size_t i = 0; i < out[0].size(); ++i) {
      if (i / (area * 3) == 7) {
        ASSERT_TRUE(std::isnan(out[1][i])) << "a picture beyond the count was written";
      } else {
        ASSERT_EQ(std::bit_cast<std::uint32_t>(out[1][i]), std::bit_cast<std::uint32_t>(out[0][i]))
            << width << "x" << height << " to " << image << ", frame " << i / (area * 3) << ", element "
            << i % (area * 3);
      }
    }
  }
}

TEST_P(Ops, PatchRows) {
  const int image = 12, patch = 4, values = 3 * patch * patch, rows = 3 * 9;
  const auto bytes = normal(3 * image * image * 3, 8);
  std::vector<float> pixels;
  for (const float v : bytes) pixels.push_back(v / 3);  // more than bf16 holds
  const std::vector<std::int32_t> count = {2};
  for (const int parts : {1, 2, 3}) {
    std::vector<std::vector<float>> out;
    for (Device* d : {&reference, &device}) {
      const Matrix y = d->matrix(rows, parts * values, parts == 1 ? DType::kF32 : DType::kBF16);
      d->b->patch_rows({.pixels = d->array(pixels),
                        .pictures = {3, d->array(count)},
                        .image = image,
                        .patch = patch,
                        .out = y});
      const Status status = d->b->finish();
      ASSERT_TRUE(status.ok()) << status.message();
      out.push_back(d->get(y, rows));
    }
    for (std::size_t i = 0; i < out[0].size(); ++i) {
      if (i >= static_cast<std::size_t>(2 * 9 * parts * values)) {
        ASSERT_TRUE(std::isnan(out[1][i])) << "a picture beyond the count was written";
      } else {
        ASSERT_EQ(out[1][i], out[0][i]) << parts << " parts, element " << i;
      }
    }
    const float whole = pixels[static_cast<std::size_t>(image * 3)];  // second line, first column, red
    const float sum =
        parts == 1 ? out[1][patch] : out[1][patch] + out[1][static_cast<std::size_t>(values + patch)];
    EXPECT_NEAR(sum, whole, std::abs(whole) * 0x1p-16);
  }
}

TEST_P(Ops, TokenRows) {
  const int vocab = 50, rows = 9, width = 70;
  const auto table = normal(vocab * width, 3);
  const std::vector<std::int32_t> ids = {49, 0, 7, 7, 31, 2, 48, 1}, map = {3, 0, 8, 1, 2, 4, 5, 6},
                                  count = {8};
  for (const DType stored : {DType::kBF16, DType::kF32}) {
    std::vector<std::vector<float>> out;
    for (Device* d : {&reference, &device}) {
      const Matrix y = d->matrix(rows, width, DType::kF32);
      d->b->scale_rows({.x = d->put(table, vocab, width, stored),
                        .y = y,
                        .rows = {rows, d->array(count)},
                        .scale = 1.7f,
                        .row_map = d->array(map),
                        .ids = d->array(ids)});
      const Status status = d->b->finish();
      ASSERT_TRUE(status.ok()) << status.message();
      out.push_back(d->get(y, rows));
    }
    for (int i = 0; i < 8; ++i)
      for (int c = 0; c < width; ++c) {
        const auto at = static_cast<std::size_t>(map[static_cast<std::size_t>(i)] * width + c);
        EXPECT_EQ(out[1][at], out[0][at]);
        EXPECT_EQ(out[1][at],
                  table[static_cast<std::size_t>(ids[static_cast<std::size_t>(i)] * width + c)] * 1.7f);
      }
    EXPECT_TRUE(std::isnan(out[1][7 * width])) << "a row that no token has";
  }
}

}  // namespace servoflow::ops
