// Camera frames into pictures, in the arithmetic of the host's own resizing, to the bit.
#include "ops/cuda/kernels.h"

namespace servoflow::ops::cuda {
namespace {

constexpr int kThreads = 256;

// Rounds each operation as the host does: the compiler may not fuse them.
__device__ __forceinline__ float unit_value(int byte) { return __fdiv_rn(static_cast<float>(byte), 255.0f); }
__device__ __forceinline__ float symmetric(float unit) { return __fsub_rn(__fmul_rn(unit, 2.0f), 1.0f); }
__device__ __forceinline__ float blend(float a, float left, float b, float right) {
  return __fadd_rn(__fmul_rn(a, left), __fmul_rn(b, right));
}
__device__ __forceinline__ int to_byte(int sum) { return min(max(sum >> kResamplingBits, 0), 255); }

// One thread per picture pixel. A frame of 640 x 480 costs it 36 inputs; rows are summed anew for every
// pixel below each other, which is cheaper than handing them around.
__global__ void __launch_bounds__(kThreads) letterbox_kernel(Letterbox op) {
  wait_for_inputs();
  release_successor();
  const int picture = static_cast<int>(blockIdx.y), area = op.image * op.image;
  const int pixel = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (picture >= valid(op.pictures) || pixel >= area) return;
  const Frame& f = op.frames[picture];
  float* out = op.pixels + (static_cast<std::int64_t>(picture) * area + pixel) * 3;
  if (f.resampling == Resampling::kReady) {
    const float* in =
        reinterpret_cast<const float*>(op.data + f.pixels) + static_cast<std::int64_t>(pixel) * 3;
    for (int c = 0; c < 3; ++c) out[c] = in[c];
    return;
  }
  const int y = pixel / op.image - f.top, x = pixel % op.image - f.left;
  if (y < 0 || y >= f.rows || x < 0 || x >= f.columns) {
    for (int c = 0; c < 3; ++c) out[c] = -1.0f;
    return;
  }
  const auto* pixels = reinterpret_cast<const std::uint8_t*>(op.data + f.pixels);
  const int column = f.planes != 0 ? 1 : 3, channel = f.planes != 0 ? f.width * f.height : 1,
            line = column * f.width;
  const auto* columns = reinterpret_cast<const std::int32_t*>(op.data + f.column_table);
  const auto* rows = reinterpret_cast<const std::int32_t*>(op.data + f.row_table);
  const int x_first = columns[x], x_second = columns[f.columns + x], y_first = rows[y],
            y_second = rows[f.rows + y];
  const std::int32_t* x_weights = columns + 2 * f.columns + x * f.column_taps;
  const std::int32_t* y_weights = rows + 2 * f.rows + y * f.row_taps;

  if (f.resampling == Resampling::kFixedPoint) {
    constexpr int kHalf = 1 << (kResamplingBits - 1);
    int sums[3] = {kHalf, kHalf, kHalf};
    for (int j = 0; j < y_second; ++j) {
      const std::uint8_t* in = pixels + (y_first + j) * line + x_first * column;
      int across[3] = {kHalf, kHalf, kHalf};
      for (int i = 0; i < x_second; ++i, in += column) {
        const int weight = x_weights[i];
#pragma unroll
        for (int c = 0; c < 3; ++c) across[c] += in[c * channel] * weight;
      }
      const int weight = y_weights[j];
#pragma unroll
      for (int c = 0; c < 3; ++c) sums[c] += to_byte(across[c]) * weight;
    }
#pragma unroll
    for (int c = 0; c < 3; ++c) out[c] = symmetric(unit_value(to_byte(sums[c])));
    return;
  }

  const bool unit = f.resampling == Resampling::kUnit;
  const float right = __int_as_float(x_weights[0]), left = __fsub_rn(1.0f, right);
  const float down = __int_as_float(y_weights[0]), up = __fsub_rn(1.0f, down);
  const auto value = [&](int from_y, int from_x, int c) {
    const float v = unit_value(pixels[from_y * line + from_x * column + c * channel]);
    return unit ? v : symmetric(v);
  };
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    const float top = blend(value(y_first, x_first, c), left, value(y_first, x_second, c), right);
    const float bottom = blend(value(y_second, x_first, c), left, value(y_second, x_second, c), right);
    const float v = blend(top, up, bottom, down);
    out[c] = unit ? symmetric(fminf(fmaxf(v, 0.0f), 1.0f)) : fminf(fmaxf(v, -1.0f), 1.0f);
  }
}

}  // namespace

cudaError_t letterbox(const Stream& s, const Letterbox& op) {
  return launch(s, dim3(blocks(op.image * op.image, kThreads), static_cast<unsigned>(op.pictures.capacity)),
                kThreads, 0, letterbox_kernel, op);
}

}  // namespace servoflow::ops::cuda
