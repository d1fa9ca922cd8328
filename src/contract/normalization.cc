#include "contract/normalization.h"

#include <algorithm>

namespace servoflow::contract {
namespace {

constexpr double kOpenpiEpsilon = 1e-6;
constexpr float kLerobotEpsilon = 1e-8f;

float lerobot_gap(const Statistics& stats, std::size_t i) {
  const float gap = static_cast<float>(stats.q99[i]) - static_cast<float>(stats.q01[i]);
  return gap == 0.0f ? kLerobotEpsilon : gap;
}

}  // namespace

int statistics_width(const Normalization& normalization) {
  const Statistics& stats = normalization.stats;
  switch (normalization.kind) {
    case NormKind::kIdentity:
      return 0;
    case NormKind::kQuantile:
      return static_cast<int>(std::min(stats.q01.size(), stats.q99.size()));
    case NormKind::kMeanStd:
      return static_cast<int>(std::min(stats.mean.size(), stats.std.size()));
  }
  return 0;
}

void normalize(const Normalization& normalization, std::span<const double> x, std::span<double> normalized) {
  const Statistics& s = normalization.stats;
  const std::size_t known = std::min<std::size_t>(x.size(), statistics_width(normalization));
  const bool quantile = normalization.kind == NormKind::kQuantile;
  if (normalization.style == NormStyle::kOpenpi) {
    for (std::size_t i = 0; i < known; ++i) {
      normalized[i] = quantile ? (x[i] - s.q01[i]) / (s.q99[i] - s.q01[i] + kOpenpiEpsilon) * 2.0 - 1.0
                               : (x[i] - s.mean[i]) / (s.std[i] + kOpenpiEpsilon);
    }
    for (std::size_t i = known; i < x.size(); ++i) normalized[i] = x[i];
    return;
  }
  for (std::size_t i = 0; i < x.size(); ++i) {
    const float value = static_cast<float>(x[i]);
    if (i >= known) {
      normalized[i] = value;
    } else if (quantile) {
      normalized[i] = 2.0f * (value - static_cast<float>(s.q01[i])) / lerobot_gap(s, i) - 1.0f;
    } else {
      normalized[i] =
          (value - static_cast<float>(s.mean[i])) / (static_cast<float>(s.std[i]) + kLerobotEpsilon);
    }
  }
}

void unnormalize(const Normalization& normalization, std::span<const float> normalized, std::span<double> x) {
  const Statistics& s = normalization.stats;
  const std::size_t known = std::min<std::size_t>(x.size(), statistics_width(normalization));
  const bool quantile = normalization.kind == NormKind::kQuantile;
  for (std::size_t i = 0; i < known; ++i) {
    const float n = normalized[i];
    if (normalization.style == NormStyle::kOpenpi) {
      x[i] = quantile
                 ? static_cast<double>((n + 1.0f) / 2.0f) * (s.q99[i] - s.q01[i] + kOpenpiEpsilon) + s.q01[i]
                 : n * (s.std[i] + kOpenpiEpsilon) + s.mean[i];
    } else {
      x[i] = quantile ? (n + 1.0f) * lerobot_gap(s, i) / 2.0f + static_cast<float>(s.q01[i])
                      : n * static_cast<float>(s.std[i]) + static_cast<float>(s.mean[i]);
    }
  }
  for (std::size_t i = known; i < x.size(); ++i) x[i] = normalized[i];
}

}  // namespace servoflow::contract
