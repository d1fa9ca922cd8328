#include "quant/methods/histogram.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <utility>

namespace servoflow::quant {
namespace {
constexpr float kBeyond = 0x1p127f;   // the largest limit
constexpr int kLeastExponent = -100;  // of the smallest: kBins over it has to be a float32

std::string number(float v) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.9g", static_cast<double>(v));
  return text;
}
}  // namespace

void Histogram::grow(float to) {
  if (limit_ == 0) {  // so far only zeros, which lie in the first bin whatever the limit is
    limit_ = std::ldexp(1.0f, std::max(kLeastExponent, std::ilogb(to) + 1));
    return;
  }
  while (limit_ <= to) {
    for (int i = 0; i < kBins / 2; ++i) {
      const auto k = static_cast<std::size_t>(i);
      bins_[k] = bins_[2 * k] + bins_[2 * k + 1];
    }
    std::fill(bins_.begin() + kBins / 2, bins_.end(), 0);
    limit_ *= 2;
  }
}

void Histogram::add(std::span<const float> values) {
  float most = amax_;
  for (const float v : values) {
    const float a = std::fabs(v);
    if (a > most && a < kBeyond) most = a;
  }
  if (most > amax_) {
    amax_ = most;
    if (limit_ <= most) grow(most);
  }
  const float per_bin = limit_ > 0 ? static_cast<float>(kBins) / limit_ : 0;
  for (const float v : values) {
    if (!(std::fabs(v) < kBeyond)) {
      ++not_finite_;
      continue;
    }
    const auto bin = static_cast<std::size_t>(std::fabs(v) * per_bin);
    ++bins_[std::min<std::size_t>(bin, kBins - 1)];
    ++count_;
  }
}

void Histogram::add(const Histogram& other) {
  not_finite_ += other.not_finite_;
  if (other.count_ == 0) return;
  Histogram theirs = other;
  if (limit_ == 0) limit_ = theirs.limit_;
  if (theirs.limit_ == 0) theirs.limit_ = limit_;
  if (theirs.limit_ > limit_) grow(std::nextafter(theirs.limit_, 0.0f));
  if (limit_ > theirs.limit_) theirs.grow(std::nextafter(limit_, 0.0f));
  for (std::size_t i = 0; i < kBins; ++i) bins_[i] += theirs.bins_[i];
  count_ += theirs.count_;
  amax_ = std::max(amax_, theirs.amax_);
}

std::uint64_t Histogram::above(float threshold) const {
  if (limit_ == 0) return threshold <= 0 ? count_ : 0;
  const double first = std::ceil(static_cast<double>(threshold) / limit_ * kBins);
  std::uint64_t out = 0;
  for (double i = std::max(0.0, first); i < kBins; ++i) out += bins_[static_cast<std::size_t>(i)];
  return out;
}

Result<Histogram> Histogram::restore(std::span<const std::uint64_t> bins, float limit, float amax,
                                     std::uint64_t not_finite) {
  int exponent = 0;
  const bool power = limit == 0 || (limit >= std::ldexp(1.0f, kLeastExponent) && limit <= kBeyond &&
                                    std::frexp(limit, &exponent) == 0.5f);
  if (bins.size() != kBins || !power || !(amax >= 0) || !std::isfinite(amax) ||
      (limit > 0 ? amax >= limit : amax > 0))
    return Status::invalid("histogram: " + std::to_string(bins.size()) + " bins, limit " + number(limit) +
                           " and largest magnitude " + number(amax) + " do not belong together");
  Histogram out;
  out.bins_.assign(bins.begin(), bins.end());
  for (const std::uint64_t n : bins) {
    if (n > (std::uint64_t{1} << 62) - out.count_) return Status::invalid("histogram: counts overflow");
    out.count_ += n;
  }
  std::size_t last = kBins;  // that holds values; kBins: none does
  for (std::size_t i = 0; i < kBins; ++i)
    if (bins[i] != 0) last = i;
  if (limit == 0 && last != 0 && last != kBins)
    return Status::invalid("histogram: counts above a limit of 0");
  // Bins are powers of two apart and merged in pairs, so that this is exact.
  const float per_bin = limit > 0 ? static_cast<float>(kBins) / limit : 0;
  if (limit > 0 && static_cast<std::size_t>(amax * per_bin) != last)
    return Status::invalid("histogram: the last bin with values is " + std::to_string(last) +
                           ", the largest magnitude " + number(amax) + " of a limit of " + number(limit) +
                           " belongs into another");
  out.limit_ = limit;
  out.amax_ = amax;
  out.not_finite_ = not_finite;
  return out;
}

namespace {

constexpr std::pair<Calibrator, std::string_view> kCalibrators[] = {{Calibrator::kMinMax, "minmax"},
                                                                    {Calibrator::kPercentile, "percentile"},
                                                                    {Calibrator::kMse, "mse"},
                                                                    {Calibrator::kKl, "kl"}};

}  // namespace

Result<Calibrator> calibrator_named(const std::string& name) {
  for (const auto& [calibrator, known] : kCalibrators)
    if (name == known) return calibrator;
  return Status::invalid("calibrator: \"" + name + "\" is not known; choose minmax, percentile, mse or kl");
}

std::string_view calibrator_name(Calibrator calibrator) {
  for (const auto& [known, name] : kCalibrators)
    if (calibrator == known) return name;
  return "";
}

namespace {

double center(const Histogram& h, std::size_t bin) {
  const double width = static_cast<double>(h.limit()) / Histogram::kBins;
  return std::min((static_cast<double>(bin) + 0.5) * width, static_cast<double>(h.amax()));
}

float percentile(const Histogram& h, double share) {
  const double wanted = share * static_cast<double>(h.count());
  double seen = 0;
  for (std::size_t i = 0; i < Histogram::kBins; ++i) {
    seen += static_cast<double>(h.bins()[i]);
    if (seen >= wanted)
      return std::min(h.amax(),
                      static_cast<float>(static_cast<double>(i + 1) * h.limit() / Histogram::kBins));
  }
  return h.amax();
}

// As in NVIDIA's published entropy calibration, for any lattice: the part below the threshold, its last bin
// holding what is clipped, against the same mass spread evenly over the bins that share a code.
double divergence(const Histogram& h, const Lattice& lattice, std::size_t kept) {
  std::vector<double> reference(kept);
  double total = 0;
  for (std::size_t i = 0; i < Histogram::kBins; ++i) {
    const auto n = static_cast<double>(h.bins()[i]);
    reference[std::min(i, kept - 1)] += n;
    total += n;
  }
  const double scale = static_cast<double>(kept) / static_cast<double>(lattice.max());  // bins per unit
  std::vector<double> coarse(kept);
  for (std::size_t begin = 0; begin < kept;) {
    const float code = lattice.snap(static_cast<float>((static_cast<double>(begin) + 0.5) / scale));
    std::size_t end = begin;
    double mass = 0;
    int occupied = 0;
    while (end < kept && lattice.snap(static_cast<float>((static_cast<double>(end) + 0.5) / scale)) == code) {
      const auto n = static_cast<double>(h.bins()[end]);  // what is clipped is not there to be spread
      mass += n;
      occupied += reference[end] > 0;
      ++end;
    }
    for (std::size_t i = begin; i < end; ++i)
      if (reference[i] > 0) coarse[i] = mass / occupied;
    begin = end;
  }
  double mass = 0;
  for (const double c : coarse) mass += c;
  if (mass <= 0) return std::numeric_limits<double>::infinity();
  double out = 0;
  for (std::size_t i = 0; i < kept; ++i) {
    if (reference[i] <= 0) continue;
    const double p = reference[i] / total, q = std::max(coarse[i] / mass, 1e-12);
    out += p * std::log(p / q);
  }
  return out;
}

}  // namespace

double histogram_mse(const Histogram& h, const Lattice& lattice, float threshold) {
  if (h.count() == 0 || threshold <= 0) return 0;
  const double scale = static_cast<double>(threshold) / lattice.max();
  double sum = 0;
  for (std::size_t i = 0; i < Histogram::kBins; ++i) {
    if (h.bins()[i] == 0) continue;
    const double x = center(h, i);
    const double error = x - scale * static_cast<double>(lattice.snap(static_cast<float>(x / scale)));
    sum += error * error * static_cast<double>(h.bins()[i]);
  }
  return sum / static_cast<double>(h.count());
}

Result<float> clipping_threshold(const Histogram& h, const Lattice& lattice,
                                 const CalibratorOptions& options) {
  if (h.not_finite() > 0)
    return Status::invalid("calibration: " + std::to_string(h.not_finite()) + " values are not finite");
  if (h.count() == 0) return Status::invalid("calibration: no values were seen");
  if (h.amax() == 0) return 0.0f;
  switch (options.kind) {
    case Calibrator::kMinMax:
      return h.amax();
    case Calibrator::kPercentile: {
      if (!(options.percentile > 0 && options.percentile < 1))
        return Status::invalid("calibration: percentile " + std::to_string(options.percentile) +
                               " is not between 0 and 1 (it is a share: 0.9999, not 99.99)");
      // Below this the percentile lies between the two largest values: it would be the maximum in disguise.
      const double needed = 1 / (1 - options.percentile);
      if (static_cast<double>(h.count()) < needed)
        return Status::invalid("calibration: percentile " + std::to_string(options.percentile) + " needs " +
                               std::to_string(static_cast<std::uint64_t>(std::ceil(needed))) +
                               " values, there are " + std::to_string(h.count()) +
                               "; record more, or use minmax");
      return percentile(h, options.percentile);
    }
    case Calibrator::kMse: {
      float best = h.amax();
      double least = histogram_mse(h, lattice, best);
      for (int i = 127; i >= 8; --i) {
        const float threshold = h.amax() * static_cast<float>(i) / 128.0f;
        if (const double error = histogram_mse(h, lattice, threshold); error < least) {
          least = error;
          best = threshold;
        }
      }
      return best;
    }
    case Calibrator::kKl: {
      std::size_t top = Histogram::kBins;
      while (top > 1 && h.bins()[top - 1] == 0) --top;
      const std::size_t fewest = std::min(top, std::max<std::size_t>(64, lattice.magnitudes().size()));
      std::size_t best = top;
      double least = divergence(h, lattice, top);
      for (std::size_t kept = fewest; kept < top; kept += std::max<std::size_t>(1, top / 256))
        if (const double d = divergence(h, lattice, kept); d < least) {
          least = d;
          best = kept;
        }
      if (best == top) return h.amax();
      return static_cast<float>(static_cast<double>(best) * h.limit() / Histogram::kBins);
    }
  }
  return h.amax();
}

}  // namespace servoflow::quant
