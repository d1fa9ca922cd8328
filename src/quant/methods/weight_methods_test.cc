// Every weight method against round-to-nearest, on the method's own metric and on planted outliers.
#include <gtest/gtest.h>

#include <cmath>

#include "quant/methods/gptq.h"
#include "quant/methods/moments.h"
#include "quant/methods/planted.h"
#include "quant/methods/smoothing.h"
#include "quant/methods/weight_grid.h"

namespace servoflow::quant {
namespace {

double squared(std::span<const float> a, std::span<const float> b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i)
    sum += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
  return sum;
}

QuantizedMatrix nearest(const Planted& p, std::span<const float> w, const std::string& format) {
  Result<QuantizedMatrix> m = quantize(w, p.rows, p.cols, *parse_format(format));
  EXPECT_TRUE(m.ok()) << m.status().message();
  return std::move(*m);
}

SecondMoment moment_of(const Planted& p) {
  SecondMoment m(p.cols);
  m.add(p.x);
  return m;
}

// ‖X (W' - W)ᵀ‖² / ‖X Wᵀ‖² by its definition.
double output_error_plainly(const Planted& p, std::span<const float> w, std::span<const float> changed) {
  double error = 0, whole = 0;
  for (int i = 0; i < p.inputs; ++i)
    for (int r = 0; r < p.rows; ++r) {
      double a = 0, b = 0;
      for (int c = 0; c < p.cols; ++c) {
        const auto x = static_cast<double>(p.x[static_cast<std::size_t>(i * p.cols + c)]);
        a += x * static_cast<double>(w[static_cast<std::size_t>(r * p.cols + c)]);
        b += x * static_cast<double>(changed[static_cast<std::size_t>(r * p.cols + c)]);
      }
      error += (a - b) * (a - b);
      whole += a * a;
    }
  return error / whole;
}

class WeightFormats : public ::testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(All, WeightFormats,
                         ::testing::Values("int8-w8a16", "int4-g128-w4a16", "int4-g128-sym-w4a16",
                                           "nvfp4-w4a16", "mxfp4-w4a16", "fp8-w8a16", "fp8-w8a8-static"));

TEST_P(WeightFormats, TheGridOfRoundToNearestGivesItsValuesAndItsBytes) {
  const Planted p = planted(24, 176, 8, 1, 11);  // 176: neither 128 nor 32 divides it
  const QuantizedMatrix m = nearest(p, p.w, GetParam());
  const Grid grid = grid_of(m);
  const std::vector<float> values = round_to_grid(grid, p.w);
  EXPECT_EQ(values, dequantize(m));
  const Result<QuantizedMatrix> again = encode_on_grid(grid, values, m.format);
  ASSERT_TRUE(again.ok()) << again.status().message();
  EXPECT_EQ(dequantize(*again), values);
}

TEST_P(WeightFormats, LeastSquaresScalesBeatAbsmaxOnPlantedWeights) {
  Planted p = planted(24, 256, 8, 1, 12);
  for (std::size_t i = 0; i < p.w.size(); i += 61) p.w[i] *= 9;
  const QuantizedMatrix m = nearest(p, p.w, GetParam());
  const Grid best = least_squares(grid_of(m), p.w);
  const std::vector<float> values = round_to_grid(best, p.w);
  const Result<QuantizedMatrix> stored = encode_on_grid(best, values, m.format);
  ASSERT_TRUE(stored.ok());
  EXPECT_EQ(dequantize(*stored), values) << "a scale was chosen that the format cannot store";
  const double before = squared(p.w, dequantize(m)), after = squared(p.w, values);
  std::printf("%s: squared error %.3g of round to nearest\n", GetParam(), after / before);
  EXPECT_LT(after, before * (std::string(GetParam()).find("8-") != std::string::npos ? 1.0 : 0.97));
}

TEST_P(WeightFormats, GptqBeatsRoundToNearestOnOutputs) {
  const Planted p = planted(32, 128, 512, 20, 13);
  const SecondMoment moment = moment_of(p);
  const QuantizedMatrix m = nearest(p, p.w, GetParam());
  const std::vector<float> rtn = dequantize(m);
  for (const bool order : {true, false}) {
    const Result<std::vector<float>> w = gptq(grid_of(m), p.w, moment, {.block = 48, .order_by_size = order});
    ASSERT_TRUE(w.ok()) << w.status().message();
    const Result<QuantizedMatrix> stored = encode_on_grid(grid_of(m), *w, m.format);
    ASSERT_TRUE(stored.ok());
    EXPECT_EQ(dequantize(*stored), *w) << "values off the grid";
    const double before = output_error(moment, p.w, rtn), after = output_error(moment, p.w, *w);
    std::printf("%s%s: output error %.3g of round to nearest\n", GetParam(), order ? "" : " in order",
                after / before);
    EXPECT_LT(after, 0.6 * before);
    EXPECT_GT(after, 1e-4 * before) << "too good to be rounded values";
  }
}

TEST(Gptq, DoesNotDependOnTheBlock) {
  const Planted p = planted(16, 96, 300, 5, 14);
  const SecondMoment moment = moment_of(p);
  const Grid grid = grid_of(nearest(p, p.w, "nvfp4-w4a16"));
  const auto a = gptq(grid, p.w, moment, {.block = 1}), b = gptq(grid, p.w, moment, {.block = 128});
  ASSERT_TRUE(a.ok() && b.ok());
  // The order of sums differs in float64; a value on a rounding boundary may fall to either side.
  int different = 0;
  for (std::size_t i = 0; i < a->size(); ++i) different += (*a)[i] != (*b)[i];
  EXPECT_LE(different, 2);
}

// The published procedure, plainly: the damped moment is inverted, and after each column the rest of the
// weights takes over its error and the inverse loses that channel.
TEST(Gptq, IsThePublishedProcedure) {
  const int k = 200, n = 6;  // more than the block of the triangle's inverse, and no power of two
  const Planted p = planted(n, k, 420, 15, 21);
  const SecondMoment moment = moment_of(p);
  const Grid grid = grid_of(nearest(p, p.w, "int4-g128-w4a16"));
  std::vector<std::vector<double>> inverse(k, std::vector<double>(2 * k));  // Gauss-Jordan on [H, 1]
  double diagonal = 0;
  for (int i = 0; i < k; ++i) diagonal += moment.at(i, i) / k;
  for (int i = 0; i < k; ++i) {
    for (int j = 0; j < k; ++j) inverse[i][j] = moment.at(i, j);
    inverse[i][i] += 0.01 * diagonal;
    inverse[i][k + i] = 1;
  }
  for (int i = 0; i < k; ++i) {
    const double pivot = inverse[i][i];
    for (double& v : inverse[i]) v /= pivot;
    for (int r = 0; r < k; ++r)
      if (const double f = inverse[r][i]; r != i)
        for (int j = 0; j < 2 * k; ++j) inverse[r][j] -= f * inverse[i][j];
  }
  std::vector<double> left(p.w.begin(), p.w.end());
  std::vector<float> expected(p.w.size());
  for (int c = 0; c < k; ++c) {
    const double pivot = inverse[c][k + c];
    for (int r = 0; r < n; ++r) {
      expected[r * k + c] = grid.round(grid.at(r, c), static_cast<float>(left[r * k + c]));
      const double error = (left[r * k + c] - static_cast<double>(expected[r * k + c])) / pivot;
      for (int j = c; j < k; ++j) left[r * k + j] -= error * inverse[c][k + j];
    }
    for (int i = c + 1; i < k; ++i) {
      const double f = inverse[i][k + c] / pivot;
      for (int j = c; j < k; ++j) inverse[i][k + j] -= f * inverse[c][k + j];
    }
  }
  const auto w = gptq(grid, p.w, moment, {.order_by_size = false});
  ASSERT_TRUE(w.ok()) << w.status().message();
  int different = 0;  // sums in another order: a value on a rounding boundary may fall to either side
  for (std::size_t i = 0; i < w->size(); ++i) different += (*w)[i] != expected[i];
  EXPECT_LE(different, 2) << "of " << w->size();
  EXPECT_NE(*w, round_to_grid(grid, p.w));
}

TEST(Gptq, WithUncorrelatedInputsIsRoundToNearest) {
  Planted p = planted(8, 64, 0, 1, 15);
  std::vector<double> diagonal(64 * 64);
  for (std::size_t i = 0; i < 64; ++i) diagonal[i * 65] = 1 + static_cast<double>(i);
  const SecondMoment moment = *SecondMoment::restore(64, 100, diagonal);
  const Grid grid = grid_of(nearest(p, p.w, "int8-w8a16"));
  EXPECT_EQ(*gptq(grid, p.w, moment), round_to_grid(grid, p.w));
}

TEST(Gptq, ChannelsThatAreAlwaysZeroAndAllZeroInputs) {
  Planted p = planted(8, 64, 200, 1, 16);
  for (std::size_t i = 7; i < p.x.size(); i += 64) p.x[i] = 0;
  const Grid grid = grid_of(nearest(p, p.w, "int8-w8a16"));
  const auto w = gptq(grid, p.w, moment_of(p));
  ASSERT_TRUE(w.ok());
  for (const float v : *w) EXPECT_TRUE(std::isfinite(v));
  EXPECT_FALSE(gptq(grid, p.w, SecondMoment(64)).ok());
  EXPECT_FALSE(gptq(grid, p.w, SecondMoment(32)).ok());
}

TEST(SecondMoment, OutputErrorIsTheOutputsError) {
  const Planted p = planted(8, 48, 64, 9, 17);
  const std::vector<float> rtn = dequantize(nearest(p, p.w, "nvfp4-w4a16"));
  const double plainly = output_error_plainly(p, p.w, rtn);
  EXPECT_NEAR(output_error(moment_of(p), p.w, rtn) / plainly, 1, 1e-9);
  std::vector<double> lopsided(4 * 4);
  lopsided[1] = 1;
  EXPECT_FALSE(SecondMoment::restore(4, 1, lopsided).ok());
}

// What W8A8 leaves of x Wᵀ: both rounded, the inputs per token.
double w8a8_error(const Planted& p, std::span<const float> multiplier) {
  const std::vector<float> w = divide_columns(p.w, multiplier);
  const QuantizedMatrix m = nearest(p, w, "int8-w8a8");
  std::vector<float> x = p.x;
  for (std::size_t i = 0; i < x.size(); ++i) x[i] *= multiplier[i % multiplier.size()];
  fake_quantize_rows(m.format.input, x.data(), p.inputs, p.cols, p.cols);
  const std::vector<float> rounded = dequantize(m);
  double error = 0, whole = 0;
  for (int i = 0; i < p.inputs; ++i)
    for (int r = 0; r < p.rows; ++r) {
      double a = 0, b = 0;
      for (int c = 0; c < p.cols; ++c) {
        const auto xi = static_cast<std::size_t>(i * p.cols + c),
                   wi = static_cast<std::size_t>(r * p.cols + c);
        a += static_cast<double>(p.x[xi]) * static_cast<double>(p.w[wi]);
        b += static_cast<double>(x[xi]) * static_cast<double>(rounded[wi]);
      }
      error += (a - b) * (a - b);
      whole += a * a;
    }
  return error / whole;
}

std::vector<float> input_amax(const Planted& p) {
  std::vector<float> amax(static_cast<std::size_t>(p.cols));
  raise_column_amax(p.x, amax);
  return amax;
}

// The generator's outliers: chosen channels 2^6 as large, their weights 2^-6 as large, the product the same.
TEST(SmoothQuant, RecoversFunctionPreservingOutliers) {
  Planted p = planted(24, 128, 96, 1, 18);
  const std::vector<float> ones(128, 1.0f);
  const double clean = w8a8_error(p, ones);
  for (std::size_t i = 0; i < p.x.size(); ++i)
    if (i % 128 % 32 == 3) p.x[i] *= 64;
  for (std::size_t i = 0; i < p.w.size(); ++i)
    if (i % 128 % 32 == 3) p.w[i] /= 64;
  const double outliers = w8a8_error(p, ones);
  std::vector<float> weight_amax(128);
  raise_column_amax(p.w, weight_amax);
  const Smoothing s =
      search_smoothquant(input_amax(p), weight_amax, [&](auto m) { return w8a8_error(p, m); });
  const double smoothed = w8a8_error(p, s.input);
  std::printf("relative error: clean %.2e, outliers %.2e, smoothed %.2e (alpha %.2f)\n", clean, outliers,
              smoothed, s.alpha);
  EXPECT_GT(outliers, 100 * clean);
  EXPECT_LT(smoothed, 2 * clean);
  // Rounded to powers of two, folding is exact and hardly worse.
  const Smoothing exact = smoothquant(input_amax(p), weight_amax, 0.5, {}, true);
  for (const float m : exact.input) EXPECT_EQ(std::exp2(std::nearbyint(std::log2(m))), m);
  EXPECT_LT(w8a8_error(p, exact.input), 4 * clean);
}

TEST(Awq, BeatsRoundToNearestOnOutputs) {
  const Planted p = planted(32, 128, 256, 12, 19);
  const SecondMoment moment = moment_of(p);
  std::vector<float> mean(128);
  for (std::size_t i = 0; i < p.x.size(); ++i)
    mean[i % 128] += std::fabs(p.x[i]) / static_cast<float>(p.inputs);
  for (const char* format : {"int4-g128-w4a16", "nvfp4-w4a16"}) {
    const auto loss = [&](std::span<const float> m) {
      std::vector<float> w = dequantize(nearest(p, divide_columns(p.w, m), format));
      for (std::size_t i = 0; i < w.size(); ++i) w[i] *= m[i % m.size()];
      return output_error(moment, p.w, w);
    };
    const Smoothing s = search_awq(mean, loss);
    const double before = loss(std::vector<float>(128, 1.0f)), after = loss(s.input);
    std::printf("%s: output error %.3g of round to nearest at alpha %.2f\n", format, after / before, s.alpha);
    EXPECT_LT(after, 0.8 * before);
    EXPECT_GT(s.alpha, 0);
  }
}

TEST(Smoothing, TiedChannelsShareAMultiplierAndDeadOnesKeepOne) {
  const std::vector<float> x = {8, 1, 2, 0, 32, 1, 1, 1}, w = {1, 1, 1, 1, 1, 1, 0, 1};
  const Tie tie = {0, 1, 2, 3, 0, 1, 6, 7};  // columns 0 and 4, 1 and 5 come from one channel
  const Smoothing s = smoothquant(x, w, 0.5, tie);
  EXPECT_EQ(s.input[0], s.input[4]);
  EXPECT_EQ(s.input[1], s.input[5]);
  EXPECT_EQ(s.input[3], 1);
  EXPECT_EQ(s.input[6], 1);
  EXPECT_LT(s.input[0], s.input[1]);
}

TEST(BiasCorrection, TakesTheMeanErrorOut) {
  Planted p = planted(16, 64, 128, 1, 20);
  for (std::size_t i = 0; i < p.x.size(); ++i)
    p.x[i] += static_cast<float>(i % 64) / 32;  // means that matter
  const std::vector<float> rtn = dequantize(nearest(p, p.w, "int4-g128-sym-w4a16"));
  std::vector<float> mean(64), bias(16);
  for (std::size_t i = 0; i < p.x.size(); ++i) mean[i % 64] += p.x[i] / static_cast<float>(p.inputs);
  correct_bias(p.w, rtn, mean, bias);
  double before = 0, after = 0;
  for (int r = 0; r < p.rows; ++r) {
    double a = 0;
    for (std::size_t i = 0; i < p.x.size(); ++i) {
      const std::size_t at = static_cast<std::size_t>(r) * 64 + i % 64;
      a += static_cast<double>(p.x[i]) * (static_cast<double>(rtn[at]) - static_cast<double>(p.w[at]));
    }
    a /= p.inputs;
    before += a * a;
    after += std::pow(a + static_cast<double>(bias[static_cast<std::size_t>(r)]), 2);
  }
  EXPECT_LT(after, 1e-6 * before);
  // What output_error() says is left is what the corrected outputs lack.
  double left = 0, whole = 0;
  for (int i = 0; i < p.inputs; ++i)
    for (int r = 0; r < p.rows; ++r) {
      double e = static_cast<double>(bias[static_cast<std::size_t>(r)]), y = 0;
      for (int c = 0; c < 64; ++c) {
        const auto at = static_cast<std::size_t>(r * 64 + c);
        const auto x = static_cast<double>(p.x[static_cast<std::size_t>(i * 64 + c)]);
        e += x * (static_cast<double>(rtn[at]) - static_cast<double>(p.w[at]));
        y += x * static_cast<double>(p.w[at]);
      }
      left += e * e;
      whole += y * y;
    }
  const SecondMoment moment = moment_of(p);
  EXPECT_NEAR(output_error(moment, p.w, rtn, mean) * whole / left, 1, 1e-4);
  EXPECT_LT(left, 0.9 * output_error(moment, p.w, rtn) * whole);
}

}  // namespace
}  // namespace servoflow::quant
