// Products without tensor cores: float32 arithmetic, any shape, any dtype. The oracle of the other two.
#include "ops/cuda/kernels.h"

namespace servoflow::ops::cuda {
namespace {

constexpr int kTile = 64, kDepth = 16, kThreads = 256;

// A tile of 64 weight rows (32 pairs) and 64 rows of x; each thread sums 2 pairs for 4 rows.
__global__ void __launch_bounds__(kThreads) product_plain_kernel(const __grid_constant__ Product op) {
  __shared__ float ws[kDepth][kTile + 4], xs[kDepth][kTile + 4];
  wait_for_inputs();
  release_successor();
  const int rows = valid(op.rows), row0 = static_cast<int>(blockIdx.y) * kTile;
  if (row0 >= rows) return;
  const int w0 = static_cast<int>(blockIdx.x) * kTile, k = op.w.k;
  const int tx = static_cast<int>(threadIdx.x) % 16, ty = static_cast<int>(threadIdx.x) / 16;
  const bool x_f32 = op.x.dtype == DType::kF32;
  int at[4];  // rows of the tile: pair ty, then pair ty + 16
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int pair = ty + 16 * (i / 2);
    at[i] = pair / 8 * 16 + pair % 8 + 8 * (i % 2);
  }
  float sum[4][4] = {};
  for (int k0 = 0; k0 < k; k0 += kDepth) {
    for (int i = static_cast<int>(threadIdx.x); i < kTile * kDepth; i += kThreads) {
      const int r = i / kDepth, c = i % kDepth, kk = k0 + c;
      ws[c][r] = kk < k && w0 + r < op.w.padded_n
                     ? load_element(op.weight, op.w.f32, (w0 + r) * op.w.pitch + kk)
                     : 0.0f;
      xs[c][r] =
          kk < k && row0 + r < rows ? load_element(op.x.data, x_f32, (row0 + r) * op.x.pitch + kk) : 0.0f;
    }
    __syncthreads();
    const int depth = min(kDepth, k - k0);
    for (int c = 0; c < depth; ++c) {
      float a[4], b[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = ws[c][at[i]];
#pragma unroll
      for (int i = 0; i < 4; ++i) b[i] = xs[c][tx + 16 * i];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(a[i], b[j], sum[i][j]);
    }
    __syncthreads();
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int row = row0 + tx + 16 * j;
    if (row >= rows) continue;
    Segment segment;
    if (op.to_qkv && !find_segment(op.qkv.segments, valid(op.qkv.segment_count), row, segment)) continue;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      emit_pair(op, w0 / 2 + ty + 16 * i, row, segment, 0, sum[2 * i][j], sum[2 * i + 1][j]);
  }
}

}  // namespace

cudaError_t product_plain(const Stream& s, const Product& op) {
  return launch(s, dim3(blocks(op.w.padded_n, kTile), blocks(op.rows.capacity, kTile)), kThreads, 0,
                product_plain_kernel, op);
}

}  // namespace servoflow::ops::cuda
