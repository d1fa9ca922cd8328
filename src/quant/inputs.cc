// The rounding of inputs, as matrix.h states it.
#include <algorithm>
#include <cassert>
#include <cmath>

#include "quant/matrix.h"
#include "quant/scalars.h"
#include "quant/scales.h"

namespace servoflow::quant {
namespace {

inline float round_even(float x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: the sum keeps no fraction
  return (x + kMagic) - kMagic;
}

// x -> round(x * inverse) * scale, element by element.
void round_run(Code code, float* x, std::int64_t n, float scale, float inverse, float low, float high,
               float zero) {
  if (code == Code::kInt8) {
    for (std::int64_t i = 0; i < n; ++i) {
      const float q = std::min(std::max(round_even(x[i] * inverse) + zero, low), high);
      x[i] = (q - zero) * scale;
    }
  } else {
    for (std::int64_t i = 0; i < n; ++i) x[i] = decode_e4m3(encode_e4m3(x[i] * inverse)) * scale;
  }
}

void round_nvfp4_row(float* x, std::int64_t k, float global) {
  constexpr std::int64_t kGroup = 16;
  for (std::int64_t begin = 0; begin < k; begin += kGroup) {
    const std::int64_t n = std::min(kGroup, k - begin);
    const float amax = max_magnitude({x + begin, static_cast<std::size_t>(n)});
    const float block = decode_ue4m3(encode_ue4m3(amax / kE2M1Max / global));
    const float scale = block * global;
    for (std::int64_t i = begin; i < begin + n; ++i)
      x[i] = scale > 0.0f ? decode_e2m1(encode_e2m1(x[i] / scale)) * scale : 0.0f;
  }
}

void round_mx_row(Code code, float* x, std::int64_t k) {
  constexpr std::int64_t kGroup = 32;
  for (std::int64_t begin = 0; begin < k; begin += kGroup) {
    const std::int64_t n = std::min(kGroup, k - begin);
    const float amax = max_magnitude({x + begin, static_cast<std::size_t>(n)});
    const float scale = decode_e8m0(mx_scale(code, amax, Convention::kCompressedTensors));
    for (std::int64_t i = begin; i < begin + n; ++i)
      x[i] = scale * (code == Code::kE2M1 ? decode_e2m1(encode_e2m1(x[i] / scale))
                                          : decode_e4m3(encode_e4m3(x[i] / scale)));
  }
}

}  // namespace

void fake_quantize_rows(const InputFormat& format, float* rows, std::int64_t n, std::int64_t k,
                        std::int64_t pitch, std::optional<float> static_scale, int zero_point) {
  if (!format.quantized()) return;
  assert(static_scale.has_value() == format.needs_calibration());
  if (format.scale == ScaleCode::kE8M0) {
    for (std::int64_t r = 0; r < n; ++r) round_mx_row(format.code, rows + r * pitch, k);
    return;
  }
  if (format.code == Code::kE2M1) {
    for (std::int64_t r = 0; r < n; ++r) {
      float* row = rows + r * pitch;
      const float amax = max_magnitude({row, static_cast<std::size_t>(k)});
      const float global = static_scale ? *static_scale : amax / (kE2M1Max * kE4M3Max);
      if (amax > 0.0f) round_nvfp4_row(row, k, global);
    }
    return;
  }
  const float top = code_max(format.code);
  if (static_scale) {
    const auto zero = static_cast<float>(zero_point);
    for (std::int64_t r = 0; r < n; ++r)
      round_run(format.code, rows + r * pitch, k, *static_scale, 1.0f / *static_scale, -128.0f, 127.0f, zero);
    return;
  }
  float tensor_amax = 0.0f;
  if (format.granularity == Granularity::kTensor)
    for (std::int64_t r = 0; r < n; ++r)
      tensor_amax = std::max(tensor_amax, max_magnitude({rows + r * pitch, static_cast<std::size_t>(k)}));
  const std::int64_t run = format.granularity == Granularity::kGroup ? format.group : k;
  for (std::int64_t r = 0; r < n; ++r) {
    for (std::int64_t begin = 0; begin < k; begin += run) {
      float* x = rows + r * pitch + begin;
      const std::int64_t length = std::min(run, k - begin);
      const float amax = format.granularity == Granularity::kTensor
                             ? tensor_amax
                             : max_magnitude({x, static_cast<std::size_t>(length)});
      // So small that the inverse would overflow: nothing is left of such a row in 8 bits of any layer's
      // output.
      const float inverse = amax > 0.0f ? top / amax : 0.0f;
      round_run(format.code, x, length, amax / top, std::isfinite(inverse) ? inverse : 0.0f, -top, top, 0.0f);
    }
  }
}

}  // namespace servoflow::quant
