// The CUDA backend as GPUs before Hopper run it, for tests on a newer one.
#pragma once

#include "ops/backend.h"

namespace servoflow::ops {

// Without warpgroup products, clusters and programmatic launches: mma.sync and the compositions.
Result<std::unique_ptr<Backend>> make_portable_cuda_backend(const std::string& precision, int ordinal);

}  // namespace servoflow::ops
