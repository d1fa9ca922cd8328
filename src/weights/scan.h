// Looking for NaNs and infinities in the weights a checkpoint would run on.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "servoflow/policy.h"
#include "servoflow/status.h"
#include "weights/checkpoint.h"

namespace servoflow::weights {

struct NonFinite {
  std::string name;  // canonical
  std::uint64_t nans = 0, infinities = 0;
  std::uint64_t first_index = 0;  // row-major index of the first of either
};

// Reads every used tensor once, in parts, and lets its pages go again. Returns the offenders in the network's
// order, empty if all values are finite. `progress` gets bytes, on the calling thread; `threads` 0: one per
// usable core.
Result<std::vector<NonFinite>> scan_weights(const Checkpoint& checkpoint,
                                            const ProgressFunction& progress = {}, int threads = 0);

}  // namespace servoflow::weights
