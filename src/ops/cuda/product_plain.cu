// Products without tensor cores: float32 arithmetic, any shape, any dtype. The oracle of the other two.
#include "ops/cuda/kernels.h"

namespace servoflow::ops::cuda {
namespace {

constexpr int kTile = 64, kDepth = 16, kThreads = 128, kEach = kTile * kDepth / kThreads;

// A tile of 64 weight rows (32 pairs) and 64 rows of x; each thread sums four pairs for four rows of x.
__global__ void __launch_bounds__(kThreads) product_plain_kernel(const __grid_constant__ Product op) {
  __shared__ __align__(16) float ws[2][kDepth][kTile + 4], xs[2][kDepth][kTile + 4];
  wait_for_inputs();
  release_successor();
  const int rows = valid(op.rows), row0 = static_cast<int>(blockIdx.y) * kTile;
  if (row0 >= rows) return;
  const int w0 = static_cast<int>(blockIdx.x) * kTile, k = op.w.k, thread = static_cast<int>(threadIdx.x);
  const int tx = thread % 16, ty = thread / 16;
  const bool x_f32 = op.x.dtype == DType::kF32;
  const int pair0 = 4 * ty, place = pair0 / 8 * 16 + pair0 % 8;  // rows place … place + 3, and 8 further

  float next_w[kEach], next_x[kEach];
  const auto fetch = [&](int k0) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int r = (thread + i * kThreads) / kDepth, kk = k0 + thread % kDepth;
      next_w[i] =
          kk < k && w0 + r < op.w.padded_n ? load_element(op.weight, op.w.f32, op.w.at(w0 + r, kk)) : 0.0f;
      next_x[i] =
          kk < k && row0 + r < rows ? load_element(op.x.data, x_f32, (row0 + r) * op.x.pitch + kk) : 0.0f;
    }
  };
  const auto put = [&](int at) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int r = (thread + i * kThreads) / kDepth;
      ws[at][thread % kDepth][r] = next_w[i];
      xs[at][thread % kDepth][r] = next_x[i];
    }
  };
  float sum[2][4][4] = {};
  fetch(0);
  put(0);
  __syncthreads();
  for (int k0 = 0, at = 0; k0 < k; k0 += kDepth, at ^= 1) {
    const bool more = k0 + kDepth < k;
    if (more) fetch(k0 + kDepth);
    const int depth = min(kDepth, k - k0);
    for (int c = 0; c < depth; ++c) {
      const float4 low = *reinterpret_cast<const float4*>(&ws[at][c][place]);
      const float4 high = *reinterpret_cast<const float4*>(&ws[at][c][place + 8]);
      const float4 in = *reinterpret_cast<const float4*>(&xs[at][c][4 * tx]);
      const float a[2][4] = {{low.x, low.y, low.z, low.w}, {high.x, high.y, high.z, high.w}};
      const float b[4] = {in.x, in.y, in.z, in.w};
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[h][i][j] = fmaf(a[h][i], b[j], sum[h][i][j]);
    }
    if (more) put(at ^ 1);
    __syncthreads();
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int row = row0 + 4 * tx + j;
    if (row >= rows) continue;
    Segment segment;
    if (op.to_qkv && !find_segment(op.qkv.segments, valid(op.qkv.segment_count), row, segment)) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      emit_pair(op, w0 / 2 + pair0 + i, row, segment, 0, sum[0][i][j], sum[1][i][j]);
  }
}

}  // namespace

cudaError_t product_plain(const Stream& s, const Product& op) {
  return launch(s, dim3(blocks(op.w.padded_n, kTile), blocks(op.rows.capacity, kTile)), kThreads, 0,
                product_plain_kernel, op);
}

}  // namespace servoflow::ops::cuda
