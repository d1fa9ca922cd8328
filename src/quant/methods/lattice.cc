#include "quant/methods/lattice.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace servoflow::quant {
namespace {

// All non-negative finite values of a format with `mantissa` bits and this bias, by code.
std::vector<float> float_magnitudes(int codes, int mantissa, int bias) {
  std::vector<float> out;
  for (int code = 0; code < codes; ++code) {
    const int exponent = code >> mantissa, fraction = code & ((1 << mantissa) - 1);
    const int significand = exponent > 0 ? fraction + (1 << mantissa) : fraction;
    out.push_back(std::ldexp(static_cast<float>(significand), std::max(exponent, 1) - bias - mantissa));
  }
  return out;
}

}  // namespace

Lattice::Lattice(std::vector<float> magnitudes, bool uniform, float lowest)
    : magnitudes_(std::move(magnitudes)), uniform_(uniform), lowest_(lowest) {}

Lattice Lattice::integer(int bits) {
  std::vector<float> out;
  for (int v = 0; v < 1 << (bits - 1); ++v) out.push_back(static_cast<float>(v));
  return Lattice(std::move(out), true, -static_cast<float>(1 << (bits - 1)));
}
Lattice Lattice::e2m1() { return Lattice(float_magnitudes(8, 1, 1), false, -6.0f); }
Lattice Lattice::e4m3() { return Lattice(float_magnitudes(127, 3, 7), false, -448.0f); }
Lattice Lattice::e5m2() { return Lattice(float_magnitudes(124, 2, 15), false, -57344.0f); }

float Lattice::snap(float x) const {
  if (uniform_) return std::clamp(std::nearbyint(x), lowest_, max());
  const float a = std::fabs(x);
  if (a >= max()) return std::copysign(max(), x);
  const auto above = std::upper_bound(magnitudes_.begin(), magnitudes_.end(), a);
  const auto code = static_cast<std::size_t>(above - magnitudes_.begin()) - 1;
  const float low = magnitudes_[code], high = magnitudes_[code + 1];
  const float middle =
      low + (high - low) * 0.5f;  // exact: neighbours share an exponent or meet at a power of two
  const bool up = a > middle || (a == middle && code % 2 == 1);
  return std::copysign(up ? high : low, x);
}

}  // namespace servoflow::quant
