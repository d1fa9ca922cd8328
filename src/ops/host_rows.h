// Host-side pieces that backends share: reading weight rows of any stored dtype, and the time features.
#pragma once

#include <span>

#include "ops/backend.h"

namespace servoflow::ops {

// The parts of one packed weight agree in width, hold as many bytes as their shape needs, and suit the mode.
Status check_parts(std::span<const HostMatrix> parts, const PackOptions& options);
// Row `r` as float32 into out [cols]. NaN or Inf is an error naming the tensor and the element.
Status read_row(const HostMatrix& part, int r, float* out);
// The letterbox operation, plainly.
void letterbox_rows(const Letterbox& op, int pictures);
// Value `i` of a patch row, as a value or in parts.
void put_patch_value(const PatchRows& op, std::int64_t row, int i, float value);
// Row `r` of a float32 or bfloat16 matrix, times `scale`, into out [cols].
void scale_row(const Matrix& x, std::int64_t r, float scale, float* out);
// [sin(2π t / period_i)…, cos(…)…] with period_i = min · (max / min)^(i / (width/2 - 1)), float64 inside.
void time_features(float t, int width, double min_period, double max_period, float* out);

}  // namespace servoflow::ops
