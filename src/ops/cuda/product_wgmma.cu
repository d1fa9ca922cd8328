// Products on Hopper's warpgroup instructions. In a block one warp fetches and two warpgroups multiply, 64
// weight rows each. Weights are the instruction's 64 rows and the rows of x its width (any multiple of 8), so
// that few rows are padding; blocks walk over tiles until none is left.
//
// Two blocks may be a cluster: two tiles of x with the same weights, or two of the weight with the same rows.
// Each then fetches half of what both need and the copy engine delivers it to both.
#include <algorithm>
#include <utility>

#include "ops/cuda/product_ends.cuh"
#include "ops/cuda/tensor_map.h"

namespace servoflow::ops::cuda {
namespace {

constexpr int kWeights = 128, kDepth = 64, kThreads = 384;
constexpr int kWeightBytes = kWeights * kDepth * 2;
constexpr int kMostShared = 227 * 1024;

template <int kRows>
struct Tile {
  static constexpr int kFirstPart = (kRows / 2 + 7) / 8 * 8, kSecondPart = kRows - kFirstPart;
  static constexpr int kStageBytes = kWeightBytes + kRows * kDepth * 2;
  // Rows of x whose sums pass through shared memory at a time, as float32 and as bf16.
  static constexpr int kChunkRows = kRows <= 64 ? 64 : 32, kChunks = (kRows + kChunkRows - 1) / kChunkRows;
  static constexpr int kAtOnce = kChunkRows / 8, kPassRows = kRows <= 184 ? 64 : 128;
  static constexpr int kHandedBytes = std::max(kChunkRows * kHandedPitch * 4, kPassRows* kColumnsBytes);
  static constexpr int kFit = (kMostShared - 2 * kHandedBytes) / (kStageBytes + 2 * 8);
  static constexpr int kStages = kFit < 8 ? kFit : 8;
  static constexpr int kSharedBytes = kStages * (kStageBytes + 2 * 8) + 2 * kHandedBytes;
};

struct Maps {
  CUtensorMap weight;   // boxes of 128 rows, or of 64 where two blocks share them
  CUtensorMap rows[2];  // all of a tile, or its two parts where two blocks share it
};

struct Plan {
  int weights = 1, rows = 1;  // tiles of the weight and of x that a cluster takes; at most one of them is 2
  int down = 0;               // tiles of the weight, by clusters
  int expected = 0;           // tiles of x, likewise

  __host__ __device__ __forceinline__ int size() const { return weights * rows; }
  __host__ __device__ __forceinline__ int across(int valid_rows, int tile) const {
    return ((valid_rows + tile - 1) / tile + rows - 1) >> (rows - 1);
  }
};

struct Unit {
  int split, weight0, row0, first_step, steps;
  bool empty;  // there are no such rows
};

// A cluster's unit of work, and this block's part. Units of the rows that are expected come first, there or
// not: a block knows its first weights before it knows how many rows there are. `across`: of those there are.
template <int kRows>
__device__ __forceinline__ bool unit_at(const Product& op, const Plan& plan, int across, int index, int rank,
                                        Unit& u) {
  const int down = plan.down, known = plan.expected * down * op.splits;
  int first = 0, groups = plan.expected;
  if (index >= known) {
    index -= known;
    first = groups;
    groups = across - first;
    if (groups <= 0 || index >= groups * down * op.splits) return false;
  }
  const int rest = index / groups, row_at = first + index - rest * groups;
  int weight_at = rest;
  u.empty = row_at >= across;
  u.split = 0;
  u.first_step = 0;
  u.steps = (op.w.k + kDepth - 1) / kDepth;
  if (op.splits > 1) {
    u.split = rest / down;
    weight_at -= u.split * down;
    u.first_step = u.steps * u.split / op.splits;
    u.steps = u.steps * (u.split + 1) / op.splits - u.first_step;
  }
  u.weight0 = (weight_at * plan.weights + (plan.weights == 2 ? rank : 0)) * kWeights;
  u.row0 = (row_at * plan.rows + (plan.rows == 2 ? rank : 0)) * kRows;
  return true;
}

__device__ __forceinline__ void group_sync(int group) {
  asm volatile("bar.sync %0, 128;" ::"r"(group) : "memory");
}
__device__ __forceinline__ void store_pair(std::uint32_t shared, float a, float b) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(shared), "f"(a), "f"(b) : "memory");
}

template <int kRows, Kind kKind>
__global__ void __launch_bounds__(kThreads, 1)
    product_wgmma_kernel(const __grid_constant__ Product op, const __grid_constant__ Maps maps,
                         const __grid_constant__ Plan plan) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  using T = Tile<kRows>;
  extern __shared__ __align__(1024) std::uint8_t memory[];
  const std::uint32_t base = shared_address(memory);
  const int thread = static_cast<int>(threadIdx.x), group = thread / 128;
  const std::uint32_t handed = base + T::kStages * T::kStageBytes + (group - 1) * T::kHandedBytes;
  const std::uint32_t full = base + T::kStages * T::kStageBytes + 2 * T::kHandedBytes,
                      empty = full + T::kStages * 8;
  const int size = plan.size(), rank = size == 2 ? static_cast<int>(cluster_rank()) : 0;
  const int cluster = static_cast<int>(blockIdx.x) >> (size - 1),
            clusters = static_cast<int>(gridDim.x) >> (size - 1);
  if (thread < T::kStages) {
    barrier_init(full + 8 * thread, 1);
    barrier_init(empty + 8 * thread, 2 * size);  // two warpgroups of each block
    barriers_ready();
  } else if (thread == 32) {
    prefetch_map(&maps.weight);
    prefetch_map(&maps.rows[0]);
    prefetch_map(&maps.rows[1]);
  }
  if (size == 2) {
    __syncwarp();
    cluster_arrive_relaxed();  // barriers_ready() has released them
    cluster_wait();
  } else {
    __syncthreads();
  }

  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (thread == 0) {
      int stage = 0;
      std::uint32_t parity = 1;  // a fresh barrier's previous phase counts as done
      const auto load_weight = [&](const Unit& u, int step, int at) {
        const std::uint32_t to = base + at * T::kStageBytes, barrier = full + 8 * at;
        const int column = (u.first_step + step) * kDepth;
        barrier_expect(barrier, T::kStageBytes);
        if (plan.rows == 2) {
          tensor_load_both(to + rank * (kWeightBytes / 2), &maps.weight, column,
                           u.weight0 + rank * (kWeights / 2), barrier);
        } else {
          tensor_load(to, &maps.weight, column, u.weight0, barrier);
        }
      };
      const auto load_rows = [&](const Unit& u, int step, int at) {
        const std::uint32_t to = base + at * T::kStageBytes + kWeightBytes, barrier = full + 8 * at;
        const int column = (u.first_step + step) * kDepth;
        if (plan.weights == 2) {
          tensor_load_both(to + rank * (T::kFirstPart * 128), &maps.rows[rank], column,
                           u.row0 + rank * T::kFirstPart, barrier);
        } else {
          tensor_load(to, &maps.rows[0], column, u.row0, barrier);
        }
      };
      Unit u;
      // The rows' number is on its way meanwhile: valid() would wait for it here.
      int counted = op.rows.capacity;
      if (op.rows.device != nullptr)
        asm volatile("ld.global.b32 %0, [%1];" : "+r"(counted) : "l"(op.rows.device));
      // Weights do not depend on the kernel before: the first ones are under way while it drains.
      int ahead = 0, index = cluster;
      bool more =
          index < plan.expected * plan.down * op.splits && unit_at<kRows>(op, plan, 0, index, rank, u);
      if (more)
#pragma unroll 1
        for (; ahead < T::kStages && ahead < u.steps; ++ahead) load_weight(u, ahead, ahead);
      const int across = plan.across(min(counted, op.rows.capacity), kRows);
      if (!more) more = unit_at<kRows>(op, plan, across, index, rank, u);
      wait_for_inputs();
      while (more) {
        const int steps =
            u.empty && index != cluster ? 0 : u.steps;  // of the first one weights are under way
        for (int step = 0; step < steps; ++step) {
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
        index += clusters;
        more = unit_at<kRows>(op, plan, across, index, rank, u);
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int warp = thread / 32 % 4, lane = thread % 32, half = (group - 1) * 64;
    const int which = thread % 128;
    int stage = 0;
    std::uint32_t parity = 0;
    const int rows = valid(op.rows), across = plan.across(rows, kRows);
    Unit u;
    for (int index = cluster; unit_at<kRows>(op, plan, across, index, rank, u); index += clusters) {
      if (u.empty && index != cluster) continue;
      const int pair0 = (u.weight0 + half) / 2, limit = op.w.order == RowOrder::kGated ? op.w.n / 2 : op.w.n;
      const int live = min(kRows, rows - u.row0), at0 = 2 * warp + lane / 16;
      End end = end_of(op);
      Segment segment{}, behind{};
      int split = live;
      if (op.to_qkv && end != End::kGeneral &&
          segments_of(op.qkv, u.row0, live, segment, behind, split) == 3 &&
          (end != End::kQkv || segment.rows == 0))
        end = End::kGeneral;
      if (index == cluster) wait_for_inputs();
      // The first of the two pairs that the thread ends, where it ends pairs.
      int first, second;
      pair_features(op.w, pair0 + lane % 16 * 2, first, second);
      const bool present = first < limit;
      float4 old[T::kAtOnce] = {};
      const auto ask_old = [&](int begin) {
        if (end == End::kInto && present)
          old_quads<T::kAtOnce>(op, u.row0 + begin + at0, min(live - begin, T::kChunkRows) - at0, first, old);
      };
      if constexpr (kKind == Kind::kFloats) ask_old(0);

      float sum[kRows / 2] = {};
      int previous = -1;
      const auto release = [&](int stage_read) {
        if (which < size) barrier_arrive_at(empty + 8 * stage_read, static_cast<std::uint32_t>(which));
      };
#pragma unroll 1
      for (int step = 0; step < u.steps; ++step) {
        barrier_wait(full + 8 * stage, parity);
        const std::uint32_t at = base + stage * T::kStageBytes;
        const std::uint64_t weight = tile_descriptor(at + half * 128), x = tile_descriptor(at + kWeightBytes);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kDepth / 16; ++k) wgmma<kRows>(sum, weight + 2 * k, x + 2 * k);
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
      // Not before: blocks of the next kernel would crowd onto the processors that have nothing to do here.
      release_successor();

      [[maybe_unused]] const auto sync = [&] { group_sync(group); };
      const float* biases = op.to_qkv ? op.qkv.bias : op.epilogue.bias;
      if constexpr (kKind == Kind::kHalves) {
        if (end == End::kGated) {
          end_gated<kRows, T::kPassRows>(op, sum, pair0, limit - pair0, u.row0, live, handed, sync);
          continue;
        }
        if (end != End::kGeneral) {
          Piece piece[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int pair = pair0 + which % 4 * 8 + 4 * i;
            if (2 * pair < op.w.n)
              piece[i] = end == End::kColumns ? column_piece(op.epilogue, u.row0, 2 * pair)
                                              : head_piece(op, segment, behind, u.row0, pair);
          }
          int feature0, feature1;  // whose sums the thread has
          pair_features(op.w, pair0 + 8 * warp + lane / 4, feature0, feature1);
          const bool biased = biases != nullptr && feature0 < op.w.n;
          const float bias0 = biased ? __ldg(biases + feature0) : 0.0f,
                      bias1 = biased ? __ldg(biases + feature1) : 0.0f;
          if (end == End::kColumns && op.epilogue.activation == Activation::kGeluTanh) {
            end_columns<kRows, T::kPassRows, true>(sum, bias0, bias1, piece, split, live, handed, sync);
          } else {
            end_columns<kRows, T::kPassRows, false>(sum, bias0, bias1, piece, split, live, handed, sync);
          }
          continue;
        }
      }
      QkvColumn column;
      float4 bias = make_float4(0, 0, 0, 0);
      if constexpr (kKind != Kind::kHalves) {
        if (kKind == Kind::kTurned && end == End::kQkv && present)
          column = qkv_column(op.qkv, segment, u.row0, first, second);
        if (biases != nullptr && present && end != End::kGeneral && end != End::kPartials) {
          const int next = second == first + 1 ? 2 : 1;  // from a pair to the one behind it
          bias = make_float4(__ldg(biases + first), __ldg(biases + second), __ldg(biases + first + next),
                             __ldg(biases + second + next));
        }
      }
      // The sums pass through shared memory some rows of x at a time: the code that ends them then exists
      // once and not once per register, and what it writes lies side by side.
#pragma unroll 1
      for (int chunk = 0; chunk < T::kChunks && chunk * T::kChunkRows < live; ++chunk) {
        const std::uint32_t to = handed + (lane % 4 * 2 * kHandedPitch + 16 * warp + lane / 4 * 2) * 4;
#pragma unroll
        for (int c = 0; c < T::kChunks; ++c)
          if (c == chunk) {
#pragma unroll
            for (int i = 0; i < T::kChunkRows / 8 && c * (T::kChunkRows / 8) + i < kRows / 8; ++i)
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                const float* s = sum + (c * (T::kChunkRows / 8) + i) * 4 + e;
                store_pair(to + (8 * i + e) * kHandedPitch * 4, s[0], s[2]);
              }
          }
        group_sync(group);
        const int begin = chunk * T::kChunkRows, last = min(T::kChunkRows, live - begin);
        const std::uint32_t quad = handed + (at0 * kHandedPitch + lane % 16 * 4) * 4;
        if (end == End::kGeneral) {
          end_pairs(op, pair0 + lane, u.split, handed + 8 * lane, u.row0 + begin, warp, last);
        } else if (present) {
          if constexpr (kKind == Kind::kTurned) {
            // A segment at a time; rows that are nobody's are left out.
#pragma unroll 1
            for (int from = begin, to; from < begin + last; from = to) {
              to = segment.row_begin + segment.rows - u.row0;
              if (from >= to) {
                to = from + 1;
                if (!find_segment(op.qkv.segments, valid(op.qkv.segment_count), u.row0 + from, segment)) {
                  segment = {};
                  continue;
                }
                column = qkv_column(op.qkv, segment, u.row0, first, second);
                to = segment.row_begin + segment.rows - u.row0;
              }
              to = min(to, begin + last);
              end_turned<T::kAtOnce>(column, bias, quad, begin + at0, from - begin - at0, to - begin - at0);
            }
          }
          if constexpr (kKind == Kind::kFloats)
            end_floats<T::kAtOnce>(op, end, bias, u.split, quad, old, u.row0 + begin + at0, last - at0, first,
                                   [&] { ask_old(begin + T::kChunkRows); });
        }
        group_sync(group);
      }
    }
  }
  if (size == 2) {
    __syncwarp();
    cluster_arrive_relaxed();  // nobody leaves while the other block may still write here
    cluster_wait();
  }
#endif
}

cudaLaunchConfig_t config_of(int clusters, int size, int shared_bytes, cudaLaunchAttribute& cluster) {
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(size);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * size));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
  config.attrs = &cluster;
  config.numAttrs = 1;
  return config;
}

// Clusters of one or two blocks that run at once, one block to a processor: groups of processors need not be
// multiples of a cluster.
int clusters_at_once(int size) {
  struct Known {
    int at_once[3] = {};
    Known() {
      using T = Tile<240>;
      const auto kernel = product_wgmma_kernel<240, Kind::kFloats>;
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes);
      for (const int blocks : {1, 2}) {
        cudaLaunchAttribute cluster{};
        const cudaLaunchConfig_t config = config_of(1, blocks, T::kSharedBytes, cluster);
        int found = 0;
        if (cudaOccupancyMaxActiveClusters(&found, kernel, &config) != cudaSuccess) cudaGetLastError();
        at_once[blocks] = std::max(1, found);
      }
    }
  };
  static const Known known;
  return known.at_once[size];
}

template <int kRows, Kind kKind>
cudaError_t start_kind(const Stream& s, const Product& op, Plan plan, int likely_rows) {
  using T = Tile<kRows>;
  static_assert(T::kSharedBytes <= kMostShared && T::kStageBytes % 1024 == 0);
  Maps maps;
  const auto* x = static_cast<const __nv_bfloat16*>(op.x.data);
  if (!tensor_map(maps.weight, op.weight, op.w.padded_n, op.w.k, op.w.pitch, kWeights / plan.rows) ||
      !tensor_map(maps.rows[0], x, op.rows.capacity, op.w.k, op.x.pitch,
                  plan.weights == 2 ? T::kFirstPart : kRows) ||
      !tensor_map(maps.rows[1], x, op.rows.capacity, op.w.k, op.x.pitch, T::kSecondPart))
    return cudaErrorInvalidValue;
  const auto kernel = product_wgmma_kernel<kRows, kKind>;
  const cudaError_t prepared =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes);
  if (prepared != cudaSuccess) return prepared;
  plan.expected = plan.across(likely_rows, kRows);
  const int units = plan.expected * plan.down * op.splits;
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config =
      config_of(std::min(units, clusters_at_once(plan.size())), plan.size(), T::kSharedBytes, attributes[0]);
  config.stream = s.stream;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  config.numAttrs = s.early_start ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, op, maps, plan);
}
template <int kRows>
cudaError_t start(const Stream& s, const Product& op, const Plan& plan, int likely_rows) {
  const Kind kind = kind_of(end_of(op));
  return kind == Kind::kHalves   ? start_kind<kRows, Kind::kHalves>(s, op, plan, likely_rows)
         : kind == Kind::kTurned ? start_kind<kRows, Kind::kTurned>(s, op, plan, likely_rows)
                                 : start_kind<kRows, Kind::kFloats>(s, op, plan, likely_rows);
}

// Cycles that a tile shape is expected to take, all in all. A step of depth takes as long as its arithmetic
// or its way into shared memory and out of it again, whichever is longer, and a little for what it fetches; a
// tile costs something to begin and end, and so does a cluster.
// Where several lanes share the device, they seldom all want their share of it.
double expected_cycles(const Stream& s, const Product& op, const Plan& plan, int rows, int tile) {
  const int units = plan.across(rows, tile) * plan.down * op.splits;
  const int at_once = std::max(1, clusters_at_once(plan.size()) * 2 / (s.lanes + 1));
  const int waves = (units + at_once - 1) / at_once;
  const double steps = (op.w.k + kDepth - 1) / kDepth / op.splits;
  const double fetched = 2.0 * kWeightBytes / plan.rows + tile * 64.0 / plan.weights;
  const double step = std::max(4.0 * tile, 256.0 + 3.0 * tile) + fetched / 400.0;
  return waves * (steps * step + 8.0 * tile + 600.0) + 100.0 * plan.rows + 600.0 * plan.weights;
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

// Only long sums are worth the way of their parts through memory.
int wgmma_splits(int n, int k) {
  const int tiles = (n + kWeights - 1) / kWeights, steps = (k + kDepth - 1) / kDepth;
  return steps <= 32 ? 1 : std::max(1, std::min({132 / (4 * tiles), 4, steps / 6}));
}

cudaError_t product_wgmma(const Stream& s, const Product& op, int likely_rows) {
  constexpr int kTiles[] = {64, 120, 128, 176, 184, 192, 200, 240};
  const int rows = std::max(1, likely_rows);
  int best = 64;
  Plan plan;
  double least = 1e30;
  for (const int tile : kTiles)
    for (const auto& [weights, x] : {std::pair(1, 1), std::pair(1, 2), std::pair(2, 1)}) {
      const Plan tried{
          .weights = weights, .rows = x, .down = (op.w.padded_n / kWeights + weights - 1) / weights};
      if (const double cycles = expected_cycles(s, op, tried, rows, tile); cycles < least) {
        least = cycles;
        best = tile;
        plan = tried;
      }
    }
  switch (best) {
    case 64:
      return start<64>(s, op, plan, rows);
    case 120:
      return start<120>(s, op, plan, rows);
    case 128:
      return start<128>(s, op, plan, rows);
    case 176:
      return start<176>(s, op, plan, rows);
    case 184:
      return start<184>(s, op, plan, rows);
    case 192:
      return start<192>(s, op, plan, rows);
    case 200:
      return start<200>(s, op, plan, rows);
    default:
      return start<240>(s, op, plan, rows);
  }
}

}  // namespace servoflow::ops::cuda
