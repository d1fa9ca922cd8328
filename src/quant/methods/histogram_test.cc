#include "quant/methods/histogram.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

namespace servoflow::quant {
namespace {

std::vector<float> normal(std::size_t n, unsigned seed, float sigma = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> draw(0, sigma);
  std::vector<float> out(n);
  for (float& v : out) v = draw(random);
  return out;
}

TEST(Histogram, DoesNotDependOnTheOrderAndPartsAddUp) {
  std::vector<float> values = normal(20000, 1);
  for (std::size_t i = 0; i < values.size(); i += 997) values[i] *= 300;
  Histogram whole, reversed, left, right;
  whole.add(values);
  left.add(std::span(values).first(7001));
  right.add(std::span(values).subspan(7001));
  right.add(left);
  std::reverse(values.begin(), values.end());
  for (const float v : values) reversed.add({&v, 1});
  for (const Histogram* other : {&reversed, &right}) {
    EXPECT_TRUE(std::equal(whole.bins().begin(), whole.bins().end(), other->bins().begin()));
    EXPECT_EQ(whole.limit(), other->limit());
    EXPECT_EQ(whole.amax(), other->amax());
    EXPECT_EQ(other->count(), values.size());
  }
  EXPECT_EQ(whole.above(0), values.size());
  const auto restored = Histogram::restore(whole.bins(), whole.limit(), whole.amax(), whole.not_finite());
  ASSERT_TRUE(restored.ok());
  EXPECT_EQ(restored->count(), whole.count());
}

TEST(Histogram, CountsWhatIsNotFiniteApart) {
  Histogram h;
  const float bad[] = {1, std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity(),
                       std::numeric_limits<float>::max(), 0};
  h.add(bad);
  EXPECT_EQ(h.count(), 2u);
  EXPECT_EQ(h.not_finite(), 3u);
  EXPECT_EQ(h.amax(), 1);
  EXPECT_FALSE(clipping_threshold(h, Lattice::integer(8), {}).ok());
}

// Smaller than any limit for which float32 has the number of bins per unit.
TEST(Histogram, TakesTheSmallestMagnitudes) {
  Histogram h;
  const float tiny[] = {0, std::numeric_limits<float>::denorm_min(), -1e-36f, 1e-38f};
  h.add(tiny);
  EXPECT_EQ(h.count(), 4u);
  EXPECT_EQ(h.bins()[0], 4u);
  EXPECT_EQ(h.amax(), 1e-36f);
  const auto restored = Histogram::restore(h.bins(), h.limit(), h.amax(), 0);
  ASSERT_TRUE(restored.ok()) << restored.status().message();
  h.add({{1.0f}});
  EXPECT_EQ(h.bins()[0], 4u);
  EXPECT_EQ(h.bins()[1024], 1u);
  EXPECT_FALSE(Histogram::restore(h.bins(), 0x1p-101f, 1e-36f, 0).ok());
}

TEST(Histogram, RefusesStoredCountsThatContradict) {
  std::vector<std::uint64_t> bins(Histogram::kBins);
  bins[512] = 1;
  EXPECT_TRUE(Histogram::restore(bins, 4, 1, 0).ok());
  EXPECT_FALSE(Histogram::restore(bins, 4, 1.5f, 0).ok());  // of another bin
  EXPECT_FALSE(Histogram::restore(bins, 4, 0.5f, 0).ok());
  EXPECT_FALSE(Histogram::restore(bins, -4, 1, 0).ok());
  EXPECT_FALSE(Histogram::restore(bins, std::numeric_limits<float>::infinity(), 1, 0).ok());
  EXPECT_FALSE(Histogram::restore(std::vector<std::uint64_t>(Histogram::kBins), 4, 1, 0).ok());  // no values
  EXPECT_FALSE(Histogram::restore(bins, 3, 1, 0).ok());  // not a power of two
  EXPECT_FALSE(Histogram::restore(bins, 4, 4, 0).ok());  // beyond the limit
  EXPECT_FALSE(Histogram::restore(bins, 0, 0, 0).ok());  // a count above zero without a limit
  EXPECT_FALSE(Histogram::restore(std::span(bins).first(7), 4, 1, 0).ok());
  bins[4] = ~std::uint64_t{0};
  EXPECT_FALSE(Histogram::restore(bins, 4, 1, 0).ok());
}

TEST(Calibrator, MinMaxIsTheLargestMagnitude) {
  Histogram h;
  h.add(normal(1000, 2));
  EXPECT_EQ(*clipping_threshold(h, Lattice::integer(8), {}), h.amax());
  Histogram zeros;
  zeros.add(std::vector<float>(10));
  EXPECT_EQ(*clipping_threshold(zeros, Lattice::integer(8), {}), 0);
  EXPECT_FALSE(clipping_threshold({}, Lattice::integer(8), {}).ok());
}

// quantization.md: "p99.9 is meaningless below N~1000 (it interpolates the top two)".
TEST(Calibrator, PercentileNeedsEnoughValues) {
  Histogram few, enough;
  few.add(normal(999, 3));
  enough.add(normal(100000, 3));
  EXPECT_FALSE(clipping_threshold(few, Lattice::integer(8), {Calibrator::kPercentile, 0.999}).ok());
  EXPECT_FALSE(clipping_threshold(enough, Lattice::integer(8), {Calibrator::kPercentile, 99.9}).ok());
  const float p = *clipping_threshold(enough, Lattice::integer(8), {Calibrator::kPercentile, 0.999});
  // |x| of a normal distribution: 3.29 at 99.9 %; a bin is amax / 1024 or finer.
  EXPECT_NEAR(p, 3.29, 0.08);
  EXPECT_LT(p, enough.amax());
}

// The least-squares threshold is the best of all, judged on the values themselves and not on their histogram.
TEST(Calibrator, MseBeatsMinMaxOnPlantedOutliers) {
  std::vector<float> values = normal(50000, 4);
  values[17] = 60;
  for (const Lattice& lattice : {Lattice::integer(8), Lattice::e2m1(), Lattice::integer(4)}) {
    Histogram h;
    h.add(values);
    const float threshold = *clipping_threshold(h, lattice, {Calibrator::kMse});
    const auto error = [&](float t) {
      const float scale = t / lattice.max();
      double sum = 0;
      for (const float v : values)
        sum += std::pow(static_cast<double>(v - scale * lattice.snap(v / scale)), 2);
      return sum;
    };
    EXPECT_LT(threshold, 60);
    EXPECT_LT(error(threshold), 0.8 * error(60));
    EXPECT_NEAR(histogram_mse(h, lattice, threshold) * static_cast<double>(values.size()) / error(threshold),
                1, 0.1);
  }
}

TEST(Calibrator, KlClipsPlantedOutliersAndKeepsAUniformRange) {
  std::vector<float> values = normal(50000, 5);
  values[17] = 100;
  Histogram h;
  h.add(values);
  const float t = *clipping_threshold(h, Lattice::integer(8), {Calibrator::kKl});
  EXPECT_LT(t, 20);
  EXPECT_GT(t, 2);
  std::mt19937 random(6);
  std::uniform_real_distribution<float> draw(-3, 3);
  for (float& v : values) v = draw(random);
  Histogram uniform;
  uniform.add(values);
  EXPECT_GT(*clipping_threshold(uniform, Lattice::integer(8), {Calibrator::kKl}), 2.7);
}

}  // namespace
}  // namespace servoflow::quant
