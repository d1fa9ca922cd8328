// The denoise loop as one launch that stays on the GPU (sm_90a): what it is told, and how its work is dealt.
//
// 15 clusters of 8 blocks, one block per processor. All blocks walk through the same sequence of tasks: per
// step an edge (action projections, Euler step), per layer q/k/v, attention, out, gate/up, down. Between
// tasks rows travel through L2 and blocks tell each other by counters; a block's weights stream into a ring
// in shared memory all the while, whatever the tasks wait for.
#pragma once

#include <cuda.h>

#include "ops/cuda/expert.cuh"
#include "ops/cuda/loop_stall.h"

namespace servoflow::ops::cuda {

inline constexpr int kLoopClusters = 15, kLoopRanks = 8, kLoopBlocks = kLoopClusters * kLoopRanks;
inline constexpr int kLoopRows = 56;                            // of one request, in groups of 8
inline constexpr int kLoopKeys = 128;                           // that one block of a cluster can attend to
inline constexpr int kLoopChunkKeys = 32, kLoopSuffixKeys = 8;  // of one copy: the prefix's, the suffix's
inline constexpr int kLoopLayers = 32;

// Keys of a request are dealt to the eight blocks of a cluster: an eighth of the prefix's and an eighth of
// the suffix's each.
__host__ __device__ __forceinline__ int share_of_rank(int keys) {
  return (keys + kLoopRanks - 1) / kLoopRanks;
}

// Element (row, k) of a request's rows between tasks: 256 columns of all rows behind each other, in them
// groups of eight rows in tiles of 8 x 8, so that what a block fetches at a time is one piece.
__device__ __forceinline__ int loop_at(int row, int k) {
  return (k / 256 * (kLoopRows / 8) + row / 8) * 2048 + k % 256 / 8 * 64 + row % 8 * 8 + k % 8;
}

struct ExpertLoop {
  struct Layer {
    const __nv_bfloat16 *qkv, *out, *gate_up, *down;  // in tiles (chunked_at)
  };
  Layer layers[kLoopLayers];
  int depth = 0;
  Segments segments;  // one per request
  DeviceQkv qkv;      // of layer 0; later layers `layer_bytes` further
  std::int64_t layer_bytes = 0;
  CUtensorMap keys, few_keys;  // the whole cache in boxes of 32 keys, and of 8
  std::int64_t side_rows = 0;  // of it, from a layer's keys to its values and on to the next layer's keys
  float scale = 1;             // of the scores
  const float* modulation = nullptr;  // [steps][site][scale, shift, gate][width]
  std::int64_t modulation_pitch = 0;
  const float* shift = nullptr;  // the shifts' products: [steps][depth][qkv | gate and up]
  int first = 0, steps = 0;
  ExpertEdge edge;  // squares and residual are the loop's, too
  // Rows between tasks: kLoopRows of each request, in the order of loop_at().
  __nv_bfloat16 *attended = nullptr, *hidden = nullptr;
  // [requests][kLoopCounters][32], 128 bytes apart, and two more: of blocks that are through, of threads that
  // gave up. All zero between launches.
  unsigned* counters = nullptr;
  LoopStall* stall = nullptr;  // in host memory, for a wait that never ended
};

inline constexpr int kLoopCounterWords = (kLoopRequests * kLoopCounters + 2) * 32;

// True if this device can hold all blocks at once.
bool expert_loop_fits();
cudaError_t expert_loop(const Stream& s, const ExpertLoop& op);

}  // namespace servoflow::ops::cuda
