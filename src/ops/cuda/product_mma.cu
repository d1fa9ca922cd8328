// Products on the tensor cores of sm_80 and later (mma.sync): 128 weight rows by 64 rows of x per block.
#include "ops/cuda/kernels.h"

namespace servoflow::ops::cuda {
namespace {

constexpr int kWeights = 128, kRows = 64, kDepth = 64, kStages = 3, kThreads = 256;
constexpr int kStageBytes = (kWeights + kRows) * kDepth * 2;
constexpr int kSharedBytes = kStages * kStageBytes;

// 16-byte piece `piece` (of 8) of row `row` in a tile of 128-byte rows; pieces are turned so that eight rows
// at the same column lie in eight different banks.
__device__ __forceinline__ std::uint32_t piece_at(std::uint32_t tile, int row, int piece) {
  return tile + static_cast<std::uint32_t>(row * 128 + ((piece ^ (row & 7)) << 4));
}

__global__ void __launch_bounds__(kThreads) product_mma_kernel(const __grid_constant__ Product op) {
  extern __shared__ __align__(128) std::uint8_t shared[];
  wait_for_inputs();
  release_successor();
  const int rows = valid(op.rows), row0 = static_cast<int>(blockIdx.y) * kRows;
  if (row0 >= rows) return;
  const int w0 = static_cast<int>(blockIdx.x) * kWeights, k = op.w.k, steps = (k + kDepth - 1) / kDepth;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int warp_w = warp % 4 * 32, warp_x = warp / 4 * 32;
  const auto* weight = static_cast<const __nv_bfloat16*>(op.weight);
  const auto* x = static_cast<const __nv_bfloat16*>(op.x.data) + row0 * op.x.pitch;
  const std::uint32_t base = shared_address(shared);

  const auto load = [&](int step) {
    if (step < steps) {
      const std::uint32_t tile = base + static_cast<std::uint32_t>(step % kStages * kStageBytes);
      const int k0 = step * kDepth;
#pragma unroll
      for (int i = 0; i < (kWeights + kRows) * 8 / kThreads; ++i) {
        const int at = thread + i * kThreads, r = at / 8, piece = at % 8, kk = k0 + piece * 8;
        const int bytes = max(0, min(16, (k - kk) * 2));
        if (r < kWeights) {
          copy_async(piece_at(tile, r, piece), weight + op.w.at(w0 + r, bytes > 0 ? kk : 0), bytes);
        } else {
          const int xr = r - kWeights, b = row0 + xr < rows ? bytes : 0;
          copy_async(piece_at(tile + kWeights * 128, xr, piece), x + (b > 0 ? xr * op.x.pitch + kk : 0), b);
        }
      }
    }
    copy_commit();
  };

  float sum[2][4][4] = {};  // [16 weight rows][8 rows of x][fragment]
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) load(i);
  for (int step = 0; step < steps; ++step) {
    copy_wait<kStages - 2>();
    __syncthreads();
    load(step + kStages - 1);
    const std::uint32_t tile = base + static_cast<std::uint32_t>(step % kStages * kStageBytes);
#pragma unroll
    for (int kk = 0; kk < kDepth / 16; ++kk) {
      std::uint32_t a[2][4], b[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        load_matrix(a[i], piece_at(tile, warp_w + 16 * i + lane % 16, 2 * kk + lane / 16));
#pragma unroll
      for (int i = 0; i < 2; ++i)
        load_matrix(b[i], piece_at(tile + kWeights * 128, warp_x + 16 * i + lane % 8 + lane / 16 * 8,
                                   2 * kk + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) mma(sum[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }

#pragma unroll
  for (int j = 0; j < 4; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = row0 + warp_x + 8 * j + lane % 4 * 2 + e;
      if (row >= rows) continue;
      Segment segment;
      if (op.to_qkv && !find_segment(op.qkv.segments, valid(op.qkv.segment_count), row, segment)) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i)
        emit_pair(op, (w0 + warp_w) / 2 + 8 * i + lane / 4, row, segment, 0, sum[i][j][e], sum[i][j][2 + e]);
    }
}

}  // namespace

cudaError_t product_mma(const Stream& s, const Product& op) {
  const cudaError_t prepared =
      cudaFuncSetAttribute(product_mma_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (prepared != cudaSuccess) return prepared;
  return launch(s, dim3(blocks(op.w.padded_n, kWeights), blocks(op.rows.capacity, kRows)), kThreads,
                kSharedBytes, product_mma_kernel, op);
}

}  // namespace servoflow::ops::cuda
