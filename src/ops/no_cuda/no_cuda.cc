// Linked where the CUDA backend is not built: the same symbols, one clear error.
#include "ops/backend.h"
#include "ops/device_probe.h"

namespace servoflow::ops {

bool cuda_is_built() { return false; }
int cuda_device_count() { return 0; }

Result<std::unique_ptr<Backend>> make_cuda_backend(const std::string&, int) {
  return Status::runtime("--device cuda: this build of servoflow has no CUDA backend; use --device cpu");
}

Result<std::unique_ptr<DeviceProbe>> make_cuda_probe(int) {
  return Status::runtime("--device cuda: this build of servoflow has no CUDA backend; use --device cpu");
}

}  // namespace servoflow::ops
