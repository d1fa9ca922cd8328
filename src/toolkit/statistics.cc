#include "toolkit/statistics.h"

#include <algorithm>
#include <cmath>

namespace servoflow::toolkit {

Distribution describe(std::vector<double> samples) {
  Distribution d;
  d.samples = std::move(samples);
  if (d.samples.empty()) return d;
  std::vector<double> sorted = d.samples;
  std::sort(sorted.begin(), sorted.end());
  const auto n = static_cast<double>(sorted.size());
  const auto percentile = [&](double share) {
    const double at = share * (n - 1);
    const auto low = static_cast<std::size_t>(at);
    const std::size_t high = std::min(low + 1, sorted.size() - 1);
    return sorted[low] + (sorted[high] - sorted[low]) * (at - static_cast<double>(low));
  };
  d.min = sorted.front();
  d.p50 = percentile(0.50);
  d.p95 = percentile(0.95);
  d.p99 = percentile(0.99);
  for (double x : sorted) d.mean += x / n;
  double square = 0;
  for (double x : sorted) square += (x - d.mean) * (x - d.mean);
  d.std = sorted.size() > 1 ? std::sqrt(square / (n - 1)) : 0;
  return d;
}

Json distribution_to_json(const Distribution& d) {
  return {{"min", d.min}, {"p50", d.p50}, {"mean", d.mean},      {"std", d.std},
          {"p95", d.p95}, {"p99", d.p99}, {"samples", d.samples}};
}

}  // namespace servoflow::toolkit
