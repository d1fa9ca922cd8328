// The text of the kernel that ships, with its points and counts defined (expert_loop_parts.cuh).
#include "ops/cuda/loop_stall.h"
#include "ops/cuda/loop_trouble.h"

namespace servoflow::ops::cuda::loop {

struct DeviceTrouble {
  unsigned seed;
  int silent_block, first, end;
  unsigned from;
  const unsigned* counters;
};
__constant__ DeviceTrouble in_trouble;

__device__ __forceinline__ unsigned mixed(unsigned h) {
  h = (h ^ (h >> 16)) * 0x7feb352du;
  h = (h ^ (h >> 15)) * 0x846ca68bu;
  return h ^ (h >> 16);
}

template <int kPoint>
__device__ __forceinline__ void point() {
  constexpr unsigned kMostCycles = 40000;  // 20 µs
  const unsigned seed = in_trouble.seed;
  if (seed == 0) return;
  const unsigned who = mixed(seed + mixed(blockIdx.x * 512 + threadIdx.x / 32 * 16 + kPoint));
  if (who % 4 != 0) return;
  const unsigned begin = static_cast<unsigned>(clock64()), cycles = mixed(who ^ begin) % kMostCycles;
  while (static_cast<unsigned>(clock64()) - begin < cycles) {
  }
}

__device__ __forceinline__ bool counts(const unsigned* at) {
  const DeviceTrouble& t = in_trouble;
  if (static_cast<int>(blockIdx.x) != t.silent_block) return true;
  const int which = static_cast<int>((at - t.counters) / 32) % kLoopCounters;
  return which < t.first || which >= t.end || *static_cast<const volatile unsigned*>(at) < t.from;
}

}  // namespace servoflow::ops::cuda::loop

#define SF_LOOP_POINT(kind) point<kind>()
#define SF_LOOP_COUNTS(at) counts(at)
#define expert_loop expert_loop_in_trouble
#define expert_loop_fits expert_loop_in_trouble_fits
#include "ops/cuda/expert_loop.cu"
#undef expert_loop
#undef expert_loop_fits

#include "ops/cuda/cuda_backend.cuh"

namespace servoflow::ops::cuda {
namespace {

LoopTrouble wanted;
int launches = 0;

cudaError_t launch_in_trouble(const Stream& s, const ExpertLoop& op) {
  ++launches;
  const DeviceTrouble now{wanted.seed, wanted.silent_block, wanted.first,
                          wanted.end,  wanted.from,         op.counters};
  if (const cudaError_t e =
          cudaMemcpyToSymbolAsync(in_trouble, &now, sizeof(now), 0, cudaMemcpyHostToDevice, s.stream);
      e != cudaSuccess)
    return e;
  return expert_loop_in_trouble(s, op);
}

}  // namespace

bool trouble_loop(Backend& backend, const LoopTrouble& trouble) {
  wanted = trouble;
  return expert_loop_in_trouble_fits() &&
         static_cast<CudaBackend&>(backend).launch_loop_by(launch_in_trouble);
}

void undo_trouble(Backend& backend) { static_cast<CudaBackend&>(backend).launch_loop_by(nullptr); }

int troubled_launches() { return launches; }

}  // namespace servoflow::ops::cuda
