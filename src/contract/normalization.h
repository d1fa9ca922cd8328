// Scaling between robot units and the policy's normalised units, rounded exactly as the two references round.
//
//   openpi  quantile   n = (x - q01) / (q99 - q01 + 1e-6) * 2 - 1        in float64
//                      x = (n + 1) / 2 * (q99 - q01 + 1e-6) + q01        (n + 1) / 2 in float32, since
//                      actions are
//           mean/std   n = (x - mean) / (std + 1e-6);  x = n * (std + 1e-6) + mean                      in
//           float64
//   lerobot quantile   n = 2 * (x - q01) / gap - 1, x = (n + 1) * gap / 2 + q01, gap = q99 - q01 or 1e-8
//   where that is 0
//           mean/std   n = (x - mean) / (std + 1e-8);  x = n * std + mean                               in
//           float32
//
// Nothing is clipped. Dimensions beyond the statistics pass unchanged.
#pragma once

#include <span>

#include "contract/contract.h"

namespace servoflow::contract {

// How many dimensions have statistics; 0 for the identity.
int statistics_width(const Normalization& normalization);

// Robot units to normalised; both spans have the same length.
void normalize(const Normalization& normalization, std::span<const double> x, std::span<double> normalized);

// Normalised to robot units; `x` may be shorter than `normalized`, whose further columns are then not looked
// at.
void unnormalize(const Normalization& normalization, std::span<const float> normalized, std::span<double> x);

}  // namespace servoflow::contract
