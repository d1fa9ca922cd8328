// softmax(q kᵀ scale) v over ragged segments. Heads that share a key/value head are rows of one tile: row
// r * group + h of a segment is head h of token r. Keys are taken 64 at a time from position 0, so the order
// of summation depends on how many there are and on nothing else.
#include "ops/cuda/kernels.h"

namespace servoflow::ops::cuda {
namespace {

// ---- without tensor cores: one block per (head, row), any head size and dtype
constexpr int kPlainThreads = 128;

__global__ void __launch_bounds__(kPlainThreads)
    attention_plain_kernel(const __grid_constant__ DeviceAttention op) {
  extern __shared__ float scores[];
  __shared__ float reduced[kPlainThreads / 32];
  wait_for_inputs();
  release_successor();
  const int row = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y), d = op.head_dim;
  const int thread = static_cast<int>(threadIdx.x);
  Segment s;
  if (!find_segment(op.segments.device, valid(op.segments.count), row, s)) return;
  const int count = s.past + s.rows, kv_head = head / (op.heads / op.kv_heads);
  const std::int64_t q = (static_cast<std::int64_t>(row) * op.heads + head) * d;
  const std::int64_t first = (static_cast<std::int64_t>(s.slot) * op.kv_heads + kv_head) * op.keys * d;
  const auto reduce = [&](float v, bool largest) {
    for (int step = 16; step > 0; step /= 2) {
      const float other = __shfl_xor_sync(~0u, v, step);
      v = largest ? fmaxf(v, other) : v + other;
    }
    __syncthreads();
    if (thread % 32 == 0) reduced[thread / 32] = v;
    __syncthreads();
    v = reduced[0];
    for (int i = 1; i < kPlainThreads / 32; ++i) v = largest ? fmaxf(v, reduced[i]) : v + reduced[i];
    return v;
  };
  float most = -INFINITY;
  for (int key = thread; key < count; key += kPlainThreads) {
    float dot = 0;
    for (int c = 0; c < d; ++c)
      dot = fmaf(load_element(op.q, op.f32, q + c),
                 load_element(op.k, op.f32, first + static_cast<std::int64_t>(key) * d + c), dot);
    scores[key] = dot * op.scale;
    most = fmaxf(most, scores[key]);
  }
  most = reduce(most, true);
  float total = 0;
  for (int key = thread; key < count; key += kPlainThreads) {
    scores[key] = expf(scores[key] - most);
    total += scores[key];
  }
  total = reduce(total, false);
  for (int c = thread; c < d; c += kPlainThreads) {
    float sum = 0;
    for (int key = 0; key < count; ++key)
      sum =
          fmaf(scores[key], load_element(op.v, op.f32, first + static_cast<std::int64_t>(key) * d + c), sum);
    store_element(op.out.data, op.out.dtype == DType::kF32, row * op.out.pitch + head * d + c, sum / total);
  }
}

// ---- on tensor cores: 64 rows by 64 keys; four warps hold 16 rows each over the first 32 keys of every
// block of keys, four more over the other 32, and the two halves are joined at the end
constexpr int kTileRows = 64, kTileKeys = 64, kThreads = 256;

template <int kDim>
struct Shape {
  static constexpr int kPitch = kDim + 8;  // elements; eight rows then start in eight different banks
  static constexpr int kTileBytes = 64 * kPitch * 2;
  static constexpr int kSharedBytes = 5 * kTileBytes;
};

template <int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    attention_mma_kernel(const __grid_constant__ DeviceAttention op) {
  using S = Shape<kDim>;
  extern __shared__ __align__(128) std::uint8_t shared[];
  wait_for_inputs();
  release_successor();
  if (static_cast<int>(blockIdx.z) >= valid(op.segments.count)) return;
  const Segment s = op.segments.device[blockIdx.z];
  const int d = op.head_dim, group = op.heads / op.kv_heads, kv_head = static_cast<int>(blockIdx.y);
  const int rows = s.rows * group, row0 = static_cast<int>(blockIdx.x) * kTileRows;
  if (row0 >= rows) return;
  const int count = s.past + s.rows, key_blocks = (count + kTileKeys - 1) / kTileKeys;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int slab = warp % 4 * 16, half = warp / 4;
  const std::uint32_t q_tile = shared_address(shared);
  const std::int64_t cache0 = (static_cast<std::int64_t>(s.slot) * op.kv_heads + kv_head) * op.keys * d;
  const auto* q = static_cast<const __nv_bfloat16*>(op.q);
  const auto* k = static_cast<const __nv_bfloat16*>(op.k) + cache0;
  const auto* v = static_cast<const __nv_bfloat16*>(op.v) + cache0;

  constexpr int kPieces = kDim / 8;
  // Where the head size allows, a thread fetches the same columns of rows a fixed distance apart.
  constexpr bool kRegular = kThreads % kPieces == 0;
  const auto load_keys = [&](int block) {
    if (block < key_blocks) {
      const std::uint32_t to = q_tile + S::kTileBytes * (1 + 2 * (block % 2));
      if constexpr (kRegular) {
        constexpr int kStep = kThreads / kPieces;
        const int r0 = thread / kPieces, c = thread % kPieces * 8, below = count - block * kTileKeys - r0;
        const std::int64_t from = static_cast<std::int64_t>(block * kTileKeys + r0) * d + c;
        const std::uint32_t at = to + static_cast<std::uint32_t>((r0 * S::kPitch + c) * 2);
        const auto *from_k = k + from, *from_v = v + from;
#pragma unroll
        for (int i = 0; i < 64 / kStep; ++i) {
          const int bytes = i * kStep < below && c < d ? 16 : 0;
          const int row = bytes > 0 ? i * kStep * d : 0;
          copy_async(at + i * kStep * S::kPitch * 2, bytes > 0 ? from_k + row : k, bytes);
          copy_async(at + S::kTileBytes + i * kStep * S::kPitch * 2, bytes > 0 ? from_v + row : v, bytes);
        }
      } else {
        for (int i = thread; i < 64 * kPieces; i += kThreads) {
          const int r = i / kPieces, c = i % kPieces * 8, key = block * kTileKeys + r;
          const int bytes = key < count && c < d ? 16 : 0;
          const std::int64_t from = bytes > 0 ? static_cast<std::int64_t>(key) * d + c : 0;
          const std::uint32_t at = static_cast<std::uint32_t>((r * S::kPitch + c) * 2);
          copy_async(to + at, k + from, bytes);
          copy_async(to + S::kTileBytes + at, v + from, bytes);
        }
      }
    }
    copy_commit();
  };
  for (int i = thread; i < 64 * kPieces; i += kThreads) {
    const int r = i / kPieces, c = i % kPieces * 8, row = row0 + r;
    const int bytes = row < rows && c < d ? 16 : 0;
    const std::int64_t from = bytes > 0 ? (static_cast<std::int64_t>(s.row_begin + row / group) * op.heads +
                                           kv_head * group + row % group) *
                                                  d +
                                              c
                                        : 0;
    copy_async(q_tile + static_cast<std::uint32_t>((r * S::kPitch + c) * 2), q + from, bytes);
  }
  load_keys(0);

  float o[kDim / 8][4] = {};
  float most[2] = {-1e30f, -1e30f}, total[2] = {};
  const float factor = op.scale * kLog2E;
  for (int block = 0; block < key_blocks; ++block) {
    load_keys(block + 1);
    copy_wait<1>();
    __syncthreads();
    const std::uint32_t k_tile = q_tile + S::kTileBytes * (1 + 2 * (block % 2)),
                        v_tile = k_tile + S::kTileBytes;
    float p[4][4] = {};
#pragma unroll
    for (int c = 0; c < kDim / 16; ++c) {
      std::uint32_t a[4], b[2][4];
      load_matrix(a, q_tile + ((slab + lane % 16) * S::kPitch + 16 * c + lane / 16 * 8) * 2);
#pragma unroll
      for (int i = 0; i < 2; ++i)
        load_matrix(b[i], k_tile + ((half * 32 + 16 * i + lane % 8 + lane / 16 * 8) * S::kPitch + 16 * c +
                                    lane / 8 % 2 * 8) *
                                       2);
#pragma unroll
      for (int j = 0; j < 4; ++j) mma(p[j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
    const int key0 = block * kTileKeys + half * 32 + lane % 4 * 2;
    float block_most[2] = {-1e30f, -1e30f};
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        p[j][e] = key0 + 8 * j + e % 2 < count ? p[j][e] * factor : -INFINITY;
        block_most[e / 2] = fmaxf(block_most[e / 2], p[j][e]);
      }
    float shrink[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      block_most[r] = fmaxf(block_most[r], __shfl_xor_sync(~0u, block_most[r], 1));
      block_most[r] = fmaxf(block_most[r], __shfl_xor_sync(~0u, block_most[r], 2));
      const float now = fmaxf(most[r], block_most[r]);
      shrink[r] = exp2f(most[r] - now);
      most[r] = now;
      total[r] *= shrink[r];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        p[j][e] = exp2f(p[j][e] - most[e / 2]);
        total[e / 2] += p[j][e];
      }
#pragma unroll
    for (int c = 0; c < kDim / 8; ++c)
#pragma unroll
      for (int e = 0; e < 4; ++e) o[c][e] *= shrink[e / 2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const std::uint32_t a[4] = {pack_bf16(p[2 * j][0], p[2 * j][1]), pack_bf16(p[2 * j][2], p[2 * j][3]),
                                  pack_bf16(p[2 * j + 1][0], p[2 * j + 1][1]),
                                  pack_bf16(p[2 * j + 1][2], p[2 * j + 1][3])};
#pragma unroll
      for (int c = 0; c < kDim / 16; ++c) {
        std::uint32_t b[4];
        load_matrix_transposed(
            b, v_tile + ((half * 32 + 16 * j + lane % 16) * S::kPitch + 16 * c + lane / 16 * 8) * 2);
        mma(o[2 * c], a, b[0], b[1]);
        mma(o[2 * c + 1], a, b[2], b[3]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    total[r] += __shfl_xor_sync(~0u, total[r], 1);
    total[r] += __shfl_xor_sync(~0u, total[r], 2);
  }

  // The second half's warps hand over what they have; 32 threads x (kDim / 2 + 4) floats each.
  float* handed = reinterpret_cast<float*>(shared) + (warp % 4) * 32 * (kDim / 2 + 4);
  copy_wait<0>();
  __syncthreads();
  if (half == 1) {
#pragma unroll
    for (int c = 0; c < kDim / 8; ++c)
#pragma unroll
      for (int e = 0; e < 4; ++e) handed[(c * 4 + e) * 32 + lane] = o[c][e];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      handed[(kDim / 2 + r) * 32 + lane] = most[r];
      handed[(kDim / 2 + 2 + r) * 32 + lane] = total[r];
    }
  }
  __syncthreads();
  if (half == 1) return;
  float mine[2], other[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float m = handed[(kDim / 2 + r) * 32 + lane], t = handed[(kDim / 2 + 2 + r) * 32 + lane];
    const float both = fmaxf(most[r], m);
    mine[r] = exp2f(most[r] - both);
    other[r] = exp2f(m - both);
    const float inverse = 1.0f / (total[r] * mine[r] + t * other[r]);
    mine[r] *= inverse;
    other[r] *= inverse;
  }
  const bool f32 = op.out.dtype == DType::kF32;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = row0 + slab + lane / 4 + 8 * r;
    if (row >= rows) continue;
    const std::int64_t to = (s.row_begin + row / group) * op.out.pitch + (kv_head * group + row % group) * d;
#pragma unroll
    for (int c = 0; c < kDim / 8; ++c) {
      const int column = 8 * c + lane % 4 * 2;
      if (column >= d) continue;
      const float v0 = o[c][2 * r] * mine[r] + handed[(c * 4 + 2 * r) * 32 + lane] * other[r];
      const float v1 = o[c][2 * r + 1] * mine[r] + handed[(c * 4 + 2 * r + 1) * 32 + lane] * other[r];
      if (f32) {
        float* out = static_cast<float*>(op.out.data) + to + column;
        out[0] = v0;
        out[1] = v1;
      } else {
        *reinterpret_cast<std::uint32_t*>(static_cast<__nv_bfloat16*>(op.out.data) + to + column) =
            pack_bf16(v0, v1);
      }
    }
  }
}

template <int kDim>
cudaError_t start(const Stream& s, const DeviceAttention& op) {
  constexpr int kShared = Shape<kDim>::kSharedBytes;
  static_assert(kShared >= 4 * 32 * (kDim / 2 + 4) * 4);
  const cudaError_t prepared =
      cudaFuncSetAttribute(attention_mma_kernel<kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (prepared != cudaSuccess) return prepared;
  const int group = op.heads / op.kv_heads;
  const dim3 grid(blocks(static_cast<std::int64_t>(op.segments.max_rows) * group, kTileRows),
                  static_cast<unsigned>(op.kv_heads), static_cast<unsigned>(op.segments.count.capacity));
  return launch(s, grid, kThreads, kShared, attention_mma_kernel<kDim>, op);
}

}  // namespace

cudaError_t attention_plain(const Stream& s, const DeviceAttention& op) {
  const std::size_t shared = static_cast<std::size_t>(op.segments.max_keys) * sizeof(float);
  if (shared > 40000) {
    const cudaError_t e = cudaFuncSetAttribute(
        attention_plain_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (e != cudaSuccess) return e;
  }
  return launch(s, dim3(static_cast<unsigned>(op.out.rows), static_cast<unsigned>(op.heads)), kPlainThreads,
                shared, attention_plain_kernel, op);
}

bool attention_mma_takes(int head_dim) { return head_dim % 8 == 0 && head_dim <= 256; }

cudaError_t attention_mma(const Stream& s, const DeviceAttention& op) {
  if (op.head_dim <= 32) return start<32>(s, op);
  if (op.head_dim <= 64) return start<64>(s, op);
  if (op.head_dim <= 80) return start<80>(s, op);
  if (op.head_dim <= 128) return start<128>(s, op);
  return start<256>(s, op);
}

}  // namespace servoflow::ops::cuda
