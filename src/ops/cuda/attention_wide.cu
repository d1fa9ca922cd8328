// Attention of 256-wide heads that share one key/value head, on Hopper's warpgroup instructions: the prefix.
// A cluster of two blocks takes 128 rows and each of its blocks half the keys; what they have is joined at
// the end. In a block two warpgroups hold 64 rows each, one of them a little ahead; one warp fetches 80 keys
// or values at a time. The code is one loop on purpose: what runs once runs at the pace of the instruction
// cache. The warpgroup ahead hands its sums to the other block and the one behind finishes its rows with what
// it gets.
#include "ops/cuda/attention_wgmma.cuh"
#include "ops/cuda/kernels.h"
#include "ops/cuda/tensor_map.h"

namespace servoflow::ops::cuda {
namespace {

constexpr int kDim = 256, kRows = 128, kThreads = 384;
constexpr int kUnit = 16, kBlockUnits = 5, kBlockKeys = kUnit * kBlockUnits;  // the softmax's steps
constexpr int kBox = kBlockKeys * 128, kStage = 4 * kBox, kQueryBox = 64 * 128;
constexpr int kQueryBytes = kRows * kDim * 2, kHandedBytes = (32 + 1) * 128 * 16;
constexpr int kSharedBytes = kQueryBytes + 4 * kStage + 128 * 16 + 16 * 8;
static_assert(kSharedBytes <= 227 * 1024 && 2 * kStage >= 4 * 16384);

struct Maps {
  CUtensorMap q;  // boxes of 64 rows by 64 columns
  CUtensorMap k;  // of 80 by 64
  CUtensorMap v;
};

// The keys of one block, 16 at a time; the first block takes the odd one.
struct Share {
  int first_key = 0, units = 0;
  __device__ __forceinline__ Share(int count, int half) {
    const int all = (count + kUnit - 1) / kUnit, first = (all + 1) / 2;
    first_key = half == 0 ? 0 : first * kUnit;
    units = half == 0 ? first : all - first;
  }
  __device__ __forceinline__ int blocks() const { return (units + kBlockUnits - 1) / kBlockUnits; }
};

// 64 rows of a warpgroup.
struct Rows {
  int thread = 0;
  float factor = 0;
  float s[8 * kBlockUnits], o[128];
  std::uint32_t p[4 * kBlockUnits];
  float most[2] = {-1e30f, -1e30f}, total[2] = {}, shrink[2] = {1, 1};

  __device__ __forceinline__ void score(int c, std::uint32_t q, std::uint32_t keys) {
    const std::uint64_t a = tile_descriptor(q + c * kQueryBox), b = tile_descriptor(keys + c * kBox);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (c == 0 && k == 0) {
        wgmma_first<kBlockKeys>(s, a, b);
      } else {
        wgmma<kBlockKeys>(s, a + 2 * k, b + 2 * k);
      }
    }
  }
  __device__ __forceinline__ void value(int unit, std::uint32_t values) {
    wgmma_values(o, p + 4 * unit, descriptor(values, kBox, 1024, 1) + unit * (2048 >> 4));
  }
  // Scores to weights, which stay in s. The largest score that weights are relative to moves only when it has
  // to: up to 2^8 nothing is lost in float32. `left`: how many of these keys are present.
  __device__ __forceinline__ bool soften(int left) {
    constexpr int kScores = 8 * kBlockUnits;
    if (left < kBlockKeys) {
      const int limit = left - thread % 4 * 2;
#pragma unroll
      for (int i = 0; i < kScores; ++i)
        if (i / 4 * 8 + i % 2 >= limit) s[i] = -INFINITY;
    }
    float now[2] = {s[0], s[2]}, by[2] = {factor, factor};
#pragma unroll
    for (int i = 0; i < kScores; ++i) now[i / 2 % 2] = fmaxf(now[i / 2 % 2], s[i]);
    bool moves = false, huge = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      now[r] = fmaxf(now[r], __shfl_xor_sync(~0u, now[r], 1));
      now[r] = fmaxf(now[r], __shfl_xor_sync(~0u, now[r], 2)) * factor;
      const bool higher = now[r] > most[r] + 8;
      const float next = higher ? now[r] : most[r];
      shrink[r] = exp2_fast(most[r] - next);
      most[r] = next;
      total[r] *= shrink[r];
      moves |= higher;
      huge |= fabsf(now[r]) > 1e6f;
    }
    if (__any_sync(~0u, huge)) {  // where the difference below would be the rounding of its first product
#pragma unroll
      for (int r = 0; r < 2; ++r) by[r] = fabsf(now[r]) > 1e6f ? 1 : factor;
#pragma unroll
      for (int i = 0; i < kScores; ++i)
        if (fabsf(now[i / 2 % 2]) > 1e6f) s[i] *= factor;
    }
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      s[i] = exp2_fast(fmaf(s[i], by[i / 2 % 2], -most[i / 2 % 2]));
      total[i / 2 % 2] += s[i];
    }
    return __any_sync(~0u, moves);
  }
  // When no product reads p or adds to o any more.
  __device__ __forceinline__ void take_weights(bool moves) {
#pragma unroll
    for (int i = 0; i < 4 * kBlockUnits; ++i) p[i] = pack_bf16(s[2 * i], s[2 * i + 1]);
    if (moves) {
#pragma unroll
      for (int i = 0; i < 128; ++i) o[i] *= shrink[i / 2 % 2];
    }
  }
};

template <bool kStagger>
__global__ void SF_CLUSTER(2) __launch_bounds__(kThreads, 1)
    attention_wide_kernel(const __grid_constant__ DeviceAttention op, const __grid_constant__ Maps maps) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) std::uint8_t memory[];
  // Stages 0 and 1 hold keys, 2 and 3 values.
  const std::uint32_t q = shared_address(memory), ring = q + kQueryBytes, sums = ring + 4 * kStage,
                      full = sums + 128 * 16, empty = full + 4 * 8, begun = empty + 4 * 8,
                      landed = begun + 4 * 8, received = landed + 8, ready = received + 8,
                      drained = ready + 8;
  const int thread = static_cast<int>(threadIdx.x), group = thread / 128;
  const Segment segment = op.segments.device[blockIdx.z];
  const int segments = valid(op.segments.count);
  if (thread == 0) {
    for (int i = 0; i < 4; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, 2);
      barrier_init(begun + 8 * i, 1);
    }
    barrier_init(landed, 1);
    barrier_init(received, 1);
    barrier_init(ready, 8);
    barrier_init(drained, 4);
    barriers_ready();
    barrier_expect(received, kHandedBytes);
  } else if (thread == 64) {
    prefetch_map(&maps.q);
    prefetch_map(&maps.k);
    prefetch_map(&maps.v);
  }
  const int half = static_cast<int>(cluster_rank());
  const int heads = op.heads, rows = segment.rows * heads, count = segment.past + segment.rows;
  const int row0 = static_cast<int>(blockIdx.x) / 2 * kRows;
  if (static_cast<int>(blockIdx.z) >= segments || row0 >= rows) return;
  cluster_arrive_relaxed();
  cluster_wait();
  release_successor();
  wait_for_inputs();
  const Share keys(count, half);
  const int blocks = keys.blocks();

  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (thread < 32) {
      const int first_row = segment.slot * op.keys + keys.first_key;
      const auto load = [&](int stage, int turn, const void* map, int row, std::uint32_t barrier) {
        barrier_wait(empty + 8 * stage, turn ^ 1);  // a fresh barrier's previous phase counts as done
        if (thread == 0) {
          barrier_expect(barrier, kStage);
          for (int c = 0; c < 4; ++c)
            tensor_load(ring + stage * kStage + c * kBox, map, c * 64, row, barrier);
        }
        __syncwarp();
      };
      for (int block = 0; block < blocks; ++block) {
        const int stage = block % 2, turn = block / 2 % 2, row = first_row + block * kBlockKeys;
        if (block > 0) {
          load(stage, turn, &maps.k, row, full + 8 * stage);
        } else if (thread == 0) {  // with the queries, and columns one after the other
          barrier_arrive(full);
          for (int c = 0; c < 4; ++c) {
            barrier_expect(begun + 8 * c, kBox + 2 * kQueryBox);
            for (int i = 0; i < 2; ++i)
              tensor_load(q + (i * 4 + c) * kQueryBox, &maps.q, c * 64,
                          segment.row_begin * heads + row0 + i * 64, begun + 8 * c);
            tensor_load(ring + c * kBox, &maps.k, c * 64, row, begun + 8 * c);
          }
        }
        // What lies behind the last value may be anything, and 0 · NaN is not 0: it is cleared.
        const int present = count - keys.first_key - block * kBlockKeys;
        load(2 + stage, turn, &maps.v, row, present < kBlockKeys ? landed : full + 8 * (2 + stage));
        if (present < kBlockKeys) {
          barrier_wait(landed, 0);
          for (int c = 0; c < 4; ++c)
            for (int at = present * 128 + thread * 16; at < kBlockKeys * 128; at += 512)
              store_shared(ring + (2 + stage) * kStage + c * kBox + at, make_float4(0, 0, 0, 0));
          fence_async();
          __syncwarp();
          if (thread == 0) barrier_arrive(full + 8 * (2 + stage));
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    const int warp = thread / 32 % 4, lane = thread % 32, ahead = group == 1;
    // Which 64 of the rows: those of the warpgroup behind are finished here, the other's by the other block.
    const int mine = ahead ? 1 - half : half;
    const auto other = static_cast<std::uint32_t>(half ^ 1);
    const auto used = [&] {
      if (lane > 0) return;
      barrier_arrive_at(ready, other);
      if (!ahead) barrier_arrive(drained);
    };
    Rows w;
    w.thread = thread % 128;
    w.factor = op.scale * kLog2E;
#pragma unroll
    for (int i = 0; i < 128; ++i) w.o[i] = 0;
    const std::uint32_t queries = q + mine * 4 * kQueryBox;
    const auto values = [&](int block) {
      const int stage = 2 + block % 2;
      barrier_wait(full + 8 * stage, block / 2 % 2);
      wgmma_fence();
#pragma unroll
      for (int u = 0; u < kBlockUnits; ++u) w.value(u, ring + stage * kStage);
      wgmma_commit();
    };
    if (kStagger && !ahead) named_wait(1, 256);
    if (blocks > 0) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        barrier_wait(begun + 8 * c, 0);
        wgmma_fence();
        w.score(c, queries, ring);
      }
      wgmma_commit();
      if (kStagger && ahead) named_signal(1, 256);
      wgmma_wait<0>();
      const int end = min(count - keys.first_key, keys.units * kUnit);
#pragma unroll 1
      for (int block = 0;; ++block) {
        // The values of the step before are still being added; the compiler waits for them before most of the
        // weights are made, though.
        if (w.thread == 0) barrier_arrive(empty + 8 * (block % 2));
        if (block == blocks - 1) used();
        const bool moves = w.soften(end - block * kBlockKeys);
        wgmma_wait<0>();
        if (block > 0 && w.thread == 0) barrier_arrive(empty + 8 * (3 - block % 2));
        w.take_weights(moves);
        if (block == blocks - 1) break;
        const int stage = (block + 1) % 2;
        barrier_wait(full + 8 * stage, (block + 1) / 2 % 2);
        wgmma_fence();
#pragma unroll
        for (int c = 0; c < 4; ++c) w.score(c, queries, ring + stage * kStage);
        wgmma_commit();
        values(block);
        wgmma_wait<1>();
      }
      values(blocks - 1);
      wgmma_wait<0>();
    } else {
      if (kStagger && ahead) named_signal(1, 256);
      used();
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      w.total[r] += __shfl_xor_sync(~0u, w.total[r], 1);
      w.total[r] += __shfl_xor_sync(~0u, w.total[r], 2);
    }
    // The queries' memory takes what is handed over: 16 KB for every warp.
    const std::uint32_t handed = q + warp * 16384, row_sums = sums + w.thread * 16;
    if (ahead) {
      // The keys' memory is free once the other warpgroup has its last scores.
      const std::uint32_t from = ring + warp * 16384;
      barrier_wait(drained, 0);
#pragma unroll
      for (int i = 0; i < 32; ++i)
        store_shared(from + i * 512 + lane * 16,
                     make_float4(w.o[4 * i], w.o[4 * i + 1], w.o[4 * i + 2], w.o[4 * i + 3]));
      fence_async();
      __syncwarp();
      barrier_wait(ready, 0);
      if (lane == 0) send_bytes(handed, from, 16384, received, static_cast<int>(other));
      send(row_sums, received, static_cast<int>(other),
           make_float4(w.most[0], w.most[1], w.total[0], w.total[1]));
    } else {
      // Where a row goes: lane i knows it of row i.
      const int row = row0 + mine * 64 + warp * 16 + lane % 16, token = row / heads;
      const std::int64_t to =
          (segment.row_begin + token) * op.out.pitch + static_cast<std::int64_t>(row - token * heads) * kDim;
      barrier_wait(received, 0);
      const float4 theirs = load_shared(row_sums);
      const float m[2] = {theirs.x, theirs.y}, t[2] = {theirs.z, theirs.w};
      float ours[2], his[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float both = fmaxf(w.most[r], m[r]);
        ours[r] = exp2_fast(w.most[r] - both);
        his[r] = exp2_fast(m[r] - both);
        // No fused operations here: either block must be able to play either part.
        const float inverse = 1.0f / __fadd_rn(__fmul_rn(w.total[r], ours[r]), __fmul_rn(t[r], his[r]));
        ours[r] *= inverse;
        his[r] *= inverse;
      }
      std::uint32_t out[64];
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const float4 v = load_shared(handed + i * 512 + lane * 16);
        out[2 * i] = pack_bf16(__fadd_rn(__fmul_rn(w.o[4 * i], ours[0]), __fmul_rn(v.x, his[0])),
                               __fadd_rn(__fmul_rn(w.o[4 * i + 1], ours[0]), __fmul_rn(v.y, his[0])));
        out[2 * i + 1] = pack_bf16(__fadd_rn(__fmul_rn(w.o[4 * i + 2], ours[1]), __fmul_rn(v.z, his[1])),
                                   __fadd_rn(__fmul_rn(w.o[4 * i + 3], ours[1]), __fmul_rn(v.w, his[1])));
      }
      __syncwarp();
      constexpr int kPitch = kDim * 2 + 16;
#pragma unroll
      for (int i = 0; i < 16; ++i)
        store_matrix(handed + lane % 16 * kPitch + (16 * i + lane / 16 * 8) * 2, out[4 * i], out[4 * i + 1],
                     out[4 * i + 2], out[4 * i + 3]);
      __syncwarp();
      auto* y = static_cast<__nv_bfloat16*>(op.out.data) + lane * 8;
      const int present = min(16, rows - (row - lane % 16));
#pragma unroll 4
      for (int i = 0; i < 16; ++i) {
        const std::int64_t at = __shfl_sync(~0u, to, i);
        if (i < present) *reinterpret_cast<float4*>(y + at) = load_shared(handed + i * kPitch + lane * 16);
      }
    }
  }
  __syncwarp();
  cluster_arrive_relaxed();  // nobody leaves while the other block may still write here
  cluster_wait();
#endif
}

template <bool kStagger>
cudaError_t start(const Stream& s, const DeviceAttention& op) {
  Maps maps;
  const std::int64_t cache_rows = static_cast<std::int64_t>(op.slots) * op.keys;
  if (!tensor_map(maps.q, op.q, static_cast<std::int64_t>(op.out.rows) * op.heads, kDim, kDim, 64) ||
      !tensor_map(maps.k, op.k, cache_rows, kDim, kDim, kBlockKeys) ||
      !tensor_map(maps.v, op.v, cache_rows, kDim, kDim, kBlockKeys))
    return cudaErrorInvalidValue;
  const auto kernel = attention_wide_kernel<kStagger>;
  const cudaError_t prepared =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (prepared != cudaSuccess) return prepared;
  const dim3 grid(2 * blocks(static_cast<std::int64_t>(op.segments.max_rows) * op.heads, kRows), 1,
                  static_cast<unsigned>(op.segments.count.capacity));
  return launch(s, grid, kThreads, kSharedBytes, kernel, op, maps);
}

}  // namespace

bool attention_wide_takes(const DeviceAttention& op) {
  return !op.f32 && op.head_dim == kDim && op.kv_heads == 1 && op.out.dtype == DType::kBF16 &&
         op.out.pitch % 8 == 0 && op.scale > 0;
}

cudaError_t attention_wide(const Stream& s, const DeviceAttention& op) { return start<true>(s, op); }

}  // namespace servoflow::ops::cuda
