// The CUDA backend with less than this GPU can do, for tests and comparisons.
#pragma once

#include "ops/backend.h"

namespace servoflow::ops {

enum class CudaPath : std::uint8_t {
  kBest,
  kKernels,   // the denoise loop as kernels, several per layer
  kPortable,  // as GPUs before Hopper: no warpgroup products, clusters and programmatic launches;
              // compositions
};
Result<std::unique_ptr<Backend>> make_cuda_backend(const std::string& precision, int ordinal, CudaPath path);

}  // namespace servoflow::ops
