// Attention of 72-wide heads over the tokens of a picture, on Hopper's warpgroup instructions: the vision
// tower. A block takes 64 rows of one head; each of its two warpgroups holds up to 128 keys and values in
// shared memory, and what they have is joined at the end.
#include "ops/cuda/attention_wgmma.cuh"
#include "ops/cuda/kernels.h"

namespace servoflow::ops::cuda {
namespace {

constexpr int kDim = 72, kRows = 64, kHalfKeys = 128, kKeys = 2 * kHalfKeys, kThreads = 256;
// A row of keys or values is 128 bytes with the 128-byte swizzle and, apart, 16 bytes of 32 with that
// swizzle.
constexpr int kMain = kHalfKeys * 128, kRest = kHalfKeys * 32, kRowBytes = kDim * 2, kPieces = kDim / 8;
constexpr int kHandedBytes = 9 * 128 * 16;
constexpr int kQueryBytes = kRows * kRowBytes;
constexpr int kSharedBytes = 4 * (kMain + kRest) + kQueryBytes + 3 * kRows * 4;
constexpr int kAlone = 120 * 1024;  // as much that a processor holds one block

__global__ void __launch_bounds__(kThreads, 2)
    attention_picture_kernel(const __grid_constant__ DeviceAttention op) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) std::uint8_t memory[];
  const int thread = static_cast<int>(threadIdx.x) % 128, half = static_cast<int>(threadIdx.x) / 128;
  const int warp = thread / 32, lane = thread % 32, head = static_cast<int>(blockIdx.y);
  const Segment segment = op.segments.device[blockIdx.z];
  const int row0 = static_cast<int>(blockIdx.x) * kRows, count = segment.past + segment.rows;
  if (static_cast<int>(blockIdx.z) >= valid(op.segments.count) || row0 >= segment.rows) return;
  const std::uint32_t base = shared_address(memory), k_main = base + half * kMain,
                      v_main = base + (2 + half) * kMain, k_rest = base + 4 * kMain + half * kRest,
                      v_rest = base + 4 * kMain + (2 + half) * kRest;
  release_successor();
  const std::uint32_t queries = base + 4 * (kMain + kRest);
  // A thread's 9 pieces of 16 bytes of its half's keys, or values; what lies behind the last key becomes 0.
  // The loops are left as loops: what runs once runs at the pace of the instruction cache.
  const std::int64_t row =
      (static_cast<std::int64_t>(segment.slot) * op.heads + head) * op.keys + half * kHalfKeys;
  const int present = count - half * kHalfKeys;
  const auto fetch = [&](const void* from, std::uint32_t main, std::uint32_t rest) {
    const char* at = static_cast<const char*>(from) + row * kRowBytes + thread * 16;
    int r = thread / kPieces, c = thread % kPieces;
#pragma unroll 1
    for (int i = 0; i < kPieces; ++i, at += 128 * 16) {
      const std::uint32_t to = c < 8 ? main + r * 128 + ((c ^ r % 8) * 16) : rest + r * 32 + r / 4 % 2 * 16;
      copy_async(to, r < present ? at : from, r < present ? 16 : 0);
      r += 128 / kPieces + (c >= kPieces - 128 % kPieces);
      c += c >= kPieces - 128 % kPieces ? 128 % kPieces - kPieces : 128 % kPieces;
    }
  };
  store_shared(k_rest + thread * 32 + (1 - thread / 4 % 2) * 16, make_float4(0, 0, 0, 0));
  wait_for_inputs();
  const int first = row0 + warp * 16;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kPieces; i += kThreads) {
    const int r = i / kPieces, c = i - r * kPieces;
    const bool there = row0 + r < segment.rows;
    const char* at =
        static_cast<const char*>(op.q) +
        ((static_cast<std::int64_t>(segment.row_begin + row0 + r) * op.heads + head) * kDim + c * 8) * 2;
    copy_async(queries + i * 16, there ? at : static_cast<const char*>(op.q), there ? 16 : 0);
  }
  fetch(op.k, k_main, k_rest);
  copy_commit();
  fetch(op.v, v_main, v_rest);
  copy_commit();

  copy_wait<1>();
  fence_async();
  __syncthreads();  // a warpgroup's queries are fetched by both
  std::uint32_t a[5][4];
#pragma unroll
  for (int k = 0; k < 5; ++k)
    load_matrix(a[k],
                queries + (warp * 16 + lane % 16) * kRowBytes + (k < 4 ? k * 32 + lane / 16 * 16 : 128));
  a[4][2] = a[4][3] = 0;
  float s[64];
  {
    const std::uint64_t b = tile_descriptor(k_main);
    wgmma_fence();
    wgmma_scores_first(s, a[0], b);
#pragma unroll
    for (int k = 1; k < 4; ++k) wgmma_scores_next(s, a[k], b + 2 * k);
    wgmma_scores_next(s, a[4], descriptor(k_rest, 16, 256, 3));
    wgmma_commit();
    wgmma_wait<0>();
  }
  const float factor = op.scale * kLog2E;
  float most[2] = {-1e30f, -1e30f}, total[2] = {};
  if (count < kKeys) {
    const int limit = count - half * kHalfKeys - lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 64; ++i)
      if (i / 4 * 8 + i % 2 >= limit) s[i] = -INFINITY;
  }
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    s[i] *= factor;
    most[i / 2 % 2] = fmaxf(most[i / 2 % 2], s[i]);
  }
  auto* shared_sums = reinterpret_cast<float*>(memory + 4 * (kMain + kRest) + kQueryBytes);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 1));
    most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 2));
    if (lane % 4 == 0) shared_sums[half * kRows + warp * 16 + lane / 4 + 8 * r] = most[r];
  }
  copy_wait<0>();
  fence_async();
  __syncthreads();
#pragma unroll
  for (int r = 0; r < 2; ++r)
    most[r] = fmaxf(most[r], shared_sums[(1 - half) * kRows + warp * 16 + lane / 4 + 8 * r]);

  float o[32], rest[8];
#pragma unroll
  for (int i = 0; i < 32; ++i) o[i] = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) rest[i] = 0;
  std::uint32_t p[32];
#pragma unroll
  for (int part = 0; part < 2; ++part) {
#pragma unroll
    for (int i = 16 * part; i < 16 * part + 16; ++i) {
      const float p0 = exp2_fast(s[2 * i] - most[i % 2]), p1 = exp2_fast(s[2 * i + 1] - most[i % 2]);
      total[i % 2] += p0;
      total[i % 2] += p1;
      p[i] = pack_bf16(p0, p1);
    }
    const std::uint64_t main = descriptor(v_main + part * 64 * 128, 1024, 1024, 1),
                        beside = descriptor(v_rest + part * 64 * 32, 256, 256, 3);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      wgmma_values(o, p + 16 * part + 4 * k, main + k * (2048 >> 4));
      wgmma_values(rest, p + 16 * part + 4 * k, beside + k * (512 >> 4));
    }
    wgmma_commit();
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    total[r] += __shfl_xor_sync(~0u, total[r], 1);
    total[r] += __shfl_xor_sync(~0u, total[r], 2);
  }
  wgmma_wait<0>();
  // The keys' memory is free: both warpgroups have passed the barrier behind their scores.
  const std::uint32_t handed = base + thread * 16, staged = base + kHandedBytes + warp * 16 * kRowBytes;
  if (half == 1) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      store_shared(handed + i * 2048, make_float4(o[4 * i], o[4 * i + 1], o[4 * i + 2], o[4 * i + 3]));
    store_shared(handed + 8 * 2048, make_float4(rest[0], rest[1], rest[2], rest[3]));
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (lane % 4 == 0) shared_sums[2 * kRows + warp * 16 + lane / 4 + 8 * r] = total[r];
    named_signal(3, kThreads);
    return;
  }
  named_wait(3, kThreads);
#pragma unroll
  for (int r = 0; r < 2; ++r)
    total[r] = 1.0f / (total[r] + shared_sums[2 * kRows + warp * 16 + lane / 4 + 8 * r]);
  std::uint32_t y[18];
#pragma unroll
  for (int i = 0; i < 9; ++i) {
    const float4 v = load_shared(handed + i * 2048);
    const float* mine = i < 8 ? o + 4 * i : rest;
    y[2 * i] = pack_bf16((mine[0] + v.x) * total[0], (mine[1] + v.y) * total[0]);
    y[2 * i + 1] = pack_bf16((mine[2] + v.z) * total[1], (mine[3] + v.w) * total[1]);
  }
#pragma unroll
  for (int c = 0; c < 4; ++c)
    store_matrix(staged + lane % 16 * kRowBytes + (16 * c + lane / 16 * 8) * 2, y[4 * c], y[4 * c + 1],
                 y[4 * c + 2], y[4 * c + 3]);
#pragma unroll
  for (int r = 0; r < 2; ++r)
    asm volatile(
        "st.shared.b32 [%0], %1;" ::"r"(staged + (lane / 4 + 8 * r) * kRowBytes + 128 + lane % 4 * 4),
        "r"(y[16 + r])
        : "memory");
  __syncwarp();
  auto* out = static_cast<__nv_bfloat16*>(op.out.data) + head * kDim;
#pragma unroll 1
  for (int i = lane; i < 16 * kPieces; i += 32) {
    const int r = i / kPieces;
    if (first + r < segment.rows)
      *reinterpret_cast<float4*>(out + (segment.row_begin + first + r) * op.out.pitch +
                                 (i - r * kPieces) * 8) = load_shared(staged + i * 16);
  }
#endif
}

}  // namespace

bool attention_picture_takes(const DeviceAttention& op) {
  return !op.f32 && op.head_dim == kDim && op.kv_heads == op.heads && op.keys <= kKeys &&
         op.out.dtype == DType::kBF16 && op.out.pitch % 8 == 0 && op.scale > 0;
}

cudaError_t attention_picture(const Stream& s, const DeviceAttention& op) {
  const cudaError_t prepared =
      cudaFuncSetAttribute(attention_picture_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kAlone);
  if (prepared != cudaSuccess) return prepared;
  int device = 0, processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const dim3 grid(blocks(op.segments.max_rows, kRows), static_cast<unsigned>(op.heads),
                  static_cast<unsigned>(op.segments.count.capacity));
  // Blocks that find room for all of them spread over the processors, also when those come free one by one.
  const Count& pictures = op.segments.count;
  const int likely = pictures.likely > 0 ? pictures.likely : pictures.capacity;
  const bool spread = static_cast<int>(grid.x * grid.y) * likely <= processors;
  return launch(s, grid, kThreads, spread ? kAlone : kSharedBytes, attention_picture_kernel, op);
}

}  // namespace servoflow::ops::cuda
