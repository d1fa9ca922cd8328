// Products on Hopper's warpgroup instructions. A cluster of two blocks shares what both need: either two
// neighbouring tiles of 128 weight rows read the same rows of x, or two tiles of x the same weight rows; each
// block fetches half of the shared part and the copy engine delivers it to both. In a block one warp fetches
// and two warpgroups multiply, 64 weight rows each. Weights are the instruction's 64 rows and the rows of x
// its width (any multiple of 8), so that few rows are padding; blocks walk over tiles until none is left.
#include <algorithm>

#include "ops/cuda/hopper.cuh"
#include "ops/cuda/kernels.h"
#include "ops/cuda/tensor_map.h"
#include "ops/cuda/wgmma_shapes.cuh"

namespace servoflow::ops::cuda {
namespace {

constexpr int kWeights = 128, kDepth = 64, kThreads = 384;
constexpr int kWeightBytes = kWeights * kDepth * 2;
// A warpgroup's sums on their way out: 32 first features of pairs, then the 32 second ones, per row of x.
constexpr int kChunkRows = 32, kHandedPitch = 68, kHandedBytes = kChunkRows * kHandedPitch * 4;

template <int kRows>
struct Tile {
  static constexpr int kFirstPart = (kRows / 2 + 7) / 8 * 8, kSecondPart = kRows - kFirstPart;
  static constexpr int kStageBytes = kWeightBytes + kRows * kDepth * 2;
  static constexpr int kFit = (222 * 1024 - 2 * kHandedBytes) / kStageBytes, kStages = kFit < 8 ? kFit : 8;
  static constexpr int kSharedBytes = 1024 + kStages * kStageBytes + 2 * kHandedBytes + 2 * kStages * 8;
  static constexpr int kChunks = (kRows + kChunkRows - 1) / kChunkRows;
};

struct Maps {
  CUtensorMap weight;  // boxes of 64 rows
  CUtensorMap first;   // of kFirstPart rows of x
  CUtensorMap second;
};

struct Plan {
  bool pair_rows = false;  // the cluster's blocks take two tiles of x; otherwise two tiles of the weight
  int weight_tiles = 0;
};

struct Unit {
  int split, weight0, row0, first_step, steps;
};

template <int kRows>
__device__ __forceinline__ bool unit_at(const Product& op, const Plan& plan, int rows, int index, int rank,
                                        Unit& u) {
  const int row_tiles = (rows + kRows - 1) / kRows;
  const int across = plan.pair_rows ? (row_tiles + 1) / 2 : row_tiles;
  const int down = plan.pair_rows ? plan.weight_tiles : (plan.weight_tiles + 1) / 2;
  if (index >= across * down * op.splits) return false;
  const int row_at = index % across, rest = index / across, weight_at = rest % down;
  u.split = rest / down;
  u.weight0 = (plan.pair_rows ? weight_at : 2 * weight_at + rank) * kWeights;
  u.row0 = (plan.pair_rows ? 2 * row_at + rank : row_at) * kRows;
  const int steps = (op.w.k + kDepth - 1) / kDepth;
  u.first_step = steps * u.split / op.splits;
  u.steps = steps * (u.split + 1) / op.splits - u.first_step;
  return true;
}

__device__ __forceinline__ void group_sync(int group) {
  asm volatile("bar.sync %0, 128;" ::"r"(group) : "memory");
}

// Where two neighbouring pairs of q, k or v features go when all rows of a tile belong to one segment.
struct QkvColumn {
  bool rotates = false;
  __nv_bfloat16* out = nullptr;  // of the tile's first row; null: the rows are several segments'
  int stride = 0;                // elements from row to row
  const float *cos = nullptr, *sin = nullptr;
  int angle_stride = 0;
};

__device__ __forceinline__ QkvColumn qkv_column(const DeviceQkv& qkv, int row0, int last_row, int first,
                                                int second) {
  QkvColumn c;
  Segment s;
  if (!find_segment(qkv.segments, valid(qkv.segment_count), row0, s) || last_row >= s.row_begin + s.rows)
    return c;
  const DeviceQkv::Place p = qkv.place(first, second);
  const int position = s.past + row0 - s.row_begin;
  c.stride = qkv.head_dim;
  c.rotates = qkv.rotates(p);
  if (c.rotates) {
    c.angle_stride = qkv.head_dim / 2;
    c.cos = qkv.cos + static_cast<std::int64_t>(position) * c.angle_stride + p.i;
    c.sin = qkv.sin + static_cast<std::int64_t>(position) * c.angle_stride + p.i;
  }
  if (p.head < qkv.heads) {
    c.stride = qkv.heads * qkv.head_dim;
    c.out = static_cast<__nv_bfloat16*>(qkv.q) + static_cast<std::int64_t>(row0) * c.stride +
            p.head * qkv.head_dim + 2 * p.i;
  } else if (p.head < qkv.heads + qkv.kv_heads) {
    c.out =
        static_cast<__nv_bfloat16*>(qkv.k) + qkv.cache_row(s.slot, p.head - qkv.heads, position) + 2 * p.i;
  } else {
    c.out = static_cast<__nv_bfloat16*>(qkv.v) +
            qkv.cache_row(s.slot, p.head - qkv.heads - qkv.kv_heads, position) + p.i;
  }
  return c;
}

// How a tile ends in four columns at a time: which of the quick ways there is, if any.
enum class Quads : std::uint8_t { kNone, kPartials, kGated, kQkv, kPlain };

__device__ __forceinline__ Quads quads_of(const Product& op) {
  const DeviceEpilogue& e = op.epilogue;
  if (op.to_qkv)
    return op.w.order == RowOrder::kRotated && op.qkv.head_dim % 4 == 0 ? Quads::kQkv : Quads::kNone;
  if (op.geglu) return op.w.n % 4 == 0 && e.pitch % 2 == 0 ? Quads::kGated : Quads::kNone;
  if (op.w.order != RowOrder::kAdjacent || op.w.n % 4 != 0) return Quads::kNone;
  if (op.partials != nullptr) return Quads::kPartials;
  return e.gate == nullptr && e.row_bias == nullptr && e.row_map == nullptr && !e.accumulate &&
                 e.activation != Activation::kSilu && e.pitch % 4 == 0
             ? Quads::kPlain
             : Quads::kNone;
}

// A warp's eight rows of a chunk, two at a time: half a warp has a row's 32 pairs, each thread two of them.
// `handed`, `row` and `tile_row` are the thread's first row's, `column` its first pair's. Rows are under way
// together: a block has too few warps to hide one row's latency behind another's.
__device__ __forceinline__ void end_quads(const Product& op, Quads quads, const QkvColumn& column,
                                          const float4& bias, int split, const float* handed, int row,
                                          int tile_row, int end, int first) {
  constexpr int kAtOnce = 4;
  float4 v[kAtOnce];  // first 0, second 0, first 1, second 1
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    const float2 a = *reinterpret_cast<const float2*>(handed + 2 * i * kHandedPitch);
    const float2 b = *reinterpret_cast<const float2*>(handed + 2 * i * kHandedPitch + 32);
    v[i] = make_float4(a.x + bias.x, b.x + bias.y, a.y + bias.z, b.y + bias.w);
  }
  const DeviceEpilogue& e = op.epilogue;
  if (quads == Quads::kGated) {
    auto* out = static_cast<__nv_bfloat16*>(e.y) + row * e.pitch + first;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (2 * i < end)
        *reinterpret_cast<std::uint32_t*>(out + 2 * i * e.pitch) =
            pack_bf16(gelu(v[i].x) * v[i].y, gelu(v[i].z) * v[i].w);
  } else if (quads == Quads::kPartials) {
    float* out = op.partials + split * op.split_pitch + static_cast<std::int64_t>(row) * op.w.n + first;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (2 * i < end) *reinterpret_cast<float4*>(out + 2 * i * op.w.n) = v[i];
  } else if (quads == Quads::kQkv) {
    float2 cosine[kAtOnce], sine[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      cosine[i] = make_float2(1, 1);
      sine[i] = make_float2(0, 0);
      if (column.rotates && 2 * i < end) {
        const int at = (tile_row + 2 * i) * column.angle_stride;
        cosine[i] = __ldg(reinterpret_cast<const float2*>(column.cos + at));
        sine[i] = __ldg(reinterpret_cast<const float2*>(column.sin + at));
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (2 * i < end) {
        const float2 p = turned(v[i].x, v[i].y, make_float2(cosine[i].x, sine[i].x));
        const float2 q = turned(v[i].z, v[i].w, make_float2(cosine[i].y, sine[i].y));
        *reinterpret_cast<uint2*>(column.out + (tile_row + 2 * i) * column.stride) =
            make_uint2(pack_bf16(p.x, p.y), pack_bf16(q.x, q.y));
      }
  } else {
    if (e.activation == Activation::kGeluTanh)
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        v[i] = make_float4(gelu(v[i].x), gelu(v[i].y), gelu(v[i].z), gelu(v[i].w));
    const std::int64_t at = row * e.pitch + first;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (2 * i < end) {
        if (e.f32) {
          *reinterpret_cast<float4*>(static_cast<float*>(e.y) + at + 2 * i * e.pitch) = v[i];
        } else {
          *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(e.y) + at + 2 * i * e.pitch) =
              make_uint2(pack_bf16(v[i].x, v[i].y), pack_bf16(v[i].z, v[i].w));
        }
      }
  }
}

// The same for anything else, a pair per thread and one row after the other. Seldom used: its code is kept
// short.
__device__ __forceinline__ void end_pairs(const Product& op, int pair, int split, const float* handed,
                                          int row0, int warp, int end) {
  Segment segment{};
#pragma unroll 1
  for (int r = warp; r < end; r += 4) {
    const int row = row0 + r;
    if (op.to_qkv && (row < segment.row_begin || row >= segment.row_begin + segment.rows) &&
        !find_segment(op.qkv.segments, valid(op.qkv.segment_count), row, segment))
      segment = {};
    if (op.to_qkv && segment.rows == 0) continue;
    emit_pair(op, pair, row, segment, split, handed[r * kHandedPitch], handed[r * kHandedPitch + 32]);
  }
}

template <int kRows>
__global__ void SF_CLUSTER(2) __launch_bounds__(kThreads, 1)
    product_wgmma_kernel(const __grid_constant__ Product op, const __grid_constant__ Maps maps,
                         const Plan plan) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  using T = Tile<kRows>;
  extern __shared__ std::uint8_t memory[];
  const std::uint32_t base = (shared_address(memory) + 1023) & ~1023u;
  const int thread = static_cast<int>(threadIdx.x), group = thread / 128;
  const std::uint32_t sums = base + T::kStages * T::kStageBytes, staged = sums + (group - 1) * kHandedBytes;
  const std::uint32_t full = sums + 2 * kHandedBytes, empty = full + T::kStages * 8;
  const int rank = static_cast<int>(cluster_rank()), clusters = static_cast<int>(gridDim.x) / 2;
  if (thread == 0) {
    for (int i = 0; i < T::kStages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, 4);  // two warpgroups of either block
    }
    barriers_ready();
  }
  cluster_sync();
  const int rows = valid(op.rows);
  release_successor();

  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (thread == 0) {
      int stage = 0;
      std::uint32_t parity = 1;  // a fresh barrier's previous phase counts as done
      const auto load_weight = [&](const Unit& u, int step, int at) {
        const std::uint32_t to = base + at * T::kStageBytes, barrier = full + 8 * at;
        const int column = (u.first_step + step) * kDepth;
        barrier_expect(barrier, T::kStageBytes);
        if (plan.pair_rows) {
          tensor_load_both(to + rank * kWeightBytes / 2, &maps.weight, column, u.weight0 + rank * 64,
                           barrier);
        } else {
          tensor_load(to, &maps.weight, column, u.weight0, barrier);
          tensor_load(to + kWeightBytes / 2, &maps.weight, column, u.weight0 + 64, barrier);
        }
      };
      const auto load_rows = [&](const Unit& u, int step, int at) {
        const std::uint32_t to = base + at * T::kStageBytes + kWeightBytes, barrier = full + 8 * at;
        const int column = (u.first_step + step) * kDepth;
        if (plan.pair_rows) {
          tensor_load(to, &maps.first, column, u.row0, barrier);
          tensor_load(to + T::kFirstPart * 128, &maps.second, column, u.row0 + T::kFirstPart, barrier);
        } else if (rank == 0) {
          tensor_load_both(to, &maps.first, column, u.row0, barrier);
        } else {
          tensor_load_both(to + T::kFirstPart * 128, &maps.second, column, u.row0 + T::kFirstPart, barrier);
        }
      };
      Unit u;
      // Weights do not depend on the kernel before: the first ones are under way while it drains.
      int ahead = 0;
      if (unit_at<kRows>(op, plan, rows, static_cast<int>(blockIdx.x) / 2, rank, u))
        for (; ahead < T::kStages && ahead < u.steps; ++ahead) load_weight(u, ahead, ahead);
      wait_for_inputs();
      for (int index = static_cast<int>(blockIdx.x) / 2; unit_at<kRows>(op, plan, rows, index, rank, u);
           index += clusters) {
        for (int step = 0; step < u.steps; ++step) {
          if (ahead > 0) {
            --ahead;
          } else {
            barrier_wait(empty + 8 * stage, parity);
            load_weight(u, step, stage);
          }
          load_rows(u, step, stage);
          if (++stage == T::kStages) {
            stage = 0;
            parity ^= 1;
          }
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    wait_for_inputs();
    const int warp = thread / 32 % 4, lane = thread % 32, half = (group - 1) * 64;
    int stage = 0;
    std::uint32_t parity = 0;
    Unit u;
    for (int index = static_cast<int>(blockIdx.x) / 2; unit_at<kRows>(op, plan, rows, index, rank, u);
         index += clusters) {
      float sum[kRows / 2] = {};
      int previous = -1;
      const auto release = [&](int which) {
        if (thread % 128 < 2) barrier_arrive_at(empty + 8 * which, static_cast<std::uint32_t>(thread % 128));
      };
      for (int step = 0; step < u.steps; ++step) {
        barrier_wait(full + 8 * stage, parity);
        const std::uint32_t at = base + stage * T::kStageBytes;
        const std::uint64_t a = tile_descriptor(at + half * 128), b = tile_descriptor(at + kWeightBytes);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kDepth / 16; ++k) wgmma<kRows>(sum, a + 2 * k, b + 2 * k);
        wgmma_commit();
        wgmma_wait<1>();
        if (previous >= 0) release(previous);
        previous = stage;
        if (++stage == T::kStages) {
          stage = 0;
          parity ^= 1;
        }
      }
      wgmma_wait<0>();
      if (previous >= 0) release(previous);

      // The sums pass through shared memory, 32 rows of x at a time: the code that ends them then exists once
      // and not once per register, and what it writes lies side by side.
      const int pair0 = (u.weight0 + half) / 2, limit = op.w.order == RowOrder::kGated ? op.w.n / 2 : op.w.n;
      int first, second;
      pair_features(op.w, pair0 + lane % 16 * 2, first, second);
      const bool present = first < limit;
      Quads quads = quads_of(op);
      QkvColumn column;
      float4 bias = make_float4(0, 0, 0, 0);
      if (quads == Quads::kQkv) {
        if (present) column = qkv_column(op.qkv, u.row0, min(u.row0 + kRows, rows) - 1, first, second);
        if (__any_sync(~0u, present && column.out == nullptr)) quads = Quads::kNone;
      }
      const float* biases = quads == Quads::kQkv     ? op.qkv.bias
                            : quads == Quads::kPlain ? op.epilogue.bias
                                                     : nullptr;
      if (biases != nullptr && present) {
        const int next = second == first + 1 ? 2 : 1;  // from a pair to the one behind it
        bias = make_float4(__ldg(biases + first), __ldg(biases + second), __ldg(biases + first + next),
                           __ldg(biases + second + next));
      }
      float* handed = reinterpret_cast<float*>(memory + (staged - shared_address(memory)));
#pragma unroll 1
      for (int chunk = 0; chunk < T::kChunks && u.row0 + chunk * kChunkRows < rows; ++chunk) {
#pragma unroll
        for (int c = 0; c < T::kChunks; ++c)
          if (c == chunk) {
#pragma unroll
            for (int i = 0; i < kChunkRows / 8 && c * (kChunkRows / 8) + i < kRows / 8; ++i)
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                float* to = handed + (8 * i + lane % 4 * 2 + e) * kHandedPitch + warp * 8 + lane / 4;
                to[0] = sum[(c * (kChunkRows / 8) + i) * 4 + e];
                to[32] = sum[(c * (kChunkRows / 8) + i) * 4 + 2 + e];
              }
          }
        group_sync(group);
        const int row0 = u.row0 + chunk * kChunkRows,
                  end = min(min(kChunkRows, kRows - chunk * kChunkRows), rows - row0);
        if (quads == Quads::kNone) {
          end_pairs(op, pair0 + lane, u.split, handed + lane, row0, warp, end);
        } else if (present) {
          const int r = 8 * warp + lane / 16;
          end_quads(op, quads, column, bias, u.split, handed + r * kHandedPitch + lane % 16 * 2, row0 + r,
                    chunk * kChunkRows + r, end - r, first);
        }
        group_sync(group);
      }
    }
  }
  __syncwarp();
  cluster_arrive_relaxed();  // nobody leaves while the other block may still write here
  cluster_wait();
#endif
}

template <int kRows>
cudaError_t start(const Stream& s, const Product& op, const Plan& plan, int clusters) {
  using T = Tile<kRows>;
  Maps maps;
  const auto* x = static_cast<const __nv_bfloat16*>(op.x.data);
  if (!tensor_map(maps.weight, op.weight, op.w.padded_n, op.w.k, op.w.pitch, 64) ||
      !tensor_map(maps.first, x, op.rows.capacity, op.w.k, op.x.pitch, T::kFirstPart) ||
      !tensor_map(maps.second, x, op.rows.capacity, op.w.k, op.x.pitch, T::kSecondPart))
    return cudaErrorInvalidValue;
  const cudaError_t prepared = cudaFuncSetAttribute(
      product_wgmma_kernel<kRows>, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes);
  if (prepared != cudaSuccess) return prepared;
  return launch(s, dim3(static_cast<unsigned>(2 * clusters)), kThreads, T::kSharedBytes,
                product_wgmma_kernel<kRows>, op, maps, plan);
}

// Cycles that a tile shape is expected to take, all in all: the larger of arithmetic and L2 traffic per step
// of depth, plus what a tile costs to begin and end.
double expected_cycles(const Product& op, int rows, int tile, bool pair_rows, int clusters_at_once) {
  const int row_tiles = (rows + tile - 1) / tile, weight_tiles = op.w.padded_n / kWeights;
  const int units =
      op.splits * (pair_rows ? weight_tiles * ((row_tiles + 1) / 2) : (weight_tiles + 1) / 2 * row_tiles);
  const int waves = (units + clusters_at_once - 1) / clusters_at_once;
  const double steps = (op.w.k + kDepth - 1) / kDepth / op.splits;
  const double bytes = pair_rows ? kWeightBytes / 2 + tile * 128.0 : kWeightBytes + tile * 64.0;
  return waves * (steps * std::max(4.0 * tile, bytes / 36.0) + 12.0 * tile + 600.0) + 2000.0;
}

}  // namespace

bool wgmma_is_built() {
#ifdef SF_CUDA_SM90A
  return true;
#else
  return false;
#endif
}

bool wgmma_takes(const Product& op) {
  const DeviceEpilogue& e = op.epilogue;
  if (!op.w.tensor_core || op.w.tiled || op.x.dtype != DType::kBF16 || op.x.pitch % 8 != 0 || op.w.n % 2 != 0)
    return false;
  if (op.to_qkv) return !op.qkv.f32;
  if (op.w.order == RowOrder::kGated)
    return op.geglu && !e.f32 && e.row_map == nullptr && e.gate == nullptr && e.row_bias == nullptr;
  return op.w.order == RowOrder::kAdjacent;
}

int wgmma_splits(int n, int k) {
  const int tiles = (n + kWeights - 1) / kWeights, steps = (k + kDepth - 1) / kDepth;
  return std::max(1, std::min({132 / (4 * tiles), 4, steps / 6}));
}

cudaError_t product_wgmma(const Stream& s, const Product& op, int likely_rows) {
  int device = 0, processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  constexpr int kTiles[] = {64, 120, 128, 176, 184, 192, 240, 248};
  const int at_once = std::max(1, processors / 2), rows = std::max(1, likely_rows);
  int best = 64;
  Plan plan{.weight_tiles = op.w.padded_n / kWeights};
  double least = 1e30;
  for (const int tile : kTiles)
    for (const bool pair_rows : {false, true})
      if (const double cycles = expected_cycles(op, rows, tile, pair_rows, at_once); cycles < least) {
        least = cycles;
        best = tile;
        plan.pair_rows = pair_rows;
      }
  switch (best) {
    case 64:
      return start<64>(s, op, plan, at_once);
    case 120:
      return start<120>(s, op, plan, at_once);
    case 128:
      return start<128>(s, op, plan, at_once);
    case 176:
      return start<176>(s, op, plan, at_once);
    case 184:
      return start<184>(s, op, plan, at_once);
    case 192:
      return start<192>(s, op, plan, at_once);
    case 240:
      return start<240>(s, op, plan, at_once);
    default:
      return start<248>(s, op, plan, at_once);
  }
}

}  // namespace servoflow::ops::cuda
