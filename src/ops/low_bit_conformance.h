// Products with quantized weights and inputs against the reference's float32 emulation: what each backend
// that has such kernels instantiates beside conformance.h.
//
// Tolerances. Codes are integers or floats of a few bits, and inputs here are exact in every activation type,
// so that a kernel must find the very codes of the emulation; what is left is the order of a float32 sum of k
// terms, about sqrt(k) · 2^-24 of its rms, and a handful of roundings of scales. Another test holds the
// emulation itself against the plain product, from both sides: the error must be what the rounding of this
// weight and these inputs predicts.
#pragma once

#include <map>
#include <tuple>

#include "ops/conformance.h"

namespace servoflow::ops {

// Formats that differ in codes, in where scales lie, or in how inputs enter.
inline const std::vector<std::string>& low_bit_formats() {
  static const std::vector<std::string> formats = {"int8-w8a8",
                                                   "int8-w8a8-static",
                                                   "int8-w8a16",
                                                   "fp8-w8a8",
                                                   "fp8-w8a8-static",
                                                   "fp8-w8a16",
                                                   "fp8-block",
                                                   "int4-g128-w4a16",
                                                   "int4-g128-sym-w4a16",
                                                   "nvfp4-w4a16",
                                                   "nvfp4-w4a8",
                                                   "nvfp4-w4a4",
                                                   "nvfp4-w4a4-dynamic",
                                                   "mxfp4-w4a16",
                                                   "mxfp8-w8a8",
                                                   "int8-g128/int8-token",
                                                   "int8-channel/int8-tensor-static-asym"};
  return formats;
}

struct LowBitWeights {
  quant::LinearFormat format;
  std::vector<quant::QuantizedMatrix> parts;  // of the rounded matrices
  std::vector<HostMatrix> host;
};

// Rounds matrices [rows, k]. Static inputs get a scale that fits normal numbers.
inline LowBitWeights low_bit_weights(const std::vector<std::vector<float>>& parts, int k,
                                     const std::string& format) {
  LowBitWeights out;
  auto parsed = quant::parse_format(format);
  EXPECT_TRUE(parsed.ok()) << format << ": " << parsed.status().message();
  out.format = *parsed;
  for (const auto& part : parts) {
    auto m = quant::quantize(part, static_cast<std::int64_t>(part.size()) / k, k, out.format);
    EXPECT_TRUE(m.ok()) << format << ": " << m.status().message();
    if (out.format.input.needs_calibration()) {
      m->input_scale = out.format.input.code == quant::Code::kE2M1
                           ? 4.0f / 2688
                           : 4.0f / quant::code_max(out.format.input.code);
      m->input_zero_point = out.format.input.zero_point ? -7 : 0;
    }
    out.parts.push_back(std::move(*m));
  }
  for (const quant::QuantizedMatrix& m : out.parts)
    out.host.push_back({.rows = static_cast<int>(m.rows), .cols = k, .name = "w", .quantized = &m});
  return out;
}

inline double low_bit_share(int k) { return (std::sqrt(static_cast<double>(k)) + 4) * 0x1p-24; }

class LowBitOps : public Ops {
 protected:
  Weight pack(Device& d, const LowBitWeights& w, PackMode mode = PackMode::kConcat) {
    auto packed = d.b->pack(w.host, {.mode = mode});
    EXPECT_TRUE(packed.ok()) << packed.status().message();
    return packed.ok() ? *packed : Weight{};
  }
  std::vector<float> product(Device& d, const Weight& w, const std::vector<float>& x, int m, int columns,
                             const Epilogue& e = {}) {
    const Matrix in = d.put(x, m, w.k, d.b->activation_dtype()), y = d.matrix(m, columns, DType::kF32);
    d.b->matmul({.x = in, .w = &w, .y = y, .rows = {m}, .epilogue = e});
    const Status status = d.b->finish();
    EXPECT_TRUE(status.ok()) << status.message();
    return d.get(y, m);
  }
  // The emulation's answers do not depend on the variant under test.
  const std::vector<float>& emulated(const std::string& format, int m, int n, int k) {
    static std::map<std::tuple<std::string, int, int, int>, std::vector<float>> known;
    std::vector<float>& out = known[{format, m, n, k}];
    if (out.empty()) {
      const LowBitWeights w = low_bit_weights({weights(n, k)}, k, format);
      out = product(reference, pack(reference, w), inputs(m, k), m, n);
    }
    return out;
  }
  static std::vector<float> inputs(int m, int k) { return normal(static_cast<std::size_t>(m * k), 1); }
  static std::vector<float> weights(int n, int k) {
    return normal(static_cast<std::size_t>(n * k), 2, 0.05f);
  }
};

TEST_P(LowBitOps, AgreeWithTheEmulation) {
  struct Shape {
    int m, n, k;
  };
  for (const std::string& format : low_bit_formats()) {
    std::printf("  %s: %s\n", format.c_str(), device.b->low_bit_kernel(*quant::parse_format(format)).c_str());
    for (const auto& [m, n, k] : {Shape{1, 1, 1},
                                  {1, 33, 130},
                                  {7, 31, 31},
                                  {14, 64, 256},
                                  {15, 65, 257},
                                  {50, 96, 1027},
                                  {197, 34, 1152},
                                  {393, 40, 72},
                                  {1024, 32, 48},
                                  {5, 17, 4304},
                                  {3, 130, 2500}}) {
      const LowBitWeights w = low_bit_weights({weights(n, k)}, k, format);
      const Measure e =
          measure(product(device, pack(device, w), inputs(m, k), m, n), emulated(format, m, n, k));
      expect_share(format + " " + std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k), e,
                   low_bit_share(k));
    }
  }
}

// A product whose terms are independent errs by the root of the sum of squares of its operands' relative
// errors.
TEST_P(LowBitOps, TheErrorIsWhatTheRoundingPredicts) {
  const int m = 64, n = 96, k = 1152;
  const auto x = inputs(m, k), w = weights(n, k);
  for (const std::string& format : low_bit_formats()) {
    const LowBitWeights low = low_bit_weights({w}, k, format);
    const auto relative = [](const std::vector<float>& got, const std::vector<float>& want) {
      const Measure e = measure(got, want);
      return e.rms_error / e.rms;
    };
    std::vector<float> rounded = x;
    quant::fake_quantize_rows(low.format.input, rounded.data(), m, k, k, low.parts[0].input_scale,
                              low.parts[0].input_zero_point);
    const double predicted = std::hypot(relative(quant::dequantize(low.parts[0]), w), relative(rounded, x));
    const Weight plain = device.weight({w}, k, PackMode::kConcat, DType::kF32);
    const double seen =
        relative(product(device, pack(device, low), x, m, n),
                 product(reference, reference.weight({w}, k, PackMode::kConcat, DType::kF32), x, m, n));
    (void)plain;
    std::printf("  %-38s error %.4f, predicted %.4f\n", format.c_str(), seen, predicted);
    // 6144 sums: the estimate of an rms is good to 1 % or so; the operands are not quite independent.
    EXPECT_LT(seen, 1.1 * predicted) << format;
    EXPECT_GT(seen, 0.9 * predicted) << format;
  }
}

TEST_P(LowBitOps, Epilogues) {
  const int m = 37, capacity = 45, k = 130;
  for (const std::string format : {"int8-w8a8", "int4-g128-w4a16", "nvfp4-w4a8"})
    for (const int n : {70, 144})
      for (int kind = 0; kind < 6; ++kind) {
        const auto x = normal(static_cast<std::size_t>(capacity * k), 3),
                   bias = normal(static_cast<std::size_t>(n), 5),
                   table = normal(static_cast<std::size_t>(18 * n), 6),
                   old = normal(static_cast<std::size_t>(capacity * n), 7);
        const LowBitWeights low = low_bit_weights({weights(n, k)}, k, format);
        std::vector<std::int32_t> count = {m}, offset, map;
        for (std::int32_t i = 0; i < capacity; ++i) offset.push_back(i % 2), map.push_back(i * 2 % capacity);
        std::vector<std::vector<float>> out;
        for (Device* d : {&reference, &device}) {
          const Weight w = pack(*d, low);
          const Matrix in = d->put(x, capacity, k, d->b->activation_dtype()),
                       y = d->put(old, capacity, n, DType::kF32);
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
            e = {.bias = d->array(bias),
                 .row_bias = d->array(normal(static_cast<std::size_t>(5 * n), 8)),
                 .row_bias_period = 5};
          if (kind == 5) e = {.bias = d->array(bias), .accumulate = true, .row_map = d->array(map)};
          d->b->matmul({.x = in, .w = &w, .y = y, .rows = {capacity, d->array(count)}, .epilogue = e});
          const Status status = d->b->finish();
          ASSERT_TRUE(status.ok()) << status.message();
          out.push_back(d->get(y, capacity));
        }
        expect_share(format + " epilogue " + std::to_string(kind) + " of width " + std::to_string(n),
                     measure(out[1], out[0]), 1e-5);
        for (int r = m; r < capacity && kind != 2 && kind != 5; ++r)
          for (int c = 0; c < n; ++c)
            ASSERT_EQ(out[1][static_cast<std::size_t>(r * n + c)], old[static_cast<std::size_t>(r * n + c)])
                << "a row beyond the count was written";
      }
}

TEST_P(LowBitOps, GeGlu) {
  for (const std::string& format : low_bit_formats())
    for (const int mlp : {1, 31, 33, 160}) {
      const int m = 29, k = 64;
      const LowBitWeights low = low_bit_weights({normal(static_cast<std::size_t>(mlp * k), 2, 0.2f),
                                                 normal(static_cast<std::size_t>(mlp * k), 3, 0.2f)},
                                                k, format);
      std::vector<std::vector<float>> out;
      for (Device* d : {&reference, &device})
        out.push_back(
            product(*d, pack(*d, low, PackMode::kInterleave), inputs(m, k), m, mlp, {.geglu = true}));
      expect_share(format + " geglu " + std::to_string(mlp), measure(out[1], out[0]), 1e-5);
    }
}

// q, k and v keep their own scales, and parts end anywhere in a panel.
TEST_P(LowBitOps, PartsKeepTheirOwnScales) {
  const int k = 144, m = 9;
  for (const std::string& format : low_bit_formats()) {
    const LowBitWeights low = low_bit_weights(
        {normal(static_cast<std::size_t>(70 * k), 2, 0.02f), normal(static_cast<std::size_t>(9 * k), 3, 3.0f),
         normal(static_cast<std::size_t>(40 * k), 4, 0.3f)},
        k, format);
    std::vector<std::vector<float>> out;
    for (Device* d : {&reference, &device}) out.push_back(product(*d, pack(*d, low), inputs(m, k), m, 119));
    for (const auto& [first, last] : {std::pair(0, 70), {70, 79}, {79, 119}}) {
      std::vector<float> got, want;
      for (int r = 0; r < m; ++r)
        for (int c = first; c < last; ++c)
          got.push_back(out[1][static_cast<std::size_t>(r * 119 + c)]),
              want.push_back(out[0][static_cast<std::size_t>(r * 119 + c)]);
      expect_share(format + " columns from " + std::to_string(first), measure(got, want), low_bit_share(k));
    }
  }
}

// NVFP4: each number is one of 16 codes times one of 127 scales, zero and the subnormals among them. A row of
// W per scale, with another one in its second, odd group; each output is held against its own terms.
TEST_P(LowBitOps, EveryCodeTimesEveryScale) {
  constexpr int kScales = 127, k = 31;
  LowBitWeights low = low_bit_weights({weights(kScales, k)}, k, "nvfp4-w4a16");
  quant::QuantizedMatrix& w = low.parts[0];
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(kScales) * w.pitch), scales;
  for (int r = 0; r < kScales; ++r) {
    for (std::size_t j = 0; j < w.pitch; ++j)
      codes[static_cast<std::size_t>(r) * w.pitch + j] =
          static_cast<std::uint8_t>(((2 * j + static_cast<std::size_t>(r)) % 16) | ((2 * j + 1) % 16 << 4));
    scales.push_back(static_cast<std::uint8_t>(r));
    scales.push_back(static_cast<std::uint8_t>(kScales - 1 - r));
  }
  ASSERT_EQ(w.scale_cols, 2);
  w.codes = codes;
  w.scales = scales;
  const std::vector<float> dense = quant::dequantize(w);
  for (const int m : {3, 10, 29}) {  // fewer rows than a tile, one tile, several
    const auto x = inputs(m, k);
    const std::vector<float> got = product(device, pack(device, low), x, m, kScales);
    for (int i = 0; i < m; ++i)
      for (int r = 0; r < kScales; ++r) {
        double want = 0, terms = 0;
        for (int j = 0; j < k; ++j) {
          const double term = static_cast<double>(x[static_cast<std::size_t>(i * k + j)]) *
                              dense[static_cast<std::size_t>(r * k + j)];
          want += term;
          terms += std::abs(term);
        }
        ASSERT_NEAR(got[static_cast<std::size_t>(i * kScales + r)], want, k * 0x1p-24 * terms)
            << m << " rows, row " << i << ", scale code " << r;
      }
  }
}

// SmoothQuant's and AWQ's multiplier comes before anything else.
TEST_P(LowBitOps, InputMultiplier) {
  const int m = 15, n = 40, k = 259;
  for (const std::string format :
       {"int8-w8a8", "int8-w8a16", "int4-g128-w4a16", "nvfp4-w4a4-dynamic", "fp8-w8a8"}) {
    LowBitWeights low = low_bit_weights({weights(n, k)}, k, format);
    std::vector<std::vector<float>> out;
    // Powers of two, so that bf16 holds the products.
    for (int i = 0; i < k; ++i)
      low.parts[0].input_multiplier.push_back(std::exp2(static_cast<float>(i % 7 - 3)));
    for (Device* d : {&reference, &device}) out.push_back(product(*d, pack(*d, low), inputs(m, k), m, n));
    expect_share(format + " multiplied", measure(out[1], out[0]), low_bit_share(k));
  }
}

TEST_P(LowBitOps, RowsStandAlone) {
  const int n = 96, k = 1024, most = 1024;
  const auto x = inputs(most, k);
  for (const std::string format :
       {"int8-w8a8", "int8-w8a16", "int4-g128-w4a16", "nvfp4-w4a16", "nvfp4-w4a4", "fp8-w8a8"}) {
    const Weight w = pack(device, low_bit_weights({weights(n, k)}, k, format));
    const std::vector<float> all = product(device, w, x, most, n);
    for (const int m : {1, 7, 17, 50, 65, 200, 393, 712}) {
      const int first = most - m;  // the last rows, as if they had come alone
      const std::vector<float> part =
          product(device, w, {x.begin() + static_cast<std::ptrdiff_t>(first) * k, x.end()}, m, n);
      EXPECT_TRUE(std::equal(part.begin(), part.end(), all.begin() + static_cast<std::ptrdiff_t>(first) * n))
          << format << ": " << m << " rows alone have other bits than among " << most;
    }
  }
}

TEST_P(LowBitOps, WhatIsNotFiniteStaysVisible) {
  const int m = 5, n = 33, k = 70;
  for (const std::string format : {"int8-w8a8", "fp8-w8a8", "nvfp4-w4a4", "int4-g128-w4a16"}) {
    auto x = inputs(m, k);
    x[2 * k + 69] = std::numeric_limits<float>::quiet_NaN();
    x[4 * k] = std::numeric_limits<float>::infinity();
    const auto y = product(device, pack(device, low_bit_weights({weights(n, k)}, k, format)), x, m, n);
    for (int r = 0; r < m; ++r)
      for (int c = 0; c < n; ++c)
        EXPECT_EQ(std::isfinite(y[static_cast<std::size_t>(r * n + c)]), r != 2 && r != 4)
            << format << " row " << r;
  }
}

TEST_P(LowBitOps, RowsOfZerosAndTinyRows) {
  const int n = 33, k = 70;
  for (const std::string& format : low_bit_formats()) {
    std::vector<float> x(3 * k, 0.0f);
    for (int i = 0; i < k; ++i) x[static_cast<std::size_t>(k + i)] = to_float(to_bf16(1e-38f));
    for (int i = 0; i < k; ++i) x[static_cast<std::size_t>(2 * k + i)] = 1;
    const LowBitWeights low = low_bit_weights({weights(n, k)}, k, format);
    const auto y = product(device, pack(device, low), x, 3, n);
    for (int c = 0; c < n; ++c) {
      // With a zero point, a row of zeros is a row of its code.
      EXPECT_EQ(y[static_cast<std::size_t>(c)], 0) << format;
      EXPECT_LT(std::abs(y[static_cast<std::size_t>(n + c)]), 1e-30) << format;
      EXPECT_NE(y[static_cast<std::size_t>(2 * n + c)], 0) << format;
    }
  }
}

TEST_P(LowBitOps, RefusalsNameTensorAndCause) {
  const int k = 64;
  const auto message = [&](const LowBitWeights& w) {
    auto packed = device.b->pack(w.host, {});
    EXPECT_FALSE(packed.ok());
    return packed.status().message();
  };
  const auto w = weights(8, k);
  EXPECT_NE(message(low_bit_weights({w}, k, "fp8-channel/fp8-tensor")).find("depend on its batch"),
            std::string::npos);
  LowBitWeights two = low_bit_weights({w, w}, k, "int8-w8a8-static");
  two.host[1].name = "k_proj";
  two.parts[1].input_scale = 3.0f;
  EXPECT_NE(message(two).find("k_proj: the input scale"), std::string::npos) << message(two);
  LowBitWeights lost = low_bit_weights({w}, k, "int8-w8a8-static");
  lost.parts[0].input_scale.reset();
  EXPECT_NE(message(lost).find("calibrated input scale"), std::string::npos);
  LowBitWeights bad = low_bit_weights({w}, k, "fp8-w8a8");
  std::vector<std::uint8_t> codes(bad.parts[0].codes.begin(), bad.parts[0].codes.end());
  codes[3 * bad.parts[0].pitch + 5] = 0x7f;
  bad.parts[0].codes = codes;
  EXPECT_NE(message(bad).find("w: element [3, 5] is NaN"), std::string::npos) << message(bad);
}

}  // namespace servoflow::ops
