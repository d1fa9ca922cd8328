// Codes of 8 and 4 bits to bf16 panels by table look-up: VPERMW for nibbles, VPERMI2W for bytes. Compiled for
// AVX-512 BW as a whole; only called where the CPU has it.
#include "ops/cpu/low_bit.h"

#if defined(__x86_64__) && defined(__AVX512BW__)
#include <algorithm>

#include "ops/cpu/nibbles_avx512-inl.h"

namespace servoflow::ops::cpu {
namespace {

template <class Decoder>
void nibbles(const UnpackBlock& b) {
  Decoder decoder(b);
  const int group = b.group_pairs > 0 ? b.group_pairs : b.pairs;
  const std::byte* in = b.data;
  std::uint32_t* out = b.panel;
  for (int first = 0, g = 0; first < b.pairs; first += group, ++g) {
    if (b.group_pairs > 0) decoder.group(g);
    const int count = std::min(group, b.pairs - first);
    for (int p = 0; p < count; ++p, in += kPanel, out += kPanel) {
      __m512i low, high;
      decoder.row(in, low, high);
      _mm512_storeu_si512(out, low);
      _mm512_storeu_si512(out + 16, high);
    }
  }
}

template <bool kFolded>
void bytes(const UnpackBlock& b) {
  __m512i table[8];
  for (int i = 0; i < 8; ++i) table[i] = _mm512_loadu_si512(b.table + 32 * i);
  const int group = b.group_pairs > 0 ? b.group_pairs : b.pairs;
  const std::byte* in = b.data;
  std::uint32_t* out = b.panel;
  const auto look_up = [&](const std::byte* at) {
    const __m512i index = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
    const __mmask32 six = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64)),
                    seven = _mm512_test_epi16_mask(index, _mm512_set1_epi16(128));
    const __m512i low = _mm512_mask_blend_epi16(six, _mm512_permutex2var_epi16(table[0], index, table[1]),
                                                _mm512_permutex2var_epi16(table[2], index, table[3]));
    const __m512i high = _mm512_mask_blend_epi16(six, _mm512_permutex2var_epi16(table[4], index, table[5]),
                                                 _mm512_permutex2var_epi16(table[6], index, table[7]));
    return _mm512_mask_blend_epi16(seven, low, high);
  };
  for (int first = 0, g = 0; first < b.pairs; first += group, ++g) {
    __m512 scale0 = _mm512_setzero_ps(), scale1 = scale0;
    if constexpr (kFolded)
      scale0 = scales_of(b.folded + g * kPanel), scale1 = scales_of(b.folded + g * kPanel + 16);
    const int count = std::min(group, b.pairs - first);
    for (int p = 0; p < count; ++p, in += 2 * kPanel, out += kPanel) {
      __m512i left = look_up(in), right = look_up(in + kPanel);
      if constexpr (kFolded) left = times(left, scale0), right = times(right, scale1);
      _mm512_storeu_si512(out, left);
      _mm512_storeu_si512(out + 16, right);
    }
  }
}

// int8 without a table: its numbers are exact in float32 and in the upper halves of them.
void integers(const UnpackBlock& b) {
  const std::byte* in = b.data;
  std::uint32_t* out = b.panel;
  const auto convert = [](const std::byte* at) {
    // Bytes k, k + 1 of a column in one word; the even one moves up to be sign-extended alike.
    const __m512i wide =
        _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));  // one column a lane
    const __m512i odd = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_srai_epi32(wide, 8)));
    const __m512i even =
        _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(wide, 24), 24)));
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(even, 16), odd);
  };
  for (int p = 0; p < b.pairs; ++p, in += 2 * kPanel, out += kPanel) {
    _mm512_storeu_si512(out, convert(in));
    _mm512_storeu_si512(out + 16, convert(in + kPanel));
  }
}

// Any table of 256 by VPERMI2B, high and low bytes of the values apart: 64 codes at a time.
__attribute__((target("avx512vbmi"))) void bytes_vbmi(const UnpackBlock& b) {
  alignas(64) std::uint8_t low[256], high[256];
  for (int i = 0; i < 256; ++i) {
    low[i] = static_cast<std::uint8_t>(b.table[i]);
    high[i] = static_cast<std::uint8_t>(b.table[i] >> 8);
  }
  __m512i l[4], h[4];
  for (int i = 0; i < 4; ++i) {
    l[i] = _mm512_load_si512(low + 64 * i);
    h[i] = _mm512_load_si512(high + 64 * i);
  }
  // Interleaving works within 128 bits: codes go where it puts their values in order.
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  const std::byte* in = b.data;
  std::uint32_t* out = b.panel;
  for (int p = 0; p < b.pairs; ++p, in += 2 * kPanel, out += kPanel) {
    const __m512i codes = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(in));
    const __mmask64 upper = _mm512_movepi8_mask(codes);
    const __m512i x = _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(l[0], codes, l[1]),
                                             _mm512_permutex2var_epi8(l[2], codes, l[3]));
    const __m512i y = _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(h[0], codes, h[1]),
                                             _mm512_permutex2var_epi8(h[2], codes, h[3]));
    _mm512_storeu_si512(out, _mm512_unpacklo_epi8(x, y));
    _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi8(x, y));
  }
}

void unpack(const UnpackBlock& b) {
  static const bool vbmi = __builtin_cpu_supports("avx512vbmi");
  const bool shifted = b.group_pairs > 0 && b.shifts != nullptr,
             folded = b.group_pairs > 0 && b.folded != nullptr;
  if (b.codes == Codes::kPairs4) {
    if (folded && b.adds_exponents) return nibbles<AddedExponents>(b);
    if (shifted) return folded ? nibbles<Scaled<true>>(b) : nibbles<LookedUp<true>>(b);
    return folded ? nibbles<Scaled<false>>(b) : nibbles<LookedUp<false>>(b);
  }
  if (vbmi && !folded) return bytes_vbmi(b);
  if (b.code == quant::Code::kInt8 && !folded) return integers(b);
  return folded ? bytes<true>(b) : bytes<false>(b);
}

}  // namespace

Unpack unpack_avx512() {
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") ? unpack : nullptr;
}

}  // namespace servoflow::ops::cpu

#else

namespace servoflow::ops::cpu {
Unpack unpack_avx512() { return nullptr; }
}  // namespace servoflow::ops::cpu

#endif
