// Nibbles to bf16 pairs in AVX-512 BW, for the files that are compiled for it: a byte of a kPairs4 panel's
// row holds columns j and 16 + j of one k (low_bit.h). A decoder is told each group of k's, then reads rows.
#include <immintrin.h>

#include "ops/cpu/low_bit.h"

namespace servoflow::ops::cpu {
namespace {

inline __m512i words_of(const std::byte* row) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
}

// 16 numbers, one per column, as two words per column.
inline __m512i word_pairs(const std::uint8_t* bytes) {
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  return _mm512_or_si512(wide, _mm512_slli_epi32(wide, 16));
}
inline __m512 scales_of(const std::uint16_t* bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits))), 16));
}

// bf16 pairs, a column each, times the column's scale. Products are exact in bf16 (see low_bit.h), so that
// dropping their lower halves loses nothing.
inline __m512i times(__m512i pairs, __m512 scale) {
  const __m512i low =
      _mm512_castps_si512(_mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)), scale));
  const __m512i high = _mm512_castps_si512(_mm512_mul_ps(
      _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u)))), scale));
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(low, 16), high);
}

// A table's entries; with kShifted, the entry is code + the column's shift.
template <bool kShifted>
struct LookedUp {
  explicit LookedUp(const UnpackBlock& b) : table(_mm512_loadu_si512(b.table)), shifts(b.shifts) {}
  void group(int g) {
    if constexpr (kShifted)
      shift0 = word_pairs(shifts + g * kPanel), shift1 = word_pairs(shifts + g * kPanel + 16);
  }
  void row(const std::byte* in, __m512i& low, __m512i& high) const {
    const __m512i words = words_of(in);
    low = _mm512_and_si512(words, _mm512_set1_epi16(15)), high = _mm512_srli_epi16(words, 4);
    if constexpr (kShifted) low = _mm512_add_epi16(low, shift0), high = _mm512_add_epi16(high, shift1);
    low = _mm512_permutexvar_epi16(low, table);
    high = _mm512_permutexvar_epi16(high, table);
  }
  __m512i table, shift0{}, shift1{};
  const std::uint8_t* shifts;
};

// A table's entries times the column's scale.
template <bool kShifted>
struct Scaled {
  explicit Scaled(const UnpackBlock& b) : codes(b), folded(b.folded) {}
  void group(int g) {
    codes.group(g);
    scale0 = scales_of(folded + g * kPanel), scale1 = scales_of(folded + g * kPanel + 16);
  }
  void row(const std::byte* in, __m512i& low, __m512i& high) const {
    codes.row(in, low, high);
    low = times(low, scale0), high = times(high, scale1);
  }
  LookedUp<kShifted> codes;
  __m512 scale0{}, scale1{};
  const std::uint16_t* folded;
};

// E2M1 codes times scales so far from bf16's ends that a product's exponent is a sum: a number is the scale,
// or 1.5 times the scale where kE2M1Order's lowest bit is clear, with something added to its exponent, and
// zero where the three lower bits are clear. All in integers: the floating-point units have the product to
// do.
struct AddedExponents {
  explicit AddedExponents(const UnpackBlock& b) : folded(b.folded) {
    alignas(64) std::uint16_t added[32];
    for (unsigned i = 0; i < 32; ++i) {
      const unsigned magnitude = i & 7u;
      const unsigned exponent = magnitude < 2 ? 0xffffu : (magnitude - 2) / 2;  // -1, 0, 1, 2
      added[i] = static_cast<std::uint16_t>((exponent << 7) + ((i & 8u) != 0 ? 0x8000u : 0u));
    }
    table = _mm512_load_si512(added);
  }
  void group(int g) {
    pairs(scales_of(folded + g * kPanel), whole0, half0);
    pairs(scales_of(folded + g * kPanel + 16), whole1, half1);
  }
  static void pairs(__m512 scale, __m512i& whole, __m512i& half) {
    const auto twice = [](__m512 x) {
      const __m512i bits = _mm512_castps_si512(x);
      return _mm512_or_si512(bits, _mm512_srli_epi32(bits, 16));
    };
    whole = twice(scale);
    half = twice(_mm512_mul_ps(scale, _mm512_set1_ps(1.5f)));
  }
  void row(const std::byte* in, __m512i& low, __m512i& high) const {
    const __m512i words = words_of(in);
    const auto bits = [&](short some, short lowest, __m512i whole, __m512i half, __m512i index) {
      const __mmask32 set = _mm512_test_epi16_mask(words, _mm512_set1_epi16(some));
      const __mmask32 power = _mm512_test_epi16_mask(words, _mm512_set1_epi16(lowest));
      return _mm512_maskz_add_epi16(set, _mm512_mask_mov_epi16(half, power, whole),
                                    _mm512_permutexvar_epi16(index, table));
    };
    low = bits(0x07, 0x01, whole0, half0, words);
    high = bits(0x70, 0x10, whole1, half1, _mm512_srli_epi16(words, 4));
  }
  __m512i table, whole0{}, half0{}, whole1{}, half1{};
  const std::uint16_t* folded;
};

}  // namespace
}  // namespace servoflow::ops::cpu
