#include "quant/matrix.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "quant/distortion.h"
#include "quant/pack.h"
#include "quant/scalars.h"
#include "quant/scales.h"

namespace servoflow::quant {
namespace {

std::vector<float> normal(std::size_t n, unsigned seed, float sigma = 0.02f) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> distribution(0.0f, sigma);
  std::vector<float> values(n);
  for (float& v : values) v = distribution(generator);
  return values;
}

QuantizedMatrix quantized(const std::vector<float>& w, std::int64_t rows, std::int64_t cols,
                          const char* format, const ScaleOptions& options = {}) {
  Result<QuantizedMatrix> m = quantize(w, rows, cols, *parse_format(format), options);
  EXPECT_TRUE(m.ok()) << m.status().message();
  return std::move(*m);
}

// The largest error in units of the element's own scale.
double largest_step(const std::vector<float>& w, const QuantizedMatrix& m) {
  const std::vector<float> back = dequantize(m);
  double largest = 0;
  for (std::size_t i = 0; i < w.size(); ++i) {
    const auto r = static_cast<std::int64_t>(i) / m.cols, k = static_cast<std::int64_t>(i) % m.cols;
    const double scale = static_cast<double>(m.scale(r, k)) * m.global_scale;
    largest = std::max(largest, std::fabs(static_cast<double>(back[i]) - w[i]) / scale);
  }
  return largest;
}

// Normal weights, two-sided: a result far above its band is as suspicious as one below. The middles are those
// of tests/interop/distortion_bands.py, an exhaustive nearest-value search in NumPy; over seeds they vary by
// 0.15 dB.
TEST(Quantize, DistortionOfNormalWeightsLiesInsideItsBand) {
  constexpr std::int64_t kRows = 64, kCols = 1024;
  const std::vector<float> w = normal(kRows * kCols, 7);
  struct Band {
    const char* format;
    double snr_db;
    double largest;  // error / scale: half a step (more where the asymmetric code range clips), or half the
                     // widest gap
  };
  for (const Band& band : {Band{"int8-w8a16", 42.13, 0.51}, Band{"int8-g128/none", 43.71, 0.51},
                           Band{"int4-g128-w4a16", 19.96, 0.56}, Band{"int4-g128-sym-w4a16", 19.11, 0.56},
                           Band{"nvfp4-w4a16", 20.43, 1.01}, Band{"mxfp4-w4a16", 19.02, 1.01},
                           Band{"fp8-w8a16", 31.56, 16.01}, Band{"fp8-w8a8-static", 31.55, 16.01},
                           Band{"mxfp8-w8a8", 31.54, 16.01}, Band{"fp8e5m2-channel/none", 25.59, 4096.01}}) {
    const QuantizedMatrix m = quantized(w, kRows, kCols, band.format);
    const Distortion d = distortion(w, dequantize(m));
    EXPECT_NEAR(d.snr_db, band.snr_db, 0.35) << band.format;
    EXPECT_LE(largest_step(w, m), band.largest) << band.format;
    EXPECT_GT(largest_step(w, m), band.largest * 0.8) << band.format;
    // Noise is nearly orthogonal to the codes: cos = 1 / sqrt(1 + noise / signal) within a tenth of the
    // noise.
    EXPECT_NEAR(1 - d.cosine, 0.5 * d.relative_error * d.relative_error,
                0.1 * d.relative_error * d.relative_error);
    EXPECT_NEAR(d.mse, 4e-4 * std::pow(10, -band.snr_db / 10), 4e-5 * std::pow(10, -band.snr_db / 10) * 1.2)
        << band.format;
  }
}

TEST(Distortion, EdgesAreDefined) {
  const std::vector<float> zeros(4, 0.0f), ones(4, 1.0f), twos(4, 2.0f);
  EXPECT_EQ(distortion(zeros, zeros).relative_error, 0.0);
  EXPECT_EQ(distortion(zeros, zeros).cosine, 1.0);
  EXPECT_TRUE(std::isinf(distortion(zeros, ones).relative_error));
  EXPECT_EQ(distortion(zeros, ones).cosine, 0.0);
  EXPECT_TRUE(std::isinf(distortion(ones, ones).snr_db));
  EXPECT_EQ(distortion(ones, twos).mse, 1.0);
  EXPECT_EQ(distortion(ones, twos).max_error, 1.0);
  EXPECT_EQ(distortion(ones, twos).snr_db, 0.0);
  EXPECT_DOUBLE_EQ(distortion(ones, twos).cosine, 1.0);
}

// Trap: symmetric scales divide by (qmax - qmin) / 2, that is 7.5 and 127.5, in compressed-tensors; by 7 and
// 127 in ModelOpt.
TEST(Scales, SymmetricDivisorsAreHalfTheRangeNotTheLargestCode) {
  std::vector<float> w(128, 0.0f);
  w[3] = -1.0f;
  EXPECT_EQ(quantized(w, 1, 128, "int4-g128-sf32/none").scale_at(0), 1.0f / 7.5f);
  EXPECT_EQ(quantized(w, 1, 128, "int8-w8a16").scale_at(0), 1.0f / 127.5f);
  EXPECT_EQ(quantized(w, 1, 128, "fp8-w8a16").scale_at(0), 1.0f / 448.0f);
  const ScaleOptions modelopt{.convention = Convention::kModelOpt};
  EXPECT_EQ(quantized(w, 1, 128, "int4-g128-sf32/none", modelopt).scale_at(0), 1.0f / 7.0f);
  EXPECT_EQ(quantized(w, 1, 128, "int8-w8a16", modelopt).scale_at(0), 1.0f / 127.0f);
}

// Trap: asymmetric groups must contain zero, so that zero is exact.
TEST(Scales, AsymmetricGroupsKeepZeroExact) {
  for (const float offset : {3.0f, -3.0f}) {
    std::vector<float> w = normal(256, 3, 0.5f);
    for (float& v : w) v += offset;
    w[17] = w[200] = 0.0f;
    const QuantizedMatrix m = quantized(w, 2, 128, "int4-g128-w4a16");
    const std::vector<float> back = dequantize(m);
    EXPECT_EQ(back[17], 0.0f);
    EXPECT_EQ(back[200], 0.0f);
    for (const std::int8_t zero : m.zero_points) {
      EXPECT_GE(zero, -8);
      EXPECT_LE(zero, 7);
    }
  }
}

// Trap: a group of zeros. 0.125 in compressed-tensors, 1 in ModelOpt; the weights are zeros in both.
TEST(Scales, AllZeroGroupsFollowTheLibraryAndDecodeToZero) {
  std::vector<float> w = normal(64, 5);
  std::fill(w.begin(), w.begin() + 16, 0.0f);
  const QuantizedMatrix ct = quantized(w, 1, 64, "nvfp4-w4a16");
  const QuantizedMatrix mo = quantized(w, 1, 64, "nvfp4-w4a16", {.convention = Convention::kModelOpt});
  EXPECT_EQ(ct.scale(0, 0), 0.125f);
  EXPECT_EQ(mo.scale(0, 0), 1.0f);
  for (const QuantizedMatrix* m : {&ct, &mo})
    for (int k = 0; k < 16; ++k) EXPECT_EQ(dequantize(*m)[static_cast<std::size_t>(k)], 0.0f);
  const std::vector<float> zeros(256, 0.0f);
  for (const std::string& format : format_names()) {
    if (!parse_format(format)->weight.quantized()) continue;
    for (const Convention convention : {Convention::kCompressedTensors, Convention::kModelOpt}) {
      const QuantizedMatrix m = quantized(zeros, 1, 256, format.c_str(), {.convention = convention});
      EXPECT_EQ(dequantize(m), zeros) << format;
      EXPECT_TRUE(std::isfinite(m.global_scale) && m.global_scale > 0) << format;
    }
  }
}

// Trap: the two libraries store opposite directions; global_scale is always the multiplier.
TEST(Scales, GlobalScaleIsTheMultiplierWhateverTheFileStores) {
  const std::vector<float> w = normal(1024, 9);
  const float amax = max_magnitude(w);
  const QuantizedMatrix ct = quantized(w, 4, 256, "nvfp4-w4a16");
  const QuantizedMatrix mo = quantized(w, 4, 256, "nvfp4-w4a16", {.convention = Convention::kModelOpt});
  EXPECT_EQ(ct.file_global_scale, 2688.0f / amax);
  EXPECT_EQ(ct.global_scale, 1.0f / ct.file_global_scale);
  EXPECT_EQ(mo.file_global_scale, amax / 2688.0f);
  EXPECT_EQ(mo.global_scale, mo.file_global_scale);
  EXPECT_NEAR(ct.global_scale, mo.global_scale, 1e-6f * mo.global_scale);
  // The block with the largest weight takes the largest scale, and that weight comes back exactly.
  EXPECT_EQ(*std::max_element(ct.scales.begin(), ct.scales.end()), 0x7e);
  EXPECT_NEAR(max_magnitude(dequantize(ct)), amax, 1e-6f * amax);
}

// Trap: W4A8 with FP8 inputs: scales top out at 448 / 6, so that code * scale fits E4M3.
TEST(Scales, Nvfp4ForFp8InputsKeepsProductsInsideE4M3) {
  const std::vector<float> w = normal(4096, 11);
  const QuantizedMatrix m = quantized(w, 4, 1024, "nvfp4-w4a8");
  for (const std::uint8_t code : m.scales) EXPECT_LE(decode_ue4m3(code) * 6, 448.0f + 16);
  EXPECT_EQ(decode_ue4m3(*std::max_element(m.scales.begin(), m.scales.end())),
            72.0f);  // 74.67 rounded to E4M3
  const float amax = max_magnitude(w);
  EXPECT_EQ(m.file_global_scale, 448.0f / kE2M1Max * kE2M1Max / amax);
}

// Trap: q, k, v and gate, up are one product; one global scale must serve all of them.
TEST(Scales, FusedSetsShareTheGlobalScale) {
  const std::vector<float> a = normal(512, 1), b = normal(512, 2, 0.2f);
  const ScaleOptions shared{.amax = std::max(max_magnitude(a), max_magnitude(b))};
  const QuantizedMatrix qa = quantized(a, 2, 256, "nvfp4-w4a16", shared);
  const QuantizedMatrix qb = quantized(b, 2, 256, "nvfp4-w4a16", shared);
  EXPECT_EQ(qa.global_scale, qb.global_scale);
  EXPECT_NE(qa.global_scale, quantized(a, 2, 256, "nvfp4-w4a16").global_scale);
  EXPECT_GT(distortion(a, dequantize(qa)).snr_db, 18.0) << "block scales absorb the difference";
}

// Trap: K = 4304 (SigLIP) has 33.6 groups of 128. The last group is short; its scale is that of the elements
// present.
TEST(Padding, ShortLastGroupsAreGroupsOfTheirOwn) {
  constexpr std::int64_t kRows = 3, kCols = 4304;
  std::vector<float> w = normal(kRows * kCols, 13);
  for (std::int64_t r = 0; r < kRows; ++r)
    for (std::int64_t k = 4224; k < kCols; ++k) w[static_cast<std::size_t>(r * kCols + k)] *= 0.01f;
  for (const char* format : {"int4-g128-sf32/none", "int4-g128-w4a16", "int8-g128/none", "mxfp4-w4a16",
                             "mxfp8-w8a16", "nvfp4-w4a16", "fp8-block"}) {
    const QuantizedMatrix m = quantized(w, kRows, kCols, format);
    const std::int64_t group = m.format.weight.group;
    EXPECT_EQ(m.scale_cols, (kCols + group - 1) / group) << format;
    // The same numbers as the matrix with its columns padded by zeros.
    const std::int64_t padded = m.scale_cols * group;
    std::vector<float> wide(static_cast<std::size_t>(kRows * padded), 0.0f);
    for (std::int64_t r = 0; r < kRows; ++r)
      std::copy_n(w.begin() + r * kCols, kCols, wide.begin() + r * padded);
    const QuantizedMatrix p = quantized(wide, kRows, padded, format);
    ASSERT_EQ(m.scales.size(), p.scales.size());
    EXPECT_EQ(std::memcmp(m.scales.data(), p.scales.data(), m.scales.size()), 0) << format;
    for (std::int64_t r = 0; r < kRows; ++r)
      for (std::int64_t k = 0; k < kCols; ++k) ASSERT_EQ(m.code(r, k), p.code(r, k)) << format;
  }
}

TEST(Padding, OddColumnsAndSingleElementsRoundTrip) {
  for (const std::int64_t cols : {1, 2, 15, 16, 17, 31, 33, 127, 129}) {
    const std::vector<float> w = normal(static_cast<std::size_t>(3 * cols), static_cast<unsigned>(cols));
    for (const std::string& format : format_names()) {
      if (!parse_format(format)->weight.quantized()) continue;
      const QuantizedMatrix m = quantized(w, 3, cols, format.c_str());
      // Quantizing what was quantized, under the same scales, changes nothing.
      const std::vector<float> back = dequantize(m);
      Result<QuantizedMatrix> again =
          quantize_with_scales(back, 3, cols, m.format, m.decoded_scales(), m.zero_points, m.global_scale);
      ASSERT_TRUE(again.ok()) << again.status().message();
      EXPECT_EQ(dequantize(*again), back) << format << " " << cols;
    }
  }
}

// Trap: integers are packed with an offset, least significant first.
TEST(Packing, WordsOfCompressedTensors) {
  const std::vector<std::int8_t> nibbles = {-8, -7, -6, -5, -4, -3, -2, -1};
  EXPECT_EQ(pack_words(nibbles, 4), std::vector<std::uint32_t>{0x76543210u});
  const std::vector<std::int8_t> bytes = {-128, -127, -126, -125};
  EXPECT_EQ(pack_words(bytes, 8), std::vector<std::uint32_t>{0x03020100u});
  for (const int bits : {4, 8})
    for (std::size_t n = 1; n < 40; ++n) {
      std::vector<std::int8_t> values(n), back(n);
      for (std::size_t i = 0; i < n; ++i)
        values[i] = static_cast<std::int8_t>(static_cast<int>(i * 7 % (1u << bits)) - (1 << (bits - 1)));
      const std::vector<std::uint32_t> words = pack_words(values, bits);
      EXPECT_EQ(words.size(), (n * static_cast<std::size_t>(bits) + 31) / 32);
      unpack_words(words, bits, back);
      EXPECT_EQ(back, values);
    }
}

TEST(Packing, LowNibbleIsTheEvenColumn) {
  std::vector<float> w(16, 0.0f);
  w[0] = 6;     // code 7
  w[1] = -6;    // code 15
  w[2] = 0.5f;  // code 1
  const QuantizedMatrix m = quantized(w, 1, 16, "mxfp4-w4a16");
  EXPECT_EQ(m.codes[0], 0xf7);
  EXPECT_EQ(m.codes[1], 0x01);
  EXPECT_EQ(m.code(0, 1), 15);
  EXPECT_EQ(m.code_value(0, 1), -6.0f);
}

TEST(Scales, MxExponentsFollowTheMantissa) {
  const auto e = [](float amax, Convention c) { return mx_scale(Code::kE2M1, amax, c) - 127; };
  EXPECT_EQ(e(6.0f, Convention::kCompressedTensors), 0);
  EXPECT_EQ(e(4.0f, Convention::kCompressedTensors), 0);
  EXPECT_EQ(e(6.99f, Convention::kCompressedTensors), 0);  // saturates to 6
  EXPECT_EQ(e(7.0f, Convention::kCompressedTensors), 1);   // mantissa 1.75
  EXPECT_EQ(e(6.0f, Convention::kModelOpt), 0);
  EXPECT_EQ(e(6.01f, Convention::kModelOpt), 1);
  EXPECT_EQ(mx_scale(Code::kE2M1, 0.0f, Convention::kCompressedTensors), 0);
  EXPECT_EQ(mx_scale(Code::kE2M1, 1e-38f, Convention::kCompressedTensors), 0);
  EXPECT_EQ(mx_scale(Code::kE4M3, 448.0f, Convention::kModelOpt), 127);
}

TEST(Quantize, ShrinkNarrowsTheRange) {
  const std::vector<float> w = normal(256, 21);
  const std::vector<float> shrink = {0.5f, 1.0f};
  const QuantizedMatrix full = quantized(w, 2, 128, "int8-w8a16");
  const QuantizedMatrix half = quantized(w, 2, 128, "int8-w8a16", {.shrink = shrink});
  EXPECT_EQ(half.scale_at(0), full.scale_at(0) * 0.5f);
  EXPECT_EQ(half.scale_at(1), full.scale_at(1));
  const std::vector<float> back = dequantize(half);
  EXPECT_LT(max_magnitude(std::span(back).first(128)), 0.51f * max_magnitude(std::span(w).first(128)));
}

TEST(Quantize, AssembledCodesAreTheCodesGiven) {
  std::vector<std::int8_t> codes(64);
  for (std::size_t i = 0; i < codes.size(); ++i)
    codes[i] = static_cast<std::int8_t>(static_cast<int>(i % 16) - 8);
  const std::vector<float> scales = {0.5f, 0.25f};
  const Result<QuantizedMatrix> m = assemble(codes, 2, 32, *parse_format("int4-g32-sf32/none"), scales);
  ASSERT_TRUE(m.ok()) << m.status().message();
  for (std::int64_t r = 0; r < 2; ++r)
    for (std::int64_t k = 0; k < 32; ++k) {
      const int code = codes[static_cast<std::size_t>(r * 32 + k)];
      EXPECT_EQ(m->code(r, k), code);
      EXPECT_EQ(dequantize(*m)[static_cast<std::size_t>(r * 32 + k)],
                static_cast<float>(code) * scales[static_cast<std::size_t>(r)]);
    }
  codes[5] = 8;
  EXPECT_FALSE(assemble(codes, 2, 32, *parse_format("int4-g32-sf32/none"), scales).ok());
}

TEST(Quantize, BadInputIsRefusedWithItsPlace) {
  std::vector<float> w = normal(64, 1);
  const LinearFormat format = *parse_format("int8-w8a16");
  EXPECT_FALSE(quantize(w, 4, 17, format).ok());
  EXPECT_FALSE(quantize(w, 0, 64, format).ok());
  EXPECT_FALSE(quantize(w, std::numeric_limits<std::int64_t>::max(), 64, format).ok());
  EXPECT_FALSE(quantize(w, 1, 64, *parse_format("bf16")).ok());
  EXPECT_FALSE(quantize(w, 4, 16, format, {.shrink = w}).ok());
  EXPECT_FALSE(quantize(w, 4, 16, *parse_format("nvfp4-w4a16"), {.amax = NAN}).ok());
  for (const float bad : {-1.0f, NAN, INFINITY}) {
    const std::vector<float> scales(4, bad);
    EXPECT_FALSE(quantize_with_scales(w, 4, 16, format, scales).ok()) << bad;
  }
  EXPECT_FALSE(quantize_with_scales(w, 4, 16, format, std::vector<float>(3, 1.0f)).ok());
  w[40] = NAN;
  EXPECT_NE(quantize(w, 4, 16, format).status().message().find("[2, 8]"), std::string::npos);
  w[40] = INFINITY;
  EXPECT_FALSE(quantize(w, 4, 16, format).ok());
}

// Values at the ends of binary32 must not become NaN or trap.
TEST(Quantize, ExtremeMagnitudesStayFinite) {
  for (const float top : {1e38f, 1e-38f, 1e-44f})
    for (const std::string& format : format_names()) {
      if (!parse_format(format)->weight.quantized()) continue;
      std::vector<float> w(64, 0.0f);
      w[0] = top;
      w[1] = -top;
      w[2] = top / 3;
      for (const Convention convention : {Convention::kCompressedTensors, Convention::kModelOpt})
        for (const float v : dequantize(quantized(w, 1, 64, format.c_str(), {.convention = convention})))
          EXPECT_TRUE(std::isfinite(v)) << format << " " << top;
    }
}

TEST(Quantize, GroupsInAnotherOrderDecodeByTheirIndex) {
  const std::vector<float> w = normal(64, 17);
  QuantizedMatrix m = quantized(w, 1, 64, "int4-g32-sf32/none");
  m.group_of_column.assign(64, 0);
  for (std::size_t k = 0; k < 64; k += 2) m.group_of_column[k] = 1;
  const std::vector<float> back = dequantize(m);
  for (std::int64_t k = 0; k < 64; ++k)
    EXPECT_EQ(back[static_cast<std::size_t>(k)],
              static_cast<float>(m.code(0, k)) * m.scale_at(k % 2 == 0 ? 1 : 0));
}

}  // namespace
}  // namespace servoflow::quant
