// Products of the expert: 32 or 64 weight rows per block, all rows of x (56 at a time), on mma.sync.
//
// A thread needs 16 bytes of two weight rows and of seven rows of x for every 32 of depth, and takes them as
// they lie in memory: the order of a dot product's terms is free as long as both sides agree, so the eight
// values that one thread reads in a row stand for the eight that the instruction would pick from two places.
// Weights wait in shared memory as copies private to their thread; x goes from L2 to registers.
#include "ops/cuda/expert.cuh"
#include "ops/cuda/hopper.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define SF_CLUSTER(n)
#else
#define SF_CLUSTER(n) __cluster_dims__(n, 1, 1)
#endif

namespace servoflow::ops::cuda {
namespace {

constexpr int kThreads = 256, kRows = 56, kRowTiles = kRows / 8;
constexpr int kOwned = kRows / 2 / 4 * 16;  // float4 that a block of four finishes

enum class Kind : std::uint8_t { kQkv, kGateUp, kResidual };

// kGroups: groups of 32 weight rows, a warp each; the other warps split the depth. kChunks: of 32 depth per
// warp. kCluster: blocks that split the depth.
template <int kGroups, int kChunks, int kCluster>
struct Shape {
  static constexpr int kSlices = 8 / kGroups;
  static constexpr int kBlockDepth = kSlices * kChunks * 32, kDepth = kBlockDepth * kCluster;
  static constexpr int kWeightBytes = 4 * kChunks * kThreads * 16;
  static constexpr int kSumBytes = 8 * 2 * kRowTiles * 32 * 16;  // aliases the weights
  static constexpr int kMain = kWeightBytes > kSumBytes ? kWeightBytes : kSumBytes;
  static constexpr int kSharedBytes = kMain + (kCluster > 1 ? kCluster * kOwned * 16 : kRows * 4);
};

__device__ __forceinline__ void store_to_block(std::uint32_t shared, int rank, const float4& v) {
  asm volatile(
      "{.reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1; "
      "st.shared::cluster.v4.f32 [remote], {%2, %3, %4, %5};}" ::"r"(shared),
      "r"(rank), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
      : "memory");
}

template <Kind kKind, int kGroups, int kChunks, int kCluster>
__global__ void SF_CLUSTER(kCluster) __launch_bounds__(kThreads, 2)
    expert_product_kernel(const __grid_constant__ ExpertProduct op) {
#if __CUDA_ARCH__ >= 900
  using S = Shape<kGroups, kChunks, kCluster>;
  extern __shared__ __align__(128) std::uint8_t shared[];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int slice = warp / kGroups, group = warp % kGroups;
  const int tile = static_cast<int>(blockIdx.x) / kCluster, rank = static_cast<int>(blockIdx.x) % kCluster;
  const int depth0 = rank * S::kBlockDepth + slice * kChunks * 32 + lane % 4 * 8;
  const std::uint32_t weights = shared_address(shared) + static_cast<std::uint32_t>(thread) * 16;

  const auto fetch_weights = [&] {
    const auto* from = static_cast<const __nv_bfloat16*>(op.weight) +
                       (tile * 32 * kGroups + group * 32 + lane / 4) * S::kDepth + depth0;
#pragma unroll
    for (int r = 0; r < 4; ++r)  // rows g, g + 8, g + 16, g + 24
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
        copy_async(weights + static_cast<std::uint32_t>((r * kChunks + c) * kThreads * 16),
                   from + r * 8 * S::kDepth + c * 32, 16);
    copy_commit();
  };
  fetch_weights();
  if constexpr (kCluster > 1) cluster_sync();  // the others have begun: their shared memory may be written
  wait_for_inputs();
  release_successor();
  const int rows = valid(op.rows);

  for (int row0 = 0; row0 < rows; row0 += kRows) {
    const int tiles = min(kRowTiles, (rows - row0 + 7) / 8);
    float* inverse = reinterpret_cast<float*>(shared + S::kMain);
    float2 old[2] = {};
    if constexpr (kKind == Kind::kResidual) {
      if (thread < kOwned) {
        const int row = row0 + 2 * (rank * 7 + thread / 16), first = 2 * (tile * 16 + thread % 16);
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (row + e < rows)
            old[e] = *reinterpret_cast<const float2*>(op.residual + (row + e) * op.residual_pitch + first);
      }
    } else if (thread < kRows && row0 + thread < rows) {
      const float4* parts = reinterpret_cast<const float4*>(op.squares + (row0 + thread) * kStatParts);
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kStatParts / 4; ++i) {
        const float4 v = parts[i];
        sum += v.x + v.y + (v.z + v.w);
      }
      inverse[thread] = 1.0f / sqrtf(sum / static_cast<float>(kExpertWidth) + kExpertEps);
    }

    float sum[2][kRowTiles][4] = {};
    uint4 x[2][kRowTiles];
    const int first_row = min(row0 + lane / 4, rows - 1), below = rows - first_row;
    const __nv_bfloat16* in = op.x + first_row * S::kDepth + depth0;
    const auto fetch_rows = [&](int c) {  // a row that does not exist is read as another that does
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j)
        x[c % 2][j] = *reinterpret_cast<const uint4*>(in + (8 * j < below ? 8 * j * S::kDepth : 0) + c * 32);
    };
    fetch_rows(0);
    copy_wait<0>();
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (c + 1 < kChunks) fetch_rows(c + 1);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const uint4 low =
            *reinterpret_cast<const uint4*>(shared + ((2 * m * kChunks + c) * kThreads + thread) * 16);
        const uint4 high =
            *reinterpret_cast<const uint4*>(shared + (((2 * m + 1) * kChunks + c) * kThreads + thread) * 16);
        const std::uint32_t a[4] = {low.x, high.x, low.y, high.y}, b[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
        for (int j = 0; j < kRowTiles; ++j)
          if (j < tiles) {
            mma(sum[m][j], a, x[c % 2][j].x, x[c % 2][j].y);
            mma(sum[m][j], b, x[c % 2][j].z, x[c % 2][j].w);
          }
      }
    }

    // Every warp's sums meet in shared memory and are added slice by slice.
    __syncthreads();
    float4* sums = reinterpret_cast<float4*>(shared);
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j)
        if (j < tiles)
          sums[((warp * 2 + m) * kRowTiles + j) * 32 + lane] =
              make_float4(sum[m][j][0], sum[m][j][1], sum[m][j][2], sum[m][j][3]);
    __syncthreads();
    const std::uint32_t received = shared_address(shared) + S::kMain;
#pragma unroll
    for (int item = thread; item < kGroups * 2 * kRowTiles * 32; item += kThreads) {
      const int block = item / 32, j = block % kRowTiles, m = block / kRowTiles % 2,
                g = block / kRowTiles / 2;
      const int from = item % 32, row = row0 + 8 * j + from % 4 * 2;
      if (row >= rows) continue;
      float4 v = make_float4(0, 0, 0, 0);
#pragma unroll
      for (int s = 0; s < S::kSlices; ++s) {
        const float4 part = sums[(((s * kGroups + g) * 2 + m) * kRowTiles + j) * 32 + from];
        v.x += part.x;
        v.y += part.y;
        v.z += part.z;
        v.w += part.w;
      }
      if constexpr (kKind == Kind::kResidual) {
        const int pair = j * 4 + from % 4, owner = pair / 7;
        store_to_block(
            received + static_cast<std::uint32_t>((rank * kOwned + pair % 7 * 16 + m * 8 + from / 4) * 16),
            owner, v);
      } else {
        int first, second;
        pair_features(op.w, (tile * kGroups + g) * 16 + m * 8 + from / 4, first, second);
        const float shift0 = op.shift[first], shift1 = op.shift[second];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (row + e >= rows) break;
          const float factor = inverse[row + e - row0];
          const float a = (e == 0 ? v.x : v.y) * factor + shift0, b = (e == 0 ? v.z : v.w) * factor + shift1;
          if constexpr (kKind == Kind::kGateUp) {
            op.y[(row + e) * op.y_pitch + first] = __float2bfloat16(gelu(a) * b);
          } else {
            Segment segment;
            if (find_segment(op.qkv.segments, valid(op.qkv.segment_count), row + e, segment))
              op.qkv.put(segment, row + e, first, second, a, b);
          }
        }
      }
    }

    if constexpr (kKind == Kind::kResidual) {
      cluster_sync();
      float squares[2] = {};
      const int row = row0 + 2 * (rank * 7 + thread / 16), first = 2 * (tile * 16 + thread % 16);
      if (thread < kOwned) {
        const float4* parts = reinterpret_cast<const float4*>(shared + S::kMain) + thread;
        float4 v = parts[0];
#pragma unroll
        for (int i = 1; i < kCluster; ++i) {
          const float4 part = parts[i * kOwned];
          v.x += part.x;
          v.y += part.y;
          v.z += part.z;
          v.w += part.w;
        }
        const float2 gate = *reinterpret_cast<const float2*>(op.gate + first);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (row + e >= rows) break;
          const float a = old[e].x + (e == 0 ? v.x : v.y) * gate.x,
                      b = old[e].y + (e == 0 ? v.z : v.w) * gate.y;
          *reinterpret_cast<float2*>(op.residual + (row + e) * op.residual_pitch + first) = make_float2(a, b);
          squares[e] = a * a + b * b;
          if (op.next_scale != nullptr) {
            const float2 scale = *reinterpret_cast<const float2*>(op.next_scale + first);
            *reinterpret_cast<std::uint32_t*>(op.scaled + (row + e) * op.scaled_pitch + first) =
                pack_bf16(a * (1.0f + scale.x), b * (1.0f + scale.y));
          }
        }
      }
      if (thread < 128) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
#pragma unroll
          for (int step = 8; step > 0; step /= 2) squares[e] += __shfl_xor_sync(~0u, squares[e], step);
          if (thread % 16 == 0 && thread < kOwned && row + e < rows)
            op.next_squares[(row + e) * kStatParts + tile] = squares[e];
        }
      }
    }
    if (row0 + kRows < rows) {
      if constexpr (kCluster > 1) cluster_sync();
      __syncthreads();
      fetch_weights();
    }
  }
#endif
}

template <Kind kKind, int kGroups, int kChunks, int kCluster>
cudaError_t start(const Stream& s, const ExpertProduct& op) {
  constexpr int kShared = Shape<kGroups, kChunks, kCluster>::kSharedBytes;
  const auto kernel = expert_product_kernel<kKind, kGroups, kChunks, kCluster>;
  static_assert(kShared <= 227 * 1024);
  if (const cudaError_t e =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
      e != cudaSuccess)
    return e;
  const int rows = op.w.order == RowOrder::kGated ? op.w.n : op.w.n;
  return launch(s, dim3(static_cast<unsigned>(rows / (32 * kGroups) * kCluster)), kThreads, kShared, kernel,
                op);
}

}  // namespace

cudaError_t expert_qkv(const Stream& s, const ExpertProduct& op) { return start<Kind::kQkv, 1, 4, 1>(s, op); }
cudaError_t expert_gate_up(const Stream& s, const ExpertProduct& op) {
  return start<Kind::kGateUp, 2, 8, 1>(s, op);
}
cudaError_t expert_out(const Stream& s, const ExpertProduct& op) {
  return start<Kind::kResidual, 1, 2, 4>(s, op);
}
cudaError_t expert_down(const Stream& s, const ExpertProduct& op) {
  return start<Kind::kResidual, 1, 4, 4>(s, op);
}

}  // namespace servoflow::ops::cuda
