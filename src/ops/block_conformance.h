// Transformer blocks and the denoise loop of a backend against the reference's compositions.
#pragma once

#include "ops/composite/composite.h"
#include "ops/conformance.h"

namespace servoflow::ops {

// What a transformer block needs, on one backend, from the same numbers.
struct BlockParts {
  Device& d;
  bool few_rows = false;
  unsigned seed = 100;
  std::vector<float> values(int n, float scale) { return normal(static_cast<std::size_t>(n), ++seed, scale); }
  const float* vector(int n, float scale = 0.2f) { return d.array(values(n, scale)); }
  Weight linear(int n, int k, float scale = 1) {
    return d.weight({values(n * k, scale / std::sqrt(static_cast<float>(k)))}, k, PackMode::kConcat,
                    DType::kBF16, 0, few_rows);
  }
  Weight heads(int heads, int kv, int dim, int k) {
    const float s = 1 / std::sqrt(static_cast<float>(k));
    return d.weight({values(heads * dim * k, s), values(kv * dim * k, s), values(kv * dim * k, s)}, k,
                    PackMode::kHeads, DType::kBF16, dim, few_rows);
  }
  Weight gated(int mlp, int k) {
    const float s = 1 / std::sqrt(static_cast<float>(k));
    return d.weight({values(mlp * k, s), values(mlp * k, s)}, k, PackMode::kInterleave, DType::kBF16, 0,
                    few_rows);
  }
  BlockScratch scratch(int rows, int width, int heads, int kv, int dim, int mlp) {
    const DType act = d.b->activation_dtype();
    BlockScratch s{.normed = d.matrix(rows, width, act),
                   .qkv = d.matrix(rows, (heads + 2 * kv) * dim, DType::kF32),
                   .attended = d.matrix(rows, heads * dim, act),
                   .hidden = d.matrix(rows, mlp, act)};
    s.q = *d.b->allocate(d.b->query_bytes(rows, heads, dim));
    return s;
  }
  KvCache cache(int layers, int slots, int keys, int kv, int dim) {
    KvCache c{.layers = layers,
              .slots = slots,
              .keys = keys,
              .kv_heads = kv,
              .head_dim = dim,
              .dtype = d.b->cache_dtype()};
    c.data = *d.b->allocate(d.b->cache_bytes(c));
    return c;
  }
  SiglipWeights siglip(int heads, int kv, int dim, int width, int mlp) {
    return {.norm1_weight = vector(width, 1),
            .norm1_bias = vector(width),
            .norm2_weight = vector(width, 1),
            .norm2_bias = vector(width),
            .qkv = this->heads(heads, kv, dim, width),
            .out = linear(width, heads * dim),
            .fc1 = linear(mlp, width),
            .fc2 = linear(width, mlp),
            .qkv_bias = vector((heads + 2 * kv) * dim),
            .out_bias = vector(width),
            .fc1_bias = vector(mlp),
            .fc2_bias = vector(width)};
  }
  RopeTable rope(int keys, int dim) { return d.rope(keys, dim); }
};

TEST_P(Ops, SiglipBlock) {
  for (const int dim : {72, 16}) {
    const int heads = 3, width = 152, mlp = 304, rows = 2 * 100, capacity = 3 * 100;
    std::vector<std::vector<float>> out;
    for (Device* d : {&reference, &device}) {
      BlockParts p{*d};
      const std::vector<float> x = p.values(capacity * width, 1);
      const SiglipWeights w = p.siglip(heads, heads, dim, width, mlp);
      const KvCache cache = p.cache(1, 3, 100, heads, dim);
      const Matrix in = d->put(x, capacity, width, DType::kF32);
      const std::vector<Segment> segments = {{0, 100, 0, 0}, {100, 100, 1, 0}};
      const std::vector<std::int32_t> count = {2}, valid = {rows};
      const BlockScratch scratch = p.scratch(capacity, width, heads, heads, dim, mlp);
      for (const bool again : {false, true})
        d->b->siglip_block({.weights = &w,
                            .x = in,
                            .rows = {capacity, d->array(valid)},
                            .segments = {d->array(segments), {3, d->array(count)}, 100, 100},
                            .cache = &cache,
                            .heads = heads,
                            .scratch = scratch,
                            .next = again ? nullptr : &w,
                            .normed = again});
      const Status status = d->b->finish();
      ASSERT_TRUE(status.ok()) << status.message();
      out.push_back(d->get(in, rows));
    }
    expect_share("siglip block, heads of " + std::to_string(dim), measure(out[1], out[0]),
                 half() ? 0x1p-6 : 1e-5, half() ? 0x1p-12 : 0);
  }
}

// A prefix of two layers, then two Euler steps of the expert upon its keys and values.
TEST_P(Ops, GemmaLayersAndDenoiseLoop) {
  for (const int dim : {32, 256}) {
    const int depth = 2, heads = 4, kv = 1, width = 192, mlp = 520, expert_width = 96, expert_mlp = 264,
              actions = 7, horizon = 10, keys = 150;
    const std::vector<Segment> prefix = {{0, 77, 1, 0}, {77, 130, 0, 0}},
                               suffix = {{0, horizon, 1, 77}, {horizon, horizon, 0, 130}};
    const std::vector<std::int32_t> two = {2}, prefix_rows = {207}, suffix_rows = {2 * horizon};
    std::vector<std::vector<float>> xs, ks, moved;
    for (Device* d : {&reference, &device}) {
      BlockParts p{*d};
      const DType f32 = DType::kF32;
      const KvCache cache = p.cache(depth, 2, keys, kv, dim);
      const RopeTable rope = p.rope(keys, dim);
      const Matrix x = d->put(p.values(300 * width, 1), 300, width, f32);
      const BlockScratch s = p.scratch(300, width, heads, kv, dim, mlp);
      std::vector<GemmaWeights> prefix_layers;
      for (int layer = 0; layer < depth; ++layer)
        prefix_layers.push_back({.input_norm = p.vector(width),
                                 .post_norm = p.vector(width),
                                 .qkv = p.heads(heads, kv, dim, width),
                                 .out = p.linear(width, heads * dim),
                                 .gate_up = p.gated(mlp, width),
                                 .down = p.linear(width, mlp)});
      for (int layer = 0; layer < depth; ++layer) {
        const GemmaWeights* w = &prefix_layers[static_cast<std::size_t>(layer)];
        d->b->gemma_layer({.weights = w,
                           .x = x,
                           .rows = {300, d->array(prefix_rows)},
                           .segments = {d->array(prefix), {3, d->array(two)}, 130, keys},
                           .cache = &cache,
                           .layer = layer,
                           .heads = heads,
                           .rope = &rope,
                           .only_cache = layer + 1 == depth,
                           .scratch = s,
                           .next = layer + 1 < depth ? w + 1 : nullptr,
                           .normed = layer > 0});
      }
      Status status = d->b->finish();
      ASSERT_TRUE(status.ok()) << status.message();
      xs.push_back(d->get(x, 207));
      std::vector<float> k(static_cast<std::size_t>(130 * dim)), v(k.size());
      d->b->read_cache(cache, depth - 1, 0, 130, k, v);
      k.insert(k.end(), v.begin(), v.end());
      ks.push_back(k);

      std::vector<GemmaWeights> layers;
      for (int layer = 0; layer < depth; ++layer)
        layers.push_back({.qkv = p.heads(heads, kv, dim, expert_width),
                          .out = p.linear(expert_width, heads * dim),
                          .gate_up = p.gated(expert_mlp, expert_width),
                          .down = p.linear(expert_width, expert_mlp)});
      const ExpertWeights w{.layers = layers.data(),
                            .depth = depth,
                            .width = expert_width,
                            .heads = heads,
                            .action_in = p.linear(expert_width, actions),
                            .action_out = p.linear(actions, expert_width),
                            .action_in_bias = p.vector(expert_width),
                            .action_out_bias = p.vector(actions)};
      const int sites = 2 * depth + 1, rows = 30;
      const Matrix noise = d->put(p.values(rows * actions, 1), rows, actions, f32);
      d->b->denoise_loop({.step = {.weights = &w,
                                   .actions = noise,
                                   .velocity = d->matrix(rows, actions, f32),
                                   .rows = {rows, d->array(suffix_rows)},
                                   .segments = {d->array(suffix), {3, d->array(two)}, horizon, keys},
                                   .cache = &cache,
                                   .rope = &rope,
                                   .modulation = {.table = p.vector(3 * sites * 3 * expert_width, 0.5f),
                                                  .step_pitch = sites * 3 * expert_width,
                                                  .width = expert_width},
                                   .x = d->matrix(rows, expert_width, f32),
                                   .scratch = p.scratch(rows, expert_width, heads, kv, dim, expert_mlp),
                                   .final_normed = d->matrix(rows, expert_width, f32)},
                          .first = 1,
                          .steps = 2,
                          .dt = -0.5f});
      status = d->b->finish();
      ASSERT_TRUE(status.ok()) << status.message();
      moved.push_back(d->get(noise, 2 * horizon));
    }
    const std::string heads_of = ", heads of " + std::to_string(dim);
    expect_share("prefix rows" + heads_of, measure(xs[1], xs[0]), half() ? 0x1p-6 : 1e-5,
                 half() ? 0x1p-12 : 0);
    expect_share("last keys and values" + heads_of, measure(ks[1], ks[0]), half() ? 0x1p-6 : 1e-5);
    expect_share("denoised actions" + heads_of, measure(moved[1], moved[0]), half() ? 0x1p-6 : 1e-5,
                 half() ? 0x1p-12 : 0);
  }
}

// A request has the same bits alone as among others, wherever its rows come to lie: blocks of the sizes that
// have kernels of their own, rows in more than one tile, borders of segments within tiles.
TEST_P(Ops, ARequestInABatchHasItsOwnBits) {
  const std::vector<int> lengths = {300, 256, 77, 256, 190};
  const int requests = static_cast<int>(lengths.size()), keys = 320, capacity = 1100;
  struct Sizes {
    int width, heads, kv, dim, mlp;
  };
  for (const Sizes& size : {Sizes{288, 4, 4, 72, 520}, Sizes{512, 8, 1, 256, 1024}}) {
    const int width = size.width, heads = size.heads, kv = size.kv, dim = size.dim, mlp = size.mlp;
    const bool vision = kv == heads;
    BlockParts p{device};
    const SiglipWeights siglip = p.siglip(heads, kv, dim, width, mlp);
    const GemmaWeights gemma{.input_norm = p.vector(width),
                             .post_norm = p.vector(width),
                             .qkv = siglip.qkv,
                             .out = siglip.out,
                             .gate_up = p.gated(mlp, width),
                             .down = siglip.fc2};
    const KvCache cache = p.cache(1, requests, keys, kv, dim);
    const RopeTable rope = p.rope(keys, dim);
    const BlockScratch scratch = p.scratch(capacity, width, heads, kv, dim, mlp);
    const std::vector<float> x = p.values(capacity * width, 1);
    // Rows, keys and values of the requests first .. last, which begin at row 0.
    const auto run = [&](int first, int last) {
      std::vector<Segment> segments;
      int skipped = 0, rows = 0;
      for (int r = 0; r < last; ++r) {
        const int length = lengths[static_cast<std::size_t>(r)];
        if (r < first) skipped += length;
        if (r >= first) segments.push_back({rows, length, r - first, 0});
        if (r >= first) rows += length;
      }
      std::vector<float> in(x.begin() + static_cast<std::ptrdiff_t>(skipped) * width, x.end());
      in.resize(x.size());
      const Matrix matrix = device.put(in, capacity, width, DType::kF32);
      const std::vector<std::int32_t> count = {last - first}, valid = {rows};
      const Count row_count{capacity, device.array(valid), rows};
      const Segments where{device.array(segments), {requests, device.array(count)}, 300, keys};
      if (vision)
        device.b->siglip_block({.weights = &siglip,
                                .x = matrix,
                                .rows = row_count,
                                .segments = where,
                                .cache = &cache,
                                .heads = heads,
                                .scratch = scratch});
      else
        device.b->gemma_layer({.weights = &gemma,
                               .x = matrix,
                               .rows = row_count,
                               .segments = where,
                               .cache = &cache,
                               .layer = 0,
                               .heads = heads,
                               .rope = &rope,
                               .scratch = scratch});
      const Status status = device.b->finish();
      EXPECT_TRUE(status.ok()) << status.message();
      std::vector<std::vector<float>> out;
      const std::vector<float> all = device.get(matrix, rows);
      for (const Segment& s : segments) {
        const auto begin = all.begin() + static_cast<std::ptrdiff_t>(s.row_begin) * width;
        out.emplace_back(begin, begin + static_cast<std::ptrdiff_t>(s.rows) * width);
        for (int side = 0; side < 2; ++side) {
          std::vector<float> k(static_cast<std::size_t>(s.rows * kv * dim)), v(k.size());
          device.b->read_cache(cache, 0, s.slot, s.rows, k, v);
          out.push_back(side == 0 ? k : v);
        }
      }
      return out;
    };
    const auto batch = run(0, requests);
    for (int r = 0; r < requests; ++r) {
      const auto alone = run(r, r + 1);
      for (std::size_t i = 0; i < 3; ++i) {
        const std::vector<float>&want = alone[i], &got = batch[static_cast<std::size_t>(3 * r) + i];
        ASSERT_EQ(got.size(), want.size());
        std::size_t differs = 0, first = want.size();
        float most = 0;
        for (std::size_t e = 0; e < want.size(); ++e) {
          if (got[e] == want[e]) continue;
          first = std::min(first, e);
          most = std::max(most, std::abs(got[e] - want[e]));
          ++differs;
        }
        EXPECT_EQ(differs, 0u) << (vision ? "vision, " : "prefix, ")
                               << (i == 0   ? "rows"
                                   : i == 1 ? "keys"
                                            : "values")
                               << " of request " << r << ": of " << want.size() << ", the first at row "
                               << first * static_cast<std::size_t>(lengths[static_cast<std::size_t>(r)]) /
                                      want.size()
                               << ", the largest " << most;
      }
    }
  }
}

}  // namespace servoflow::ops
