// Synthetic weights made where they are used, to the bits of the host's generator.
#include <algorithm>

#include "ops/cuda/kernels.h"

namespace servoflow::ops::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void sequence_kernel(Sequence s, std::uint64_t first, std::uint64_t count, bool f32, void* to) {
  const std::uint64_t stride = static_cast<std::uint64_t>(gridDim.x) * kThreads;
  for (std::uint64_t i = static_cast<std::uint64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += stride) {
    std::uint64_t z = s.state + (first + i + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    const float u = static_cast<float>(static_cast<std::int32_t>(z >> 40)) * 0x1p-24f;
    const float v = __fadd_rn(s.offset, __fmul_rn(s.amp, __fsub_rn(__fmul_rn(u, 2.0f), 1.0f)));
    store_element(to, f32, static_cast<std::int64_t>(i), v);
  }
}

__global__ void nothing() {}

}  // namespace

cudaError_t start_chain(const Stream& s) {
  nothing<<<1, 32, 0, s.stream>>>();
  return cudaGetLastError();
}

cudaError_t fill_sequence(cudaStream_t stream, const Sequence& sequence, std::uint64_t first,
                          std::uint64_t count, DType dtype, void* to) {
  const auto grid = static_cast<unsigned>(std::min<std::uint64_t>((count + kThreads - 1) / kThreads, 8192));
  sequence_kernel<<<grid, kThreads, 0, stream>>>(sequence, first, count, dtype == DType::kF32, to);
  return cudaGetLastError();
}

}  // namespace servoflow::ops::cuda
