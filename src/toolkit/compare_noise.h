// What noise of a format's own power would do to a policy: the bounds of `compare --gates noise`.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "quant/formats.h"
#include "toolkit/compare.h"
#include "toolkit/compare_gates.h"
#include "toolkit/compare_tensors.h"

namespace servoflow::toolkit {

// Velocities and actions of A, case by case: what a third run is held against.
struct CaseVelocities {
  std::vector<std::vector<float>> steps;
  std::vector<float> normalized;
};

// Power of the noise that the formats put into each layer's product: that of the weights, and that of the
// inputs as A had them in the first case.
Result<std::map<std::string, double>> noise_powers(const weights::WeightSource& source, const KeepingTap& tap,
                                                   const std::map<std::string, quant::LinearFormat>& formats);

// What Gaussian noise of these powers does to A's velocities and actions, pooled over all cases and a few
// draws: a single case's worst is too much a matter of luck.
Result<std::vector<Bound>> noise_bounds(const CompareOptions& options, const weights::Checkpoint& checkpoint,
                                        const std::vector<CaseFile>& cases,
                                        const std::vector<CaseVelocities>& originals,
                                        const std::map<std::string, double>& powers);

}  // namespace servoflow::toolkit
