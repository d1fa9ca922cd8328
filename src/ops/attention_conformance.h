// Attention of a backend against the reference at the sizes of the model.
#pragma once

#include <algorithm>
#include <limits>

#include "ops/conformance.h"

namespace servoflow::ops {

// The heads of the model over numbers of keys around the sizes of tiles: the last rows of every request
// attend to all of it, and a request alone gets the bits it gets in a batch. What lies behind a slot's keys
// is NaN, or 3e38 where a backend takes an odd number of keys in pairs.
TEST_P(Ops, AttentionOverManyKeys) {
  struct Shape {
    int heads, kv, dim;
    std::vector<std::vector<int>> counts;
  };
  const std::vector<Shape> shapes = {
      {8, 1, 256, {{1}, {63}, {65}, {128}, {513}, {712}, {1000, 65, 305}, {1000}}},
      {16, 16, 72, {{1}, {63}, {65}, {129}, {256}, {256, 65, 200}}}};
  for (const Shape& sizes : shapes)
    for (const std::vector<int>& counts : sizes.counts) {
      const int heads = sizes.heads, kv = sizes.kv, dim = sizes.dim;
      const int cols = (heads + 2 * kv) * dim, requests = static_cast<int>(counts.size());
      const int keys = *std::max_element(counts.begin(), counts.end()) + (dim == 72 ? 0 : 7);
      std::vector<Segment> whole, ends;
      int rows = 0, longest = 0;
      std::string shape =
          std::to_string(heads) + "/" + std::to_string(kv) + " x " + std::to_string(dim) + ":";
      for (const int n : counts) {
        const int slot = requests - 1 - static_cast<int>(whole.size()), end = std::min(n, 41);
        whole.push_back({rows, n, slot, 0});
        ends.push_back({rows + n - end, end, slot, n - end});
        rows += n;
        longest = std::max(longest, end);
        shape += " " + std::to_string(n);
      }
      const auto qkv = normal(static_cast<std::size_t>(rows * cols), 12);
      std::vector<std::vector<float>> out;
      for (Device* d : {&reference, &device}) {
        KvCache cache{.layers = 2,
                      .slots = requests,
                      .keys = keys,
                      .kv_heads = kv,
                      .head_dim = dim,
                      .dtype = d->b->cache_dtype()};
        cache.data = *d->b->allocate(d->b->cache_bytes(cache));
        const std::uint8_t behind = d->b->name().starts_with("cuda") ? 0xff : 0x7f;
        const std::vector<std::uint8_t> poison(d->b->cache_bytes(cache), behind);
        d->b->upload(cache.data, poison.data(), poison.size());
        void* q = *d->b->allocate(d->b->query_bytes(rows, heads, dim));
        const Matrix in = d->put(qkv, rows, cols, DType::kF32);
        const auto fill = [&](const std::vector<Segment>& segments, int most) {
          const std::vector<std::int32_t> n = {static_cast<std::int32_t>(segments.size())};
          const Segments s{d->array(segments), {requests + 1, d->array(n)}, most, keys};
          d->b->split_qkv({.qkv = in, .heads = heads, .segments = s, .q = q, .cache = &cache, .layer = 1});
          return s;
        };
        fill(whole, keys);
        const auto attend = [&](const std::vector<Segment>& segments) {
          const Matrix y = d->matrix(rows, heads * dim, d->b->activation_dtype());
          d->b->attention({.q = q,
                           .heads = heads,
                           .cache = &cache,
                           .layer = 1,
                           .segments = fill(segments, longest),
                           .scale = 1 / std::sqrt(static_cast<float>(dim)),
                           .out = y});
          const Status status = d->b->finish();
          EXPECT_TRUE(status.ok()) << status.message();
          return d->get(y, rows);
        };
        const std::vector<float> all = attend(ends);
        std::vector<float> written;
        for (const Segment& s : ends) {
          const auto from = all.begin() + s.row_begin * heads * dim, to = from + s.rows * heads * dim;
          written.insert(written.end(), from, to);
          if (d == &device && requests > 1) {
            const std::vector<float> alone = attend({s});
            EXPECT_TRUE(std::equal(from, to, alone.begin() + s.row_begin * heads * dim)) << shape;
          }
        }
        const auto is_nan = [](float v) { return std::isnan(v); };
        EXPECT_EQ(std::count_if(all.begin(), all.end(), is_nan),
                  static_cast<std::ptrdiff_t>(all.size() - written.size()))
            << shape << ": rows that no segment has";
        out.push_back(written);
      }
      // As above: the weights' rounding averages out over the keys as the values do. One key's weight is 1.
      expect_share("attention " + shape, measure(out[1], out[0]), half() ? 0x1p-6 : 3e-6,
                   half() && keys > 8 ? 0x1p-12 : 0);
    }
}

TEST_P(Ops, AttentionSurvivesHugeScores) {
  KvCache cache{
      .layers = 1, .slots = 1, .keys = 40, .kv_heads = 1, .head_dim = 32, .dtype = device.b->cache_dtype()};
  cache.data = *device.b->allocate(device.b->cache_bytes(cache));
  const auto qkv = normal(40 * 96, 3, 1e4f);
  const Matrix in = device.put(qkv, 40, 96, DType::kF32), y = device.matrix(40, 32, act());
  void* q = *device.b->allocate(device.b->query_bytes(40, 1, 32));
  const Segments s{device.array(std::vector<Segment>{{0, 40, 0, 0}}), {1}, 40, 40};
  device.b->split_qkv({.qkv = in, .heads = 1, .segments = s, .q = q, .cache = &cache});
  device.b->attention({.q = q, .heads = 1, .cache = &cache, .segments = s, .scale = 1, .out = y});
  for (const float v : device.get(y, 40)) EXPECT_TRUE(std::isfinite(v));
}

}  // namespace servoflow::ops
