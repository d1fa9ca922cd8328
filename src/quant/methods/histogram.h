// A histogram of magnitudes that grows with what it meets, and the clipping thresholds derived from it.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "quant/methods/lattice.h"
#include "servoflow/status.h"

namespace servoflow::quant {

// kBins equal bins over [0, limit), limit a power of two: when a larger value comes, bins are merged in
// pairs, which loses nothing but resolution. So the result does not depend on the order of the values, and
// histograms of parts add up to that of the whole. Values that are not finite, or 2^127 and beyond, are
// counted apart and enter nothing else.
class Histogram {
 public:
  static constexpr int kBins = 2048;
  void add(std::span<const float> values);
  void add(const Histogram& other);

  std::uint64_t count() const { return count_; }  // finite ones
  std::uint64_t not_finite() const { return not_finite_; }
  float amax() const { return amax_; }
  float limit() const { return limit_; }  // 0 while nothing but zeros came
  std::span<const std::uint64_t> bins() const { return bins_; }
  // Values at or above `threshold`, to a bin's resolution (rounded down).
  std::uint64_t above(float threshold) const;

  // As stored in a statistics file. Fails for counts that do not belong together.
  static Result<Histogram> restore(std::span<const std::uint64_t> bins, float limit, float amax,
                                   std::uint64_t not_finite);

 private:
  void grow(float to);
  std::vector<std::uint64_t> bins_ = std::vector<std::uint64_t>(kBins);
  std::uint64_t count_ = 0, not_finite_ = 0;
  float limit_ = 0, amax_ = 0;
};

enum class Calibrator {
  kMinMax,      // the largest magnitude
  kPercentile,  // the magnitude that a share of all values stays below
  kMse,         // least squared error after rounding and clipping
  kKl,          // least Kullback-Leibler divergence of the rounded from the original distribution
};
Result<Calibrator> calibrator_named(const std::string& name);  // "minmax" | "percentile" | "mse" | "kl"
std::string_view calibrator_name(Calibrator calibrator);

struct CalibratorOptions {
  Calibrator kind = Calibrator::kMinMax;
  double percentile = 0.9999;  // share of the values, not percent
};

// The magnitude that the format's largest code should stand for; 0 when all values are 0. Fails without
// values, with values that are not finite, and for a percentile that this many values cannot tell apart from
// the maximum.
Result<float> clipping_threshold(const Histogram& histogram, const Lattice& lattice,
                                 const CalibratorOptions& options);
// Mean squared error of rounding the histogram's values to `lattice` scaled so that its largest code is
// `threshold`.
double histogram_mse(const Histogram& histogram, const Lattice& lattice, float threshold);

}  // namespace servoflow::quant
