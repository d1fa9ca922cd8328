// How sure a percentile is, and whether two sets of timings differ: intervals by resampling, without assuming
// a shape.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace servoflow::toolkit {

// Samples of one round of a measurement; rounds are resampled first, then the samples in them, because what
// slows one sample down (a neighbour, a clock) slows down its round.
using Rounds = std::vector<std::vector<double>>;

struct Interval {
  double low = 0, value = 0, high = 0;  // `value` is the statistic of the samples as they are
};

struct BootstrapOptions {
  double level = 0.95;  // of the interval, in (0, 1)
  int resamples = 2000;
  std::uint64_t seed = 1;
};

// The quantile `share` of all samples, interpolated linearly (NumPy's default); 0 without samples.
double quantile(std::vector<double> samples, double share);

// The percentile bootstrap (Efron 1979) of the quantile `share`.
Interval bootstrap_quantile(const Rounds& rounds, double share, const BootstrapOptions& options = {});
// Of quantile(now) / quantile(before), each resampled by itself.
Interval bootstrap_ratio(const Rounds& now, const Rounds& before, double share,
                         const BootstrapOptions& options = {});

enum class Verdict { kFaster, kSlower, kWithinNoise };
// Slower or faster only if the whole interval of the ratio of times lies beyond 1 by more than `tolerance`.
Verdict judge_ratio(const Interval& ratio, double tolerance);
const char* verdict_text(Verdict verdict);

// Warm-up is over when the medians of the last two windows of `window` samples agree to within `tolerance`.
bool is_steady(std::span<const double> samples, int window = 3, double tolerance = 0.05);

}  // namespace servoflow::toolkit
