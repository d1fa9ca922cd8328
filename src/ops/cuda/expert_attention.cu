// Attention of suffix rows: 32 (row, head) pairs per cluster of eight blocks, each block an eighth of the
// keys. The prefix's keys and values are fetched before the queries exist. A kernel of the loop lets its
// successor start after its own wait, so that all before the loop is complete by then. How the keys are split
// depends on their number alone, and the eight partial results are joined in order.
#include "ops/cuda/expert.cuh"
#include "ops/cuda/hopper.cuh"

namespace servoflow::ops::cuda {
namespace {

constexpr int kThreads = 256, kBlocks = 8, kTile = 32, kDim = kExpertHeadDim;
constexpr int kPitch = kDim + 8, kQueryBytes = kTile * kPitch * 2;
constexpr float kNothing = -1e30f;

// Keys of one block: a multiple of 32.
__host__ __device__ __forceinline__ int keys_per_block(int keys) {
  return (keys + 32 * kBlocks - 1) / (32 * kBlocks) * 32;
}

struct Layout {
  int keys, values, weights, maxima, received, barrier, bytes;  // offsets; queries lie at 0
};
// What one block sends to another: 32 columns of every row's sum, and every row's maximum and total.
constexpr int kSentPitch = 36, kSentSums = kTile * kSentPitch * 4, kSent = kSentSums + kTile * 8;
__host__ __device__ __forceinline__ Layout layout_for(int block_keys) {
  Layout l{};
  const int side = block_keys * kPitch * 2, exchanged = kBlocks * kSent;
  l.keys = kQueryBytes;
  l.values = l.keys + (side > exchanged ? side : exchanged);  // what is sent takes the keys' place
  l.received = l.values;                                      // and what is received the values'
  l.weights = l.values + (side > exchanged ? side : exchanged);
  l.maxima = l.weights + kTile * (block_keys + 8) * 2;
  l.barrier = l.maxima + 2 * kTile * 4 * 4;
  l.bytes = l.barrier + 16;
  return l;
}

__global__ void SF_CLUSTER(kBlocks) __launch_bounds__(kThreads, 1)
    expert_attention_kernel(const __grid_constant__ ExpertAttention op) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) std::uint8_t shared[];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int rank = static_cast<int>(cluster_rank());
  const int tile = static_cast<int>(blockIdx.x) / kBlocks;
  // Segments were uploaded before the first kernel of this inference began.
  const bool some = static_cast<int>(blockIdx.y) < valid(op.segments.count);
  const Segment s = some ? op.segments.device[blockIdx.y] : Segment{};
  const int rows = s.rows * kExpertHeads, row0 = tile * kTile;
  if (row0 >= rows) return wait_for_inputs();  // the whole cluster: tile and segment are the same in it
  const int count = s.past + s.rows, per = keys_per_block(count), key0 = rank * per;
  const Layout at = layout_for(per);
  const std::uint32_t base = shared_address(shared);
  const std::int64_t cache0 = op.qkv.cache_row(s.slot, 0, 0);
  const auto* k = static_cast<const __nv_bfloat16*>(op.qkv.k) + cache0;
  const auto* v = static_cast<const __nv_bfloat16*>(op.qkv.v) + cache0;
  const auto* q = static_cast<const __nv_bfloat16*>(op.qkv.q) +
                  (static_cast<std::int64_t>(s.row_begin) * kExpertHeads + row0) * kDim;

  constexpr int kPieces = kDim / 8;
  const auto fetch = [&](int begin, int end,
                         int below) {  // keys begin … end of this block, zero from `below` on
    for (int i = begin * kPieces + thread; i < end * kPieces; i += kThreads) {
      const int r = i / kPieces, c = i % kPieces * 8, key = key0 + r, bytes = key < below ? 16 : 0;
      const std::int64_t from = bytes > 0 ? static_cast<std::int64_t>(key) * kDim + c : 0;
      const std::uint32_t to = base + static_cast<std::uint32_t>((r * kPitch + c) * 2);
      copy_async(to + at.keys, k + from, bytes);
      copy_async(to + at.values, v + from, bytes);
    }
  };
  const std::uint32_t received = base + static_cast<std::uint32_t>(at.received);
  const std::uint32_t barrier = base + static_cast<std::uint32_t>(at.barrier);
  if (thread == 0) {
    barrier_init(barrier, 1);
    barriers_ready();
    barrier_expect(barrier, kBlocks * kSent);
  }
  const int known = min(max(s.past - key0, 0), per);
  fetch(0, known, count);
  wait_for_inputs();
  release_successor();
  for (int i = thread; i < kTile * kPieces; i += kThreads) {
    const int r = i / kPieces, c = i % kPieces * 8;
    copy_async(base + static_cast<std::uint32_t>((r * kPitch + c) * 2),
               q + (row0 + r < rows ? r * kDim + c : 0), row0 + r < rows ? 16 : 0);
  }
  fetch(known, per, count);
  copy_commit();
  copy_wait<0>();
  __syncthreads();

  // Scores: warps take 16 rows (slab) and a quarter of the keys.
  const int slab = warp % 2 * 16, quarter = warp / 2, quarter_keys = per / 4;  // 8, 16, 24 or 32
  float p[4][4] = {};
#pragma unroll 4
  for (int c = 0; c < kDim / 16; ++c) {
    std::uint32_t a[4];
    load_matrix(
        a, base + static_cast<std::uint32_t>(((slab + lane % 16) * kPitch + 16 * c + lane / 16 * 8) * 2));
#pragma unroll
    for (int j = 0; j < 4; j += 2)
      if (8 * j < quarter_keys) {
        // The last of an odd number of groups of eight reads its neighbour's keys as well and forgets them.
        const int key = min(quarter * quarter_keys + 8 * j + lane % 8 + lane / 16 * 8, per - 1);
        std::uint32_t b[4];
        load_matrix(
            b, base + static_cast<std::uint32_t>(at.keys + (key * kPitch + 16 * c + lane / 8 % 2 * 8) * 2));
        mma(p[j], a, b[0], b[1]);
        mma(p[j + 1], a, b[2], b[3]);
      }
  }
  const float factor = op.scale * kLog2E;
  float most[2] = {kNothing, kNothing}, total[2] = {};
#pragma unroll
  for (int j = 0; j < 4; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int key = quarter * quarter_keys + 8 * j + lane % 4 * 2 + e % 2;
      const bool counts = 8 * j < quarter_keys && key0 + key < count;
      p[j][e] = counts ? p[j][e] * factor : -INFINITY;
      most[e / 2] = fmaxf(most[e / 2], p[j][e]);
    }
  float* maxima = reinterpret_cast<float*>(shared + at.maxima);  // [32][4], then the sums [32][4]
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 1));
    most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 2));
    if (lane % 4 == 0) maxima[(slab + lane / 4 + 8 * r) * 4 + quarter] = most[r];
  }
  __syncthreads();
  auto* weights = reinterpret_cast<__nv_bfloat16*>(shared + at.weights);
  const int weight_pitch = per + 8;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = slab + lane / 4 + 8 * r;
    const float4 m = *reinterpret_cast<const float4*>(maxima + row * 4);
    most[r] = fmaxf(fmaxf(m.x, m.y), fmaxf(m.z, m.w));
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (8 * j < quarter_keys) {
        const float w0 = exp2f(p[j][2 * r] - most[r]), w1 = exp2f(p[j][2 * r + 1] - most[r]);
        total[r] += w0 + w1;
        *reinterpret_cast<std::uint32_t*>(weights + row * weight_pitch + quarter * quarter_keys + 8 * j +
                                          lane % 4 * 2) = pack_bf16(w0, w1);
      }
    total[r] += __shfl_xor_sync(~0u, total[r], 1);
    total[r] += __shfl_xor_sync(~0u, total[r], 2);
    if (lane % 4 == 0) maxima[kTile * 4 + row * 4 + quarter] = total[r];
  }
  __syncthreads();

  // Values: 16 rows and a quarter of the columns per warp. The keys are no longer needed.
  float o[8][4] = {};
  for (int c = 0; c < per / 16; ++c) {
    std::uint32_t a[4];
    load_matrix(a, base + static_cast<std::uint32_t>(
                              at.weights + ((slab + lane % 16) * weight_pitch + 16 * c + lane / 16 * 8) * 2));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      std::uint32_t b[4];
      load_matrix_transposed(
          b, base + static_cast<std::uint32_t>(
                        at.values +
                        ((16 * c + lane % 16) * kPitch + quarter * 64 + 16 * j + lane / 16 * 8) * 2));
      mma(o[2 * j], a, b[0], b[1]);
      mma(o[2 * j + 1], a, b[2], b[3]);
    }
  }

  // Every block ends 32 columns: the others send theirs, once all are done with their keys and values.
  __syncwarp();
  cluster_arrive();
  const std::uint32_t sent = base + static_cast<std::uint32_t>(at.keys);
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int to = (quarter * 2 + j / 4) * kSent +
                     ((slab + lane / 4 + 8 * r) * kSentPitch + 8 * j % 32 + lane % 4 * 2) * 4;
      *reinterpret_cast<float2*>(shared + at.keys + to) = make_float2(o[j][2 * r], o[j][2 * r + 1]);
    }
  const int row = thread / 8, column = rank * 32 + thread % 8 * 4;
  {
    const float4 m = *reinterpret_cast<const float4*>(maxima + row * 4);
    const float4 t = *reinterpret_cast<const float4*>(maxima + kTile * 4 + row * 4);
    *reinterpret_cast<float2*>(shared + at.keys + thread % 8 * kSent + kSentSums + row * 8) =
        make_float2(fmaxf(fmaxf(m.x, m.y), fmaxf(m.z, m.w)), t.x + t.y + (t.z + t.w));
  }
  fence_async();
  __syncthreads();
  cluster_wait();
  if (thread < kBlocks)
    send_bytes(received + static_cast<std::uint32_t>(rank * kSent),
               sent + static_cast<std::uint32_t>(thread * kSent), kSent, barrier, thread);
  barrier_wait(barrier, 0);
  float m[kBlocks], t[kBlocks];
  float4 part[kBlocks];
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    const std::uint8_t* from = shared + at.received + i * kSent;
    const float2 joined = reinterpret_cast<const float2*>(from + kSentSums)[row];
    m[i] = joined.x;
    t[i] = joined.y;
    part[i] = reinterpret_cast<const float4*>(from)[row * (kSentPitch / 4) + thread % 8];
  }
  float largest = m[0];
#pragma unroll
  for (int i = 1; i < kBlocks; ++i) largest = fmaxf(largest, m[i]);
  float sum = 0;
  float4 out = make_float4(0, 0, 0, 0);
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    const float w = exp2f(m[i] - largest);
    sum += t[i] * w;
    out.x += part[i].x * w;
    out.y += part[i].y * w;
    out.z += part[i].z * w;
    out.w += part[i].w * w;
  }
  if (row0 + row < rows) {
    const float inverse = 1.0f / sum;
    const int token = (row0 + row) / kExpertHeads, head = (row0 + row) % kExpertHeads;
    *reinterpret_cast<uint2*>(op.out +
                              tiled_at(s.row_begin + token, head * kDim + column, kExpertHeads * kDim)) =
        make_uint2(pack_bf16(out.x * inverse, out.y * inverse), pack_bf16(out.z * inverse, out.w * inverse));
  }
  cluster_arrive_relaxed();  // nobody leaves before what it sent has been received
  cluster_wait();
#endif
}

}  // namespace

cudaError_t expert_attention(const Stream& s, const ExpertAttention& op) {
  const int shared = layout_for(keys_per_block(op.segments.max_keys)).bytes;
  if (const cudaError_t e =
          cudaFuncSetAttribute(expert_attention_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
      e != cudaSuccess)
    return e;
  const dim3 grid(blocks(static_cast<std::int64_t>(op.segments.max_rows) * kExpertHeads, kTile) * kBlocks,
                  static_cast<unsigned>(op.segments.count.capacity));
  return launch(s, grid, kThreads, static_cast<std::size_t>(shared), expert_attention_kernel, op);
}

}  // namespace servoflow::ops::cuda
