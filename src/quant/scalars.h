// The scalar codes that low-precision tensors are made of: E2M1, E4M3 ("FN"), E5M2, UE4M3 and E8M0.
//
// Every encoder takes binary32 and rounds to nearest, ties to the even code. Values beyond the largest finite
// one saturate: a weight must never become NaN because it was large. (PyTorch's own cast to float8_e4m3fn
// gives NaN above 464, to float8_e5m2 infinity above 57344; quantizers clamp first, and so do these.) NaN
// stays NaN where the code has one, and becomes +0 in E2M1, which has none. The sign of zero is kept: a
// negative value that rounds to zero is -0, code 0x8 in E2M1.
//
// Sources: OCP "Microscaling Formats (MX)" 1.0, "OCP 8-bit Floating Point" 1.0, torch.float8_e4m3fn.
#pragma once

#include <array>
#include <bit>
#include <cstdint>

namespace servoflow::quant {

inline constexpr float kE2M1Max = 6.0f;
inline constexpr float kE4M3Max = 448.0f;
inline constexpr float kE5M2Max = 57344.0f;

// --- E2M1: bit 3 the sign, bits 2..0 one of these magnitudes.
inline constexpr std::array<float, 16> kE2M1Values = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                                      -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

inline float decode_e2m1(unsigned code) { return kE2M1Values[code & 15u]; }

// Without branches, so that loops over it vectorise.
inline std::uint8_t encode_e2m1(float x) {
  const float a = std::bit_cast<float>(std::bit_cast<std::uint32_t>(x) & 0x7fffffffu);
  // Thresholds between neighbours; a tie goes to the even code, hence > and >= in turn. NaN passes none.
  const int magnitude =
      (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) + (a >= 3.5f) + (a > 5.0f);
  return static_cast<std::uint8_t>((x < 0.0f ? 8 : 0) + magnitude);
}

// --- E4M3 ("FN"): bias 7, no infinity, 0x7f and 0xff are NaN.
inline float decode_e4m3(std::uint8_t code) {
  const std::uint32_t sign = static_cast<std::uint32_t>(code & 0x80u) << 24;
  const std::uint32_t rest = code & 0x7fu;
  if (rest == 0x7f) return std::bit_cast<float>(sign | 0x7fc00000u);
  // As an exponent of binary32 the code means 2^-120 of its value; the product is exact, subnormals included.
  const float magnitude = std::bit_cast<float>(rest << 20) * 0x1p120f;
  return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(magnitude));
}

namespace detail {
// Rounds |x| <= max to `mantissa` bits under a smallest normal exponent, ties to even; returns the code's
// exponent and mantissa bits.
template <int kMantissa, int kBias>
inline std::uint32_t encode_magnitude(std::uint32_t magnitude_bits) {
  constexpr int kShift = 23 - kMantissa;
  constexpr std::uint32_t kSmallestNormal = static_cast<std::uint32_t>(127 - kBias + 1) << 23;
  if (magnitude_bits < kSmallestNormal) {
    // Adding 2^(23 - …) makes the sum's last bit the subnormal step, and lets the adder round to even.
    constexpr float kMagic =
        std::bit_cast<float>(static_cast<std::uint32_t>(127 - kBias + 1 + 23 - kMantissa) << 23);
    const float sum = std::bit_cast<float>(magnitude_bits) + kMagic;
    return std::bit_cast<std::uint32_t>(sum) - std::bit_cast<std::uint32_t>(kMagic);
  }
  const std::uint32_t odd = (magnitude_bits >> kShift) & 1u;
  const std::uint32_t rounded = magnitude_bits + ((1u << (kShift - 1)) - 1u) + odd;
  return (rounded >> kShift) - (static_cast<std::uint32_t>(127 - kBias) << kMantissa);
}
}  // namespace detail

inline std::uint8_t encode_e4m3(float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t sign = (bits >> 24) & 0x80u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint8_t>(sign | 0x7fu);
  if (magnitude >= std::bit_cast<std::uint32_t>(kE4M3Max)) return static_cast<std::uint8_t>(sign | 0x7eu);
  return static_cast<std::uint8_t>(sign | detail::encode_magnitude<3, 7>(magnitude));
}

// --- E5M2: bias 15, 0x7c infinity, above it NaN.
inline float decode_e5m2(std::uint8_t code) {
  const std::uint32_t sign = static_cast<std::uint32_t>(code & 0x80u) << 24;
  const std::uint32_t rest = code & 0x7fu;
  if (rest > 0x7c) return std::bit_cast<float>(sign | 0x7fc00000u);
  if (rest == 0x7c) return std::bit_cast<float>(sign | 0x7f800000u);
  const float magnitude = std::bit_cast<float>(rest << 21) * 0x1p112f;
  return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(magnitude));
}

// Saturates, infinity included, as OCP's saturating mode does; NaN becomes 0x7f as in PyTorch.
inline std::uint8_t encode_e5m2(float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t sign = (bits >> 24) & 0x80u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint8_t>(sign | 0x7fu);
  if (magnitude >= std::bit_cast<std::uint32_t>(kE5M2Max)) return static_cast<std::uint8_t>(sign | 0x7bu);
  return static_cast<std::uint8_t>(sign | detail::encode_magnitude<2, 15>(magnitude));
}

// --- UE4M3, the block scale of NVFP4: E4M3 without its sign. A scale has none; bit 7 is ignored on reading
// and 0 when written, and negative values become 0.
inline float decode_ue4m3(std::uint8_t code) { return decode_e4m3(code & 0x7fu); }
inline std::uint8_t encode_ue4m3(float x) { return x <= 0.0f ? std::uint8_t{0} : encode_e4m3(x); }

// --- E8M0, the scale of the MX formats: 2^(code - 127), 0xff NaN. Code 0 is 2^-127, a subnormal of binary32.
inline float decode_e8m0(std::uint8_t code) {
  if (code == 0xff) return std::bit_cast<float>(0x7fc00000u);
  return std::bit_cast<float>(code == 0 ? 0x00400000u : static_cast<std::uint32_t>(code) << 23);
}

// The exponent of |x|, rounded down (floor(log2 |x|)), saturating at both ends; NaN and infinity give 0xff,
// zero gives 0.
inline std::uint8_t encode_e8m0(float x) {
  const std::uint32_t magnitude = std::bit_cast<std::uint32_t>(x) & 0x7fffffffu;
  return static_cast<std::uint8_t>(magnitude >> 23);
}

}  // namespace servoflow::quant
