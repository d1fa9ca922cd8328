#include "ops/cuda/expert_loop.cuh"
#include "ops/cuda/expert_loop_attention.cuh"
#include "ops/cuda/expert_loop_fetch.cuh"

namespace servoflow::ops::cuda {
namespace {

using namespace loop;

__global__ void SF_CLUSTER(kLoopRanks) __launch_bounds__(kThreads, 1)
    expert_loop_kernel(const __grid_constant__ ExpertLoop op) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) std::uint8_t shared[];
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  const std::uint32_t base = shared_address(shared);
  const Barriers barriers{base + kBarriers};
  // Segments were uploaded before the first kernel of this inference began.
  const int requests = min(valid(op.segments.count), kLoopRequests);
  auto* segments = reinterpret_cast<Segment*>(shared + kSegments);
  if (thread < requests) segments[thread] = op.segments.device[thread];
  if (thread == 0) {
    for (int i = 0; i < kMostSlots; ++i) {
      barrier_init(barriers.full(i), 1);
      barrier_init(barriers.empty(i), 8);
    }
    for (int i = 0; i < 4; ++i) barrier_init(barriers.rows(i), 1);
    barrier_init(barriers.inverse(), 1);
    barrier_init(barriers.done(), 1);
    barrier_init(barriers.received(), 1);
    barrier_init(barriers.queries(), 1);
    barrier_init(barriers.told(), 1);
    barrier_init(barriers.down_seen(), 1);
    barrier_init(barriers.may_send(), kLoopRanks);
    barriers_ready();
  }
  // What is multiplied by nothing must still be a number.
  for (int i = thread; i < kBarriers / 16; i += kThreads)
    reinterpret_cast<uint4*>(shared)[i] = make_uint4(0, 0, 0, 0);
  fence_async();
  __syncthreads();
  cluster_sync();
  if (thread >= kCompute) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    Fetcher fetcher{.op = op,
                    .segments = segments,
                    .barriers = barriers,
                    .base = base,
                    .requests = requests,
                    .block = block,
                    .cluster = block / kLoopRanks,
                    .rank = block % kLoopRanks,
                    .lane = thread % 32,
                    .ring = Ring(block),
                    .behind = Ring(block)};
    if (thread < kCompute + 32) {
      fetcher.weights();
    } else if (thread < kCompute + 64) {
      fetcher.rows(reinterpret_cast<float*>(shared + kInverse));
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    Computer computer(op, segments, shared, barriers, base, requests, block, thread);
    computer.run();
    // The last block leaves the counters as it found them.
    if (thread == 0) {
      unsigned* blocks = op.counters + kLoopRequests * kLoopCounters * 32;
      __threadfence();
      if (atomicAdd(blocks, 1u) == kLoopBlocks - 1) {
        for (int i = 0; i < requests * kLoopCounters; ++i) op.counters[i * 32] = 0;
        *blocks = 0;
      }
    }
  }
  __syncwarp();
  cluster_arrive();  // nobody leaves while the others may still send here
  cluster_wait();
#endif
}

cudaError_t prepare() {
  return cudaFuncSetAttribute(expert_loop_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
}

}  // namespace

bool expert_loop_fits() {
  cudaFuncAttributes attributes{};
  if (cudaFuncGetAttributes(&attributes, expert_loop_kernel) != cudaSuccess ||
      attributes.binaryVersion != 90 || prepare() != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kLoopBlocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {kLoopRanks, 1, 1};
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  const bool known = cudaOccupancyMaxActiveClusters(&clusters, expert_loop_kernel, &config) == cudaSuccess;
  cudaGetLastError();
  return known && clusters >= kLoopClusters;
}

cudaError_t expert_loop(const Stream& s, const ExpertLoop& op) {
  if (const cudaError_t e = prepare(); e != cudaSuccess) return e;
  return launch(s, dim3(kLoopBlocks), kThreads, kSharedBytes, expert_loop_kernel, op);
}

}  // namespace servoflow::ops::cuda
