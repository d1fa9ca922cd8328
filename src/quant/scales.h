// How scales follow from extremes: the formulas of compressed-tensors and ModelOpt.
#pragma once

#include <cstdint>

#include "quant/formats.h"
#include "quant/matrix.h"

namespace servoflow::quant {

// The nearest value of the scale code, as its bits in the low bytes. Floats round to nearest even; E4M3
// saturates at 448; E8M0 takes the power of two at or below.
std::uint32_t encode_scale(ScaleCode code, float value);
float decode_scale(ScaleCode code, std::uint32_t bits);

// E8M0 code for a group whose largest magnitude is `amax`. compressed-tensors: amax rounded to the power of
// two below, or above from a mantissa of 1.75, divided by 4 (FP4) or 256 (FP8). ModelOpt: the smallest power
// of two that is at least amax / 6 or amax / 448. A group of zeros gives 0.
std::uint8_t mx_scale(Code code, float amax, Convention convention);

struct ScalePair {
  float scale = 1.0f;  // exact in the format's scale code
  int zero_point = 0;
};
// `low` <= 0 <= `high` are the extremes of the elements that share the scale. `file_global_scale` is the
// second level in the convention's own direction: compressed-tensors multiplies by it, ModelOpt divides. 1
// without a second level.
ScalePair scale_from_extremes(const WeightFormat& format, float low, float high, Convention convention,
                              float file_global_scale);

}  // namespace servoflow::quant
