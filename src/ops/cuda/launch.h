// Launches a kernel so that it may start while its predecessor drains (programmatic dependent launch).
#pragma once

#include <cuda_runtime.h>

#include <utility>

namespace servoflow::ops::cuda {

struct Stream {
  cudaStream_t stream = nullptr;
  bool early_start = false;  // the device and driver know programmatic launches
  int lanes = 1;             // streams that share the device at the moment
};

template <typename... P, typename... A>
cudaError_t launch(const Stream& s, dim3 grid, int threads, std::size_t shared_bytes, void (*kernel)(P...),
                   A&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = s.stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = s.early_start ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, P(std::forward<A>(arguments))...);
}

inline unsigned blocks(std::int64_t items, int per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

}  // namespace servoflow::ops::cuda
