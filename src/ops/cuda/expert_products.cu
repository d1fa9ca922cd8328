// Products of the expert: 32 or 64 weight rows per block, all rows of x (64 at a time), on mma.sync.
//
// A thread needs 16 bytes of two weight rows and of four rows of x for every 32 of depth, and takes them as
// they lie in memory: the order of a dot product's terms is free as long as both sides agree, so the eight
// values that one thread reads in a row stand for the eight that the instruction would pick from two places.
// Weights wait in shared memory; x goes from L2 to registers, several chunks ahead. Eight warps: four slices
// of the depth, and for each the lower and the upper half of the rows.
#include "ops/cuda/expert.cuh"
#include "ops/cuda/hopper.cuh"

namespace servoflow::ops::cuda {
namespace {

constexpr int kThreads = 256, kRows = 64, kSlices = 4;
constexpr int kOwned = kRows / 2 / 4 * 16;  // float4 that a block of a cluster of four finishes

enum class Kind : std::uint8_t { kQkv, kGateUp, kResidual };

// kTiles: of 16 weight rows. kChunks: of 32 depth per slice. kCluster: blocks that split the depth.
template <int kTiles, int kChunks, int kCluster>
struct Shape {
  static constexpr int kBlockDepth = kSlices * kChunks * 32, kDepth = kBlockDepth * kCluster;
  static constexpr int kMain = kTiles * kChunks * kSlices * 1024;  // weights, then the slices' sums
  static constexpr int kReceived = kCluster > 1 ? kCluster* kOwned * 16 : 0;
  static constexpr int kKept = kMain + kReceived;  // what threads keep for the end, and a barrier
  static constexpr int kKeptSlots = kCluster > 1 ? 2 : kTiles > 2 ? kTiles : 3 * kTiles + 2;
  static constexpr int kSharedBytes = kKept + kKeptSlots * kThreads * 8 + 16;
  static constexpr int kAhead = kTiles > 2 ? 2 : 3;
  static_assert(kMain >= kSlices * kTiles * 8 * 32 * 16);
};

template <Kind kKind, int kTiles, int kChunks, int kCluster>
__global__ void SF_CLUSTER(kCluster) __launch_bounds__(kThreads, 2)
    expert_product_kernel(const __grid_constant__ ExpertProduct op) {
#if __CUDA_ARCH__ >= 900
  using S = Shape<kTiles, kChunks, kCluster>;
  extern __shared__ __align__(128) std::uint8_t shared[];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int slice = warp / 2, half = warp % 2;
  const int piece = lane % 4 * 64 + lane / 4 * 8;  // this thread's 16 bytes of 8 rows by 32 of depth
  const int tile = static_cast<int>(blockIdx.x) / kCluster, rank = static_cast<int>(blockIdx.x) % kCluster;
  constexpr int kDeep = S::kDepth / 32;  // tiles from one group of eight rows to the next
  const int chunk0 = (rank * kSlices + slice) * kChunks;
  const std::uint32_t received = shared_address(shared) + S::kMain;
  const std::uint32_t barrier = shared_address(shared) + S::kSharedBytes - 16;
  if constexpr (kCluster > 1) {
    if (thread == 0) {
      barrier_init(barrier, 1);
      barriers_ready();
    }
    __syncwarp();
    cluster_arrive();
  }
  const auto* slots = reinterpret_cast<const uint4*>(shared) + slice * 2 * kTiles * kChunks * 32 + lane;
  const auto fetch_weights = [&] {
    const int row_tiles = op.w.padded_n / 8;
    const auto* from = static_cast<const __nv_bfloat16*>(op.weight) + tile * 2 * kTiles * 1024 + piece;
    asm volatile("" : "+l"(from));  // its multiples are not worth registers that live through the loop
    // Rows g, g + 8, g + 16 …; the two warps of a slice fetch every other chunk each.
#pragma unroll
    for (int r = 0; r < 2 * kTiles; ++r)
#pragma unroll
      for (int c = 0; c < kChunks / 2; ++c) {
        const int depth = chunk0 + 2 * c + half;  // of 32 columns
        copy_async(shared_address(slots + (r * kChunks + 2 * c + half) * 32),
                   from + (depth / 4 * row_tiles + r) * 1024 + depth % 4 * 256, 16);
      }
    copy_commit();
  };
  fetch_weights();

  // What this thread ends: the rows 8 warp + 2 (lane % 4) and the next of every 64, of the pairs lane / 4 of
  // every 16 weight rows. What it needs for that and has nothing to do with x it fetches now and keeps, as
  // the count and the segments were there before this inference's first kernel.
  const int rows = valid(op.rows), end_row = 8 * warp + lane % 4 * 2, pair0 = tile * 8 * kTiles + lane / 4;
  const int owned_first = 2 * (tile * 16 + thread % 16);
  float2* kept = reinterpret_cast<float2*>(shared + S::kKept) + thread;
  const auto keep_angles = [&](int row0) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      Segment segment{.slot = -1};
      if (row0 + end_row + e >= rows ||
          !find_segment(op.qkv.segments, valid(op.qkv.segment_count), row0 + end_row + e, segment))
        segment = {.slot = -1};
      const int position = segment.past + row0 + end_row + e - segment.row_begin;
      reinterpret_cast<int2*>(kept)[(3 * kTiles + e) * kThreads] = make_int2(segment.slot, position);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        int first, second;
        pair_features(op.w, pair0 + m * 8, first, second);
        const DeviceQkv::Place place = op.qkv.place(first, second);
        kept[(kTiles + 2 * m + e) * kThreads] =
            segment.slot >= 0 && op.qkv.rotates(place) ? op.qkv.angle(place, position) : make_float2(1, 0);
      }
    }
  };
  if constexpr (kKind == Kind::kResidual) {
    if (thread < kOwned) {
      kept[0] = *reinterpret_cast<const float2*>(op.gate + owned_first);
      if (op.next_scale != nullptr)
        kept[kThreads] = *reinterpret_cast<const float2*>(op.next_scale + owned_first);
    }
  } else {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      int first, second;
      pair_features(op.w, pair0 + m * 8, first, second);
      kept[m * kThreads] = make_float2(__ldg(op.shift + first), __ldg(op.shift + second));
    }
    if constexpr (kKind == Kind::kQkv) keep_angles(0);
  }
  wait_for_inputs();
  release_successor();
  if constexpr (kCluster > 1) cluster_wait();  // the others' barriers stand

  std::uint32_t parity = 0;
  for (int row0 = 0; row0 < rows; row0 += kRows, parity ^= 1) {
    const int tiles = min(8, (rows - row0 + 7) / 8) - 4 * half;  // of this warp's four
    float sum[kTiles][4][4] = {};
    uint4 x[S::kAhead][4];
    const int first_tile = tiles > 0 ? row0 / 8 + 4 * half : 0;
    const __nv_bfloat16* in = op.x + (first_tile * kDeep + chunk0) * 256 + piece;
    const auto fetch_rows = [&](int c) {  // a tile that does not exist is read as another that does
#pragma unroll
      for (int j = 0; j < 4; ++j)
        x[c % S::kAhead][j] =
            __ldcg(reinterpret_cast<const uint4*>(in + ((j < tiles ? j * kDeep : 0) + c) * 256));
    };
#pragma unroll
    for (int c = 0; c < S::kAhead; ++c) fetch_rows(c);

    float2 old[2] = {};
    float4 squares[2] = {};
    const int owned_row = row0 + 2 * (thread / 16 * 4 + rank);
    if constexpr (kKind == Kind::kResidual) {
      if (thread == 0) {
        const int pairs = (min(kRows, rows - row0) + 1) / 2;
        barrier_expect(barrier, static_cast<std::uint32_t>((pairs - rank + 3) / 4 * 16 * 16 * kCluster));
      }
      if (thread < kOwned)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (owned_row + e < rows)
            old[e] = *reinterpret_cast<const float2*>(op.residual + (owned_row + e) * op.residual_pitch +
                                                      owned_first);
    } else {
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (row0 + end_row + e < rows)
          squares[e] =
              reinterpret_cast<const float4*>(op.squares + (row0 + end_row + e) * kStatParts)[lane / 4];
    }
    copy_wait<0>();
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        const uint4 low = slots[(2 * m * kChunks + c) * 32], high = slots[((2 * m + 1) * kChunks + c) * 32];
        const std::uint32_t a[4] = {low.x, high.x, low.y, high.y}, b[4] = {low.z, high.z, low.w, high.w};
        // Two products of one sum apart from each other: the second would wait for the first.
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (j < tiles) mma(sum[m][j], a, x[c % S::kAhead][j].x, x[c % S::kAhead][j].y);
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (j < tiles) mma(sum[m][j], b, x[c % S::kAhead][j].z, x[c % S::kAhead][j].w);
      }
      if (c + S::kAhead < kChunks) fetch_rows(c + S::kAhead);
    }

    // The slices meet in shared memory and are added in order.
    __syncthreads();
    float4* sums = reinterpret_cast<float4*>(shared);
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (j < tiles)
          sums[((slice * kTiles + m) * 8 + 4 * half + j) * 32 + lane] =
              make_float4(sum[m][j][0], sum[m][j][1], sum[m][j][2], sum[m][j][3]);
    // Meanwhile: 1 / rms of the two rows.
    float inverse[2] = {};
    if constexpr (kKind != Kind::kResidual) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float total = squares[e].x + squares[e].y + (squares[e].z + squares[e].w);
        total += __shfl_xor_sync(~0u, total, 4);
        total += __shfl_xor_sync(~0u, total, 8);
        total += __shfl_xor_sync(~0u, total, 16);
        inverse[e] = 1.0f / sqrtf(total / static_cast<float>(kExpertWidth) + kExpertEps);
      }
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      if (row0 + end_row >= rows) break;
      float4 v = make_float4(0, 0, 0, 0);
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
        const float4 part = sums[((s * kTiles + m) * 8 + warp) * 32 + lane];
        v.x += part.x;
        v.y += part.y;
        v.z += part.z;
        v.w += part.w;
      }
      if constexpr (kKind == Kind::kResidual) {
        // Two rows of every eight belong to each block of the cluster.
        send(received + static_cast<std::uint32_t>((rank * kOwned + warp * 16 + m * 8 + lane / 4) * 16),
             barrier, lane % 4, v);
      } else {
        int first, second;
        pair_features(op.w, pair0 + m * 8, first, second);
        const float2 shift = kept[m * kThreads];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int row = row0 + end_row + e;
          if (row >= rows) break;
          const float a = (e == 0 ? v.x : v.y) * inverse[e] + shift.x;
          const float b = (e == 0 ? v.z : v.w) * inverse[e] + shift.y;
          if constexpr (kKind == Kind::kGateUp) {
            op.y[tiled_at(row, first, kExpertMlp)] = __float2bfloat16(gelu(a) * b);
          } else {
            const int2 at = reinterpret_cast<const int2*>(kept)[(3 * kTiles + e) * kThreads];
            if (at.x >= 0)
              op.qkv.put(op.qkv.place(first, second), at.x, at.y, row, kept[(kTiles + 2 * m + e) * kThreads],
                         a, b);
          }
        }
      }
    }

    if constexpr (kKind == Kind::kResidual) {
      if (thread < kOwned) {
        const float2 gate = kept[0], scale = kept[kThreads];
        barrier_wait(barrier, parity);
        float square[2] = {};
        const float4* parts = reinterpret_cast<const float4*>(shared + S::kMain) + thread;
        float4 v = make_float4(0, 0, 0, 0);
        if (owned_row < rows) v = parts[0];
#pragma unroll
        for (int i = 1; i < kCluster; ++i)
          if (owned_row < rows) {
            const float4 part = parts[i * kOwned];
            v.x += part.x;
            v.y += part.y;
            v.z += part.z;
            v.w += part.w;
          }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int row = owned_row + e;
          if (row < rows) {
            const float a = old[e].x + (e == 0 ? v.x : v.y) * gate.x,
                        b = old[e].y + (e == 0 ? v.z : v.w) * gate.y;
            *reinterpret_cast<float2*>(op.residual + row * op.residual_pitch + owned_first) =
                make_float2(a, b);
            square[e] = a * a + b * b;
            if (op.next_scale != nullptr)
              *reinterpret_cast<std::uint32_t*>(op.scaled + tiled_at(row, owned_first, kExpertWidth)) =
                  pack_bf16(a * (1.0f + scale.x), b * (1.0f + scale.y));
          }
#pragma unroll
          for (int step = 8; step > 0; step /= 2) square[e] += __shfl_xor_sync(~0u, square[e], step);
          if (thread % 16 == 0 && row < rows) op.next_squares[row * kStatParts + tile] = square[e];
        }
      }
    }
    if (row0 + kRows < rows) {
      if constexpr (kCluster > 1) cluster_sync();
      __syncthreads();
      fetch_weights();
      if constexpr (kKind == Kind::kQkv) keep_angles(row0 + kRows);
    }
  }
#endif
}

template <Kind kKind, int kTiles, int kChunks, int kCluster>
cudaError_t start(const Stream& s, const ExpertProduct& op) {
  constexpr int kShared = Shape<kTiles, kChunks, kCluster>::kSharedBytes;
  const auto kernel = expert_product_kernel<kKind, kTiles, kChunks, kCluster>;
  static_assert(kShared <= 227 * 1024);
  if (const cudaError_t e =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
      e != cudaSuccess)
    return e;
  return launch(s, dim3(static_cast<unsigned>(op.w.n / (16 * kTiles) * kCluster)), kThreads, kShared, kernel,
                op);
}

}  // namespace

cudaError_t expert_qkv(const Stream& s, const ExpertProduct& op) { return start<Kind::kQkv, 2, 8, 1>(s, op); }
cudaError_t expert_gate_up(const Stream& s, const ExpertProduct& op) {
  return start<Kind::kGateUp, 4, 8, 1>(s, op);
}
cudaError_t expert_out(const Stream& s, const ExpertProduct& op) {
  return start<Kind::kResidual, 2, 4, 4>(s, op);
}
cudaError_t expert_down(const Stream& s, const ExpertProduct& op) {
  return start<Kind::kResidual, 2, 8, 4>(s, op);
}

}  // namespace servoflow::ops::cuda
