// int8 panel products on VPDPBUSD. Compiled for AVX-512 VNNI as a whole; only called where the CPU has it.
//
// As in bf16_dot_avx512.cc a tile is up to 14 rows by 32 columns: 28 independent chains, a panel vector is
// used 14 times per load. Inputs are the unsigned operand (code + 128): their bytes are broadcast four at a
// time.
#include "ops/cpu/low_bit.h"

#if defined(__x86_64__) && defined(__AVX512VNNI__)
#include <immintrin.h>

#include <array>
#include <utility>

namespace servoflow::ops::cpu {
namespace {

constexpr int kTileRows = 14;

// Rows are unrolled by pack expansion: GCC 12 keeps an array that a loop indexes in memory across this
// instruction.
template <int... R>
void tile_rows(std::integer_sequence<int, R...>, const std::uint8_t* a, std::int64_t pitch,
               const std::byte* panel, int quads, std::int32_t* c, std::int64_t c_pitch, bool accumulate) {
  constexpr int kRows = sizeof...(R), kBases = (kRows + 2) / 3;
  __m512i left[kRows], right[kRows];
  ((left[R] = right[R] = _mm512_setzero_si512()), ...);
  const std::uint8_t* base[kBases];
  for (int i = 0; i < kBases; ++i) base[i] = a + 3 * i * pitch;
  for (int i = quads; i > 0; --i) {
    _mm_prefetch(panel + 4096, _MM_HINT_T0);
    _mm_prefetch(panel + 4160, _MM_HINT_T0);
    const __m512i b0 = _mm512_loadu_si512(panel), b1 = _mm512_loadu_si512(panel + 64);
    const auto row = [&](const std::uint8_t* at, __m512i& l, __m512i& r) {
      int four;
      __builtin_memcpy(&four, at, 4);
      const __m512i x = _mm512_set1_epi32(four);
      l = _mm512_dpbusd_epi32(l, x, b0);
      r = _mm512_dpbusd_epi32(r, x, b1);
    };
    (row(base[R / 3] + (R % 3) * pitch, left[R], right[R]), ...);
    panel += 128;
    for (int j = 0; j < kBases; ++j) base[j] += 4;
  }
  const auto store = [&](std::int32_t* out, __m512i l, __m512i r) {
    if (accumulate) {
      l = _mm512_add_epi32(_mm512_loadu_si512(out), l);
      r = _mm512_add_epi32(_mm512_loadu_si512(out + 16), r);
    }
    _mm512_storeu_si512(out, l);
    _mm512_storeu_si512(out + 16, r);
  };
  (store(c + R * c_pitch, left[R], right[R]), ...);
}
template <int M>
void tile(const std::uint8_t* a, std::int64_t pitch, const std::byte* panel, int quads, std::int32_t* c,
          std::int64_t c_pitch, bool accumulate) {
  tile_rows(std::make_integer_sequence<int, M>(), a, pitch, panel, quads, c, c_pitch, accumulate);
}

using Tile = void (*)(const std::uint8_t*, std::int64_t, const std::byte*, int, std::int32_t*, std::int64_t,
                      bool);
template <int... M>
constexpr std::array<Tile, sizeof...(M)> tiles(std::integer_sequence<int, M...>) {
  return {tile<M + 1>...};
}
constexpr auto kTiles = tiles(std::make_integer_sequence<int, kTileRows>{});

void product(const std::uint8_t* a, std::int64_t a_pitch, int m, const std::byte* panel, int quads,
             std::int32_t* c, std::int64_t c_pitch, bool accumulate) {
  const int count = (m + kTileRows - 1) / kTileRows;  // rows spread evenly over the fewest tiles
  for (int i = 0, row = 0; i < count; ++i) {
    const int size = (m - row + count - i - 1) / (count - i);
    kTiles[static_cast<std::size_t>(size - 1)](a + row * a_pitch, a_pitch, panel, quads, c + row * c_pitch,
                                               c_pitch, accumulate);
    row += size;
  }
}

}  // namespace

Int8Product int8_dot_product() { return __builtin_cpu_supports("avx512vnni") ? product : nullptr; }

}  // namespace servoflow::ops::cpu

#else

namespace servoflow::ops::cpu {
Int8Product int8_dot_product() { return nullptr; }
}  // namespace servoflow::ops::cpu

#endif
