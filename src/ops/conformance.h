// Every operation of a backend against the plain reference, over a table of shapes and precisions: the tests
// that each backend's own test file instantiates.
//
// Tolerances are derived: a float32 sum of k products errs by at most about k · 2^-24 · Σ|x·w| and typically
// by its square root; operands rounded to bf16 carry 2^-9 each, so a product sum errs by about 2^-8.5 ·
// sqrt(Σ(x·w)²). Each test prints how much of the tolerance was used, and a suspiciously exact bf16 result
// fails too: it would mean that nothing was rounded.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <random>

#include "core/bf16.h"
#include "ops/backend.h"

namespace servoflow::ops {

// One backend with helpers to move dense float rows in and out of its matrices.
class Device {
 public:
  explicit Device(std::unique_ptr<Backend> backend) : b(std::move(backend)) {}
  Matrix matrix(int rows, int cols, DType dtype) {
    Matrix m{.dtype = dtype, .rows = rows, .cols = cols, .pitch = b->pitch(cols, dtype)};
    const std::size_t bytes = static_cast<std::size_t>(rows * m.pitch) * dtype_size(dtype);
    m.data = *b->allocate(bytes);
    const std::vector<std::uint8_t> poison(bytes, 0xff);  // NaN everywhere: an element nobody wrote is seen
    b->upload(m.data, poison.data(), bytes);
    EXPECT_TRUE(b->finish().ok());
    return m;
  }
  Matrix put(const std::vector<float>& values, int rows, int cols, DType dtype) {
    Matrix m = matrix(rows, cols, dtype);
    std::vector<std::uint8_t> host(static_cast<std::size_t>(rows * m.pitch) * dtype_size(dtype), 0xff);
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < cols; ++c) {
        const float v = values[static_cast<std::size_t>(r * cols + c)];
        const bf16 half = to_bf16(v);
        std::uint8_t* at = host.data() + static_cast<std::size_t>(r * m.pitch + c) * dtype_size(dtype);
        if (dtype == DType::kF32) std::memcpy(at, &v, 4);
        if (dtype == DType::kBF16) std::memcpy(at, &half, 2);
      }
    b->upload(m.data, host.data(), host.size());
    EXPECT_TRUE(b->finish().ok());
    return m;
  }
  std::vector<float> get(const Matrix& m, int rows) {
    std::vector<float> out;
    if (rows == 0) return out;
    std::vector<std::uint8_t> host(static_cast<std::size_t>(rows * m.pitch) * dtype_size(m.dtype));
    b->download(host.data(), m.data, host.size());
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < m.cols; ++c) {
        float v = 0;
        bf16 half{};
        const std::uint8_t* at =
            host.data() + static_cast<std::size_t>(r * m.pitch + c) * dtype_size(m.dtype);
        if (m.dtype == DType::kF32) std::memcpy(&v, at, 4);
        if (m.dtype == DType::kBF16) std::memcpy(&half, at, 2), v = to_float(half);
        out.push_back(v);
      }
    return out;
  }
  template <typename T>
  const T* array(const std::vector<T>& values) {
    void* device = *b->allocate(values.size() * sizeof(T));
    b->upload(device, values.data(), values.size() * sizeof(T));
    EXPECT_TRUE(b->finish().ok());
    return static_cast<const T*>(device);
  }
  RopeTable rope(int keys, int dim) {
    std::vector<float> cosines, sines;
    for (int p = 0; p < keys; ++p)
      for (int i = 0; i < dim / 2; ++i) {
        const double angle = p * std::pow(10000.0, -2.0 * i / (dim - dim % 2));
        cosines.push_back(static_cast<float>(std::cos(angle)));
        sines.push_back(static_cast<float>(std::sin(angle)));
      }
    return {array(cosines), array(sines), keys, dim / 2};
  }
  Weight weight(const std::vector<std::vector<float>>& parts, int k, PackMode mode, DType stored,
                int head_dim = 0, bool few_rows = false) {
    std::vector<std::vector<bf16>> halves;
    std::vector<HostMatrix> host;
    for (const auto& part : parts) {
      halves.emplace_back();
      for (const float v : part) halves.back().push_back(to_bf16(v));
    }
    for (std::size_t i = 0; i < parts.size(); ++i)
      host.push_back(
          {stored, static_cast<int>(parts[i].size()) / k, k,
           stored == DType::kF32 ? std::as_bytes(std::span(parts[i])) : std::as_bytes(std::span(halves[i])),
           "w"});
    auto w = b->pack(host, {.mode = mode, .head_dim = head_dim, .few_rows = few_rows});
    EXPECT_TRUE(w.ok()) << w.status().message();
    return *w;
  }
  std::unique_ptr<Backend> b;
};

inline std::vector<float> normal(std::size_t n, unsigned seed, float scale = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> d(0, scale);
  std::vector<float> out(n);
  for (float& v : out)
    v = to_float(to_bf16(d(random)));  // exact in bf16, so that inputs are equal in all precisions
  return out;
}

struct Measure {
  double rms_error = 0, rms = 0;
  bool finite = true;
};
inline Measure measure(const std::vector<float>& got, const std::vector<float>& want) {
  Measure m;
  EXPECT_EQ(got.size(), want.size());
  for (std::size_t i = 0; i < want.size(); ++i) {
    m.finite = m.finite && std::isfinite(got[i]);
    m.rms_error += std::pow(static_cast<double>(got[i]) - want[i], 2);
    m.rms += std::pow(static_cast<double>(want[i]), 2);
  }
  m.rms_error = std::sqrt(m.rms_error / static_cast<double>(want.size()));
  m.rms = std::sqrt(m.rms / static_cast<double>(want.size()));
  return m;
}

// The error's share of the expectation's rms stays between `floor` (0: exactness is no suspicion) and
// `share`.
inline void expect_share(const std::string& what, const Measure& m, double share, double floor = 0) {
  EXPECT_TRUE(m.finite) << what << ": an element was not written";
  const double scale = std::max(m.rms, 1e-6), used = m.rms_error / scale / share;
  std::printf("  %-34s error %.2e of rms, %5.1f %% of the tolerance\n", what.c_str(), m.rms_error / scale,
              100 * used);
  EXPECT_LE(used, 1) << what;
  EXPECT_GE(m.rms_error / scale, floor) << what << ": too exact for bf16";
}

// The backend under test. `done` undoes what `make` changed outside it.
struct Variant {
  std::string name;
  std::function<std::unique_ptr<Backend>()> make;
  std::function<void()> done;
};
class Ops : public testing::TestWithParam<Variant> {
 protected:
  Ops() : device(GetParam().make()) {}
  ~Ops() override {
    if (GetParam().done) GetParam().done();
  }
  Device reference{std::move(*make_reference_backend())};
  Device device;
  bool half() const { return device.b->activation_dtype() == DType::kBF16; }
  DType act() const { return device.b->activation_dtype(); }
};

TEST_P(Ops, Matmul) {
  struct Shape {
    int m, n, k;
  };
  for (const auto& [m, n, k] : {Shape{1, 32, 2},
                                {1, 1, 1},
                                {7, 33, 31},
                                {14, 64, 256},
                                {15, 65, 257},
                                {50, 1024, 513},
                                {50, 40, 1024},
                                {197, 96, 1152},
                                {392, 50, 100},
                                {393, 72, 588},
                                {1024, 48, 64},
                                {3, 4304, 40},
                                {5, 17, 4304}}) {
    const auto x = normal(static_cast<std::size_t>(m * k), 1), w = normal(static_cast<std::size_t>(n * k), 2);
    for (const DType stored : {DType::kBF16, DType::kF32}) {
      std::vector<std::vector<float>> out;
      for (Device* d : {&reference, &device}) {
        const Weight weight = d->weight({w}, k, PackMode::kConcat, stored);
        const Matrix in = d->put(x, m, k, d->b->activation_dtype()),
                     y = d->matrix(m, n, d->b->activation_dtype());
        d->b->matmul({.x = in, .w = &weight, .y = y, .rows = {m}});
        ASSERT_TRUE(d->b->finish().ok());
        out.push_back(d->get(y, m));
      }
      // Inputs are exact in bf16 and sums are float32, so only the stored output is rounded: no floor for
      // tiny shapes.
      const Measure e = measure(out[1], out[0]);
      EXPECT_TRUE(e.finite);
      const double share = half() ? 0x1p-8 : 4 * std::sqrt(static_cast<double>(k)) * 0x1p-24;
      expect_share("matmul " + std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k),
                   measure(out[1], out[0]), share, half() && m * n > 100 ? 0x1p-11 : 0);
    }
  }
}

TEST_P(Ops, MatmulEpilogues) {
  for (const int n : {70, 144}) {  // and one that comes in whole fours and sixteens
    const int m = 37, k = 96, capacity = 45;
    const auto x = normal(capacity * k, 3), w = normal(n * k, 4, 0.1f), bias = normal(n, 5),
               table = normal(2 * 3 * 3 * n, 6), old = normal(capacity * n, 7);
    const std::vector<std::int32_t> count = {m}, offset = [] {
      std::vector<std::int32_t> o(45);
      for (std::size_t i = 0; i < o.size(); ++i) o[i] = static_cast<std::int32_t>(i % 2);
      return o;
    }();
    const std::vector<std::int32_t> map = [] {
      std::vector<std::int32_t> o(45);
      for (std::size_t i = 0; i < o.size(); ++i) o[i] = static_cast<std::int32_t>((i * 2) % 45);
      return o;
    }();
    for (int kind = 0; kind < 6; ++kind) {
      std::vector<std::vector<float>> out;
      for (Device* d : {&reference, &device}) {
        const Weight weight = d->weight({w}, k, PackMode::kConcat, DType::kBF16);
        const DType y_type = kind >= 3 ? DType::kF32 : d->b->activation_dtype();
        const Matrix in = d->put(x, capacity, k, d->b->activation_dtype()),
                     y = d->put(old, capacity, n, y_type);
        const ModulationRow gate{.table = d->array(table),
                                 .step_pitch = 9 * n,
                                 .site = 1,
                                 .width = n,
                                 .base = 0,
                                 .row_offset = d->array(offset)};
        Epilogue e;
        if (kind == 0) e = {.bias = d->array(bias), .activation = Activation::kGeluTanh};
        if (kind == 1) e = {.bias = d->array(bias), .activation = Activation::kSilu};
        if (kind == 2) e = {.bias = d->array(bias), .row_map = d->array(map)};
        if (kind == 3) e = {.gate = &gate, .accumulate = true};
        if (kind == 4)
          e = {.bias = d->array(bias), .row_bias = d->array(normal(5 * n, 8)), .row_bias_period = 5};
        if (kind == 5) e = {.bias = d->array(bias), .accumulate = true, .row_map = d->array(map)};
        d->b->matmul({.x = in, .w = &weight, .y = y, .rows = {capacity, d->array(count)}, .epilogue = e});
        const Status status = d->b->finish();
        ASSERT_TRUE(status.ok()) << status.message();
        out.push_back(d->get(y, capacity));
      }
      const bool rounded = half() && kind < 3;
      expect_share("epilogue " + std::to_string(kind) + " of width " + std::to_string(n),
                   measure(out[1], out[0]), rounded ? 0x1p-8 : 1e-5, rounded ? 0x1p-11 : 0);
      for (int r = m; r < capacity && kind != 2 && kind != 5; ++r)
        for (int c = 0; c < n; ++c)
          EXPECT_EQ(out[1][static_cast<std::size_t>(r * n + c)], old[static_cast<std::size_t>(r * n + c)])
              << "a row beyond the count was written";
    }
  }
}

// Residual sums over every number of rows: rows beyond the count stay, and a row's value does not depend on
// how many others there are or were expected.
TEST_P(Ops, RowsStandAlone) {
  const int n = 256, k = 1024, capacity = 1024;
  const auto x = normal(capacity * k, 3), w = normal(n * k, 4, 0.03f), old = normal(capacity * n, 7);
  std::vector<float> want;
  for (Device* d : {&reference, &device}) {
    const Weight weight = d->weight({w}, k, PackMode::kConcat, DType::kBF16);
    const Matrix in = d->put(x, capacity, k, d->b->activation_dtype());
    std::vector<float> all;
    struct Rows {
      int m, likely;
    };
    for (const auto& [m, likely] : {Rows{1024, 1024},
                                    {712, 712},
                                    {200, 200},
                                    {65, 65},
                                    {64, 64},
                                    {50, 50},
                                    {17, 17},
                                    {7, 7},
                                    {1, 1},
                                    {1024, 50},
                                    {300, 1},
                                    {1, 1024}}) {
      if (d == &reference && m != capacity) break;
      const std::vector<std::int32_t> count = {m};
      const Matrix y = d->put(old, capacity, n, DType::kF32);
      d->b->matmul({.x = in,
                    .w = &weight,
                    .y = y,
                    .rows = {capacity, d->array(count), likely},
                    .epilogue = {.accumulate = true}});
      const Status status = d->b->finish();
      ASSERT_TRUE(status.ok()) << status.message();
      const std::vector<float> got = d->get(y, capacity);
      if (all.empty()) all = got;
      std::size_t differs = 0;
      for (std::size_t i = 0; i < got.size(); ++i)
        differs += got[i] != (i < static_cast<std::size_t>(m * n) ? all[i] : old[i]) ? 1 : 0;
      EXPECT_EQ(differs, 0u) << "of " << m << " rows, " << likely << " expected";
    }
    if (d == &reference) want = all;
    if (d == &device) expect_share("residual", measure(all, want), 1e-5);
  }
}

TEST_P(Ops, GeGlu) {
  for (const int mlp : {1, 31, 32, 33, 160, 512}) {
    const int m = 29, k = 64;
    const auto x = normal(m * k, 1), gate = normal(static_cast<std::size_t>(mlp * k), 2, 0.2f),
               up = normal(static_cast<std::size_t>(mlp * k), 3, 0.2f);
    std::vector<std::vector<float>> out;
    for (Device* d : {&reference, &device}) {
      const Weight weight = d->weight({gate, up}, k, PackMode::kInterleave, DType::kBF16);
      const Matrix in = d->put(x, m, k, d->b->activation_dtype()),
                   y = d->matrix(m, mlp, d->b->activation_dtype());
      d->b->matmul({.x = in, .w = &weight, .y = y, .rows = {m}, .epilogue = {.geglu = true}});
      ASSERT_TRUE(d->b->finish().ok());
      out.push_back(d->get(y, m));
    }
    expect_share("geglu " + std::to_string(mlp), measure(out[1], out[0]), half() ? 0x1p-8 : 1e-5,
                 half() ? 0x1p-11 : 0);
  }
}

TEST_P(Ops, Norms) {
  for (const int width : {1, 15, 40, 64, 72, 1000, 1152, 2048}) {
    const int m = 19;
    const auto x = normal(static_cast<std::size_t>(m * width), 1, 3.0f),
               w = normal(static_cast<std::size_t>(width), 2),
               bias = normal(static_cast<std::size_t>(width), 3),
               table = normal(static_cast<std::size_t>(2 * 3 * width), 4);
    for (int kind = 0; kind < 3; ++kind) {
      std::vector<std::vector<float>> out;
      for (Device* d : {&reference, &device}) {
        const Matrix in = d->put(x, m, width, DType::kF32), y = d->matrix(m, width, d->b->activation_dtype());
        const ModulationRow modulation{
            .table = d->array(table), .step_pitch = 3 * width, .width = width, .base = 1};
        if (kind == 0)
          d->b->layer_norm({.x = in, .y = y, .rows = {m}, .weight = d->array(w), .bias = d->array(bias)});
        if (kind == 1) d->b->rms_norm({.x = in, .y = y, .rows = {m}, .weight = d->array(w)});
        if (kind == 2) d->b->rms_norm({.x = in, .y = y, .rows = {m}, .modulation = &modulation});
        ASSERT_TRUE(d->b->finish().ok());
        out.push_back(d->get(y, m));
      }
      expect_share("norm kind " + std::to_string(kind) + " width " + std::to_string(width),
                   measure(out[1], out[0]), half() ? 0x1p-8 : 2e-6);
    }
  }
}

// Split, rotation, cache and attention together: what a layer does between its two products.
TEST_P(Ops, RaggedAttention) {
  struct Heads {
    int heads, kv, dim;
    bool rope;
  };
  for (const auto& [heads, kv, dim, rope] : {Heads{8, 1, 256, true},
                                             {4, 1, 32, true},
                                             {4, 2, 64, true},
                                             {16, 16, 72, false},
                                             {3, 3, 16, false},
                                             {2, 1, 15, false}}) {
    const int keys = 130, rows = 150, cols = (heads + 2 * kv) * dim;
    const auto qkv = normal(static_cast<std::size_t>(rows * cols), 11);
    // Prefix-like segments, one of them empty, an odd length; then suffix rows behind what the slots hold.
    const std::vector<Segment> prefix = {{0, 99, 1, 0}, {99, 1, 0, 0}, {100, 50, 2, 0}},
                               suffix = {{0, 10, 1, 99}, {10, 7, 0, 1}, {17, 30, 2, 50}};
    std::vector<std::vector<float>> out, ks;
    for (Device* d : {&reference, &device}) {
      KvCache cache{.layers = 2,
                    .slots = 3,
                    .keys = keys,
                    .kv_heads = kv,
                    .head_dim = dim,
                    .dtype = d->b->cache_dtype()};
      cache.data = *d->b->allocate(d->b->cache_bytes(cache));
      const RopeTable table = d->rope(keys, dim);
      void* q = *d->b->allocate(d->b->query_bytes(rows, heads, dim));
      const Matrix in = d->put(qkv, rows, cols, DType::kF32),
                   y = d->matrix(rows, heads * dim, d->b->activation_dtype());
      std::vector<float> all;
      for (const auto& segments : {prefix, suffix}) {
        const std::vector<std::int32_t> count = {static_cast<std::int32_t>(segments.size())};
        const Segments s{d->array(segments), {4, d->array(count)}, 100, keys};
        d->b->split_qkv({.qkv = in,
                         .heads = heads,
                         .segments = s,
                         .rope = rope ? &table : nullptr,
                         .q = q,
                         .cache = &cache,
                         .layer = 1});
        d->b->attention({.q = q,
                         .heads = heads,
                         .cache = &cache,
                         .layer = 1,
                         .segments = s,
                         .scale = 1 / std::sqrt(static_cast<float>(dim)),
                         .out = y});
        const Status status = d->b->finish();
        ASSERT_TRUE(status.ok()) << status.message();
        const auto part = d->get(y, segments.back().row_begin + segments.back().rows);
        all.insert(all.end(), part.begin(), part.end());
      }
      out.push_back(all);
      std::vector<float> k(static_cast<std::size_t>(99 * kv * dim)), v(k.size());
      d->b->read_cache(cache, 1, 1, 99, k, v);
      k.insert(k.end(), v.begin(), v.end());
      ks.push_back(k);
    }
    const std::string shape = std::to_string(heads) + "/" + std::to_string(kv) + " x " + std::to_string(dim);
    expect_share("cache " + shape, measure(ks[1], ks[0]), half() ? 0x1p-8 : 1e-7);
    // bf16: q, k, p, v and the output are rounded, 2^-9 each; scores have unit variance here.
    expect_share("attention " + shape, measure(out[1], out[0]), half() ? 0x1p-6 : 3e-6, half() ? 0x1p-12 : 0);
  }
}

TEST_P(Ops, BrokenContractsStickAndAreNamed) {
  const Weight weight = device.weight({normal(32, 1)}, 8, PackMode::kConcat, DType::kF32);
  const Matrix x = device.matrix(4, 9, act()), y = device.matrix(4, 4, act());
  device.b->matmul({.x = x, .w = &weight, .y = y, .rows = {4}});
  device.b->rms_norm({});
  const Status status = device.b->finish();
  EXPECT_EQ(status.code(), StatusCode::kRuntime);
  EXPECT_NE(status.message().find("matmul"), std::string::npos) << status.message();
  EXPECT_NE(status.message().find("op.x.cols == op.w->k"), std::string::npos) << status.message();
  EXPECT_TRUE(device.b->finish().ok()) << "reported once, then usable again";
}

TEST_P(Ops, PackingRefusesNanAndNamesIt) {
  std::vector<float> w(64 * 8, 1.0f);
  w[33 * 8 + 5] = std::numeric_limits<float>::quiet_NaN();
  const std::vector<HostMatrix> parts = {
      {DType::kF32, 64, 8, std::as_bytes(std::span(w)), "layers.3.mlp.weight"}};
  const auto packed = device.b->pack(parts, {});
  ASSERT_FALSE(packed.ok());
  EXPECT_EQ(packed.status().code(), StatusCode::kInvalidInput);
  EXPECT_NE(packed.status().message().find("layers.3.mlp.weight: element [33, 5] is NaN"), std::string::npos)
      << packed.status().message();
}

}  // namespace servoflow::ops
