#include "quant/scales.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "core/bf16.h"
#include "quant/scalars.h"

namespace servoflow::quant {

std::uint32_t encode_scale(ScaleCode code, float value) {
  switch (code) {
    case ScaleCode::kFloat32:
      return std::bit_cast<std::uint32_t>(value);
    case ScaleCode::kBFloat16:
      return to_bf16(value).bits;
    case ScaleCode::kE4M3:
      return encode_ue4m3(value);
    case ScaleCode::kE8M0:
      return encode_e8m0(value);
  }
  return 0;
}

float decode_scale(ScaleCode code, std::uint32_t bits) {
  switch (code) {
    case ScaleCode::kFloat32:
      return std::bit_cast<float>(bits);
    case ScaleCode::kBFloat16:
      return to_float(bf16{static_cast<std::uint16_t>(bits)});
    case ScaleCode::kE4M3:
      return decode_ue4m3(static_cast<std::uint8_t>(bits));
    case ScaleCode::kE8M0:
      return decode_e8m0(static_cast<std::uint8_t>(bits));
  }
  return 0.0f;
}

std::uint8_t mx_scale(Code code, float amax, Convention convention) {
  if (!(amax > 0.0f)) return 0;
  if (convention == Convention::kModelOpt) {
    const float exponent = std::ceil(std::log2(amax / code_max(code)));
    return static_cast<std::uint8_t>(std::clamp(exponent, -127.0f, 127.0f) + 127.0f);
  }
  // Half of the mantissa's first bit is added to the bits, so that 1.75 and more carry into the exponent.
  const std::uint32_t power = (std::bit_cast<std::uint32_t>(amax) + (1u << 21)) & 0x7f800000u;
  if (power == 0) return 0;
  const int exponent = static_cast<int>(power >> 23) - (code == Code::kE2M1 ? 2 : 8);
  return static_cast<std::uint8_t>(std::clamp(exponent, 0, 254));
}

namespace {

// What compressed-tensors puts in the place of a zero scale: the scale type's epsilon, by its own table.
float scale_for_zeros(ScaleCode code, Convention convention) {
  if (convention == Convention::kModelOpt) return 1.0f;
  switch (code) {
    case ScaleCode::kFloat32:
      return 0x1p-23f;
    case ScaleCode::kBFloat16:
      return 0x1p-7f;
    case ScaleCode::kE4M3:
      return 0.125f;
    case ScaleCode::kE8M0:
      return 0x1p-127f;
  }
  return 1.0f;
}

float rounded(ScaleCode code, float value) { return decode_scale(code, encode_scale(code, value)); }

}  // namespace

ScalePair scale_from_extremes(const WeightFormat& format, float low, float high, Convention convention,
                              float file_global_scale) {
  const float amax = std::max(-low, high);
  const bool modelopt = convention == Convention::kModelOpt;
  if (format.scale == ScaleCode::kE8M0) return {decode_e8m0(mx_scale(format.code, amax, convention)), 0};
  if (format.global_scale) {
    if (modelopt) {
      float scale = amax / (kE2M1Max * file_global_scale);
      if (scale == 0.0f) scale = 1.0f;
      return {rounded(format.scale, std::clamp(scale, 0x1p-9f, kE4M3Max)), 0};
    }
    const float scale = rounded(format.scale, file_global_scale * (amax / kE2M1Max));
    return {scale == 0.0f ? scale_for_zeros(format.scale, convention) : scale, 0};
  }
  const bool integer = format.code == Code::kInt8 || format.code == Code::kInt4;
  const float low_code = format.code == Code::kInt4 ? -8.0f : -128.0f;
  const float high_code = format.code == Code::kInt4 ? 7.0f : 127.0f;
  if (!format.zero_point) {
    const float divisor = !integer   ? code_max(format.code)
                          : modelopt ? high_code
                                     : (high_code - low_code) / 2;
    const float scale = rounded(format.scale, amax / divisor);
    return {scale == 0.0f ? scale_for_zeros(format.scale, convention) : scale, 0};
  }
  const float codes = high_code - low_code, range = high - low;
  // The difference of two large finite numbers may overflow; then the quotients are subtracted.
  const float scale =
      rounded(format.scale, std::isfinite(range) ? range / codes : high / codes - low / codes);
  if (scale == 0.0f) return {scale_for_zeros(format.scale, convention), 0};
  const float zero = std::clamp(low_code - low / scale, low_code, high_code);
  return {scale, static_cast<int>(std::nearbyint(zero))};
}

}  // namespace servoflow::quant
