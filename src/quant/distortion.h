// How far decoded weights are from their originals.
#pragma once

#include <span>

namespace servoflow::quant {

struct Distortion {
  double mse = 0.0;
  double max_error = 0.0;       // largest |difference|
  double snr_db = 0.0;          // 10 log10(Σ x² / Σ d²); infinite without any difference
  double relative_error = 0.0;  // sqrt(Σ d² / Σ x²); 0 when both are zero, infinite when only the original is
  double cosine = 1.0;          // 1 when both are zero
};
// Both spans have as many elements. Sums in binary64.
Distortion distortion(std::span<const float> original, std::span<const float> decoded);

}  // namespace servoflow::quant
