#include "quant/distortion.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <limits>

namespace servoflow::quant {

Distortion distortion(std::span<const float> original, std::span<const float> decoded) {
  assert(original.size() == decoded.size());
  double signal = 0, other = 0, product = 0, noise = 0;
  Distortion d;
  for (std::size_t i = 0; i < original.size(); ++i) {
    const double x = original[i], y = decoded[i];
    signal += x * x;
    other += y * y;
    product += x * y;
    noise += (y - x) * (y - x);
    d.max_error = std::max(d.max_error, std::fabs(y - x));
  }
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  if (!original.empty()) d.mse = noise / static_cast<double>(original.size());
  d.snr_db = noise > 0 ? 10 * std::log10(signal / noise) : kInfinity;
  d.relative_error = noise == 0 ? 0.0 : signal > 0 ? std::sqrt(noise / signal) : kInfinity;
  if (signal > 0 || other > 0) d.cosine = signal > 0 && other > 0 ? product / std::sqrt(signal * other) : 0.0;
  return d;
}

}  // namespace servoflow::quant
