// bf16 panel products on VDPBF16PS. Compiled for AVX-512 BF16 as a whole; only called where the CPU has it.
//
// One tile is up to 14 rows by 32 columns: 28 accumulators, two panel vectors, and A broadcast pair by pair
// from memory. 28 independent chains cover the instruction's latency, and a panel vector is used 14 times per
// load.
#include "ops/cpu/kernels.h"

#if defined(__x86_64__) && defined(__AVX512BF16__)
#include <immintrin.h>

#include <array>
#include <utility>

namespace servoflow::ops::cpu {
namespace {

constexpr int kTileRows = 14;

// Rows are addressed as three per base pointer, which x86 address modes reach without extra arithmetic.
template <int M>
void tile(const char* a, std::int64_t pitch, const char* panel, int k, float* c, std::int64_t c_pitch,
          bool accumulate) {
  __m512 left[M], right[M];
  for (int r = 0; r < M; ++r) left[r] = right[r] = _mm512_setzero_ps();
  constexpr int kBases = (M + 2) / 3;
  const char* base[kBases];
  for (int i = 0; i < kBases; ++i) base[i] = a + 3 * i * pitch;
  const auto step = [&](auto load, const char* b) {
    const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b);
    const __m512bh b1 = (__m512bh)_mm512_loadu_si512(b + 64);
#pragma GCC unroll 14
    for (int r = 0; r < M; ++r) {
      const __m512bh x = (__m512bh)_mm512_set1_epi32(load(base[r / 3] + (r % 3) * pitch));
      left[r] = _mm512_dpbf16_ps(left[r], x, b0);
      right[r] = _mm512_dpbf16_ps(right[r], x, b1);
    }
  };
  const auto pair = [](const char* p) {
    int value;
    __builtin_memcpy(&value, p, 4);
    return value;
  };
  const auto last = [](const char* p) {  // odd k: the upper half belongs to somebody else
    std::uint16_t value;
    __builtin_memcpy(&value, p, 2);
    return static_cast<int>(value);
  };
  for (int i = k / 2; i > 0; --i) {
    // Weights stream from memory once per pass; 4 KiB ahead covers its latency, and pages end there for the
    // hardware.
    _mm_prefetch(panel + 4096, _MM_HINT_T0);
    _mm_prefetch(panel + 4160, _MM_HINT_T0);
    step(pair, panel);
    panel += 128;
    for (int j = 0; j < kBases; ++j) base[j] += 4;
  }
  if (k % 2 != 0) step(last, panel);
  for (int r = 0; r < M; ++r) {
    float* out = c + r * c_pitch;
    if (accumulate) {
      left[r] = _mm512_add_ps(_mm512_loadu_ps(out), left[r]);
      right[r] = _mm512_add_ps(_mm512_loadu_ps(out + 16), right[r]);
    }
    _mm512_storeu_ps(out, left[r]);
    _mm512_storeu_ps(out + 16, right[r]);
  }
}

using Tile = void (*)(const char*, std::int64_t, const char*, int, float*, std::int64_t, bool);
template <int... M>
constexpr std::array<Tile, sizeof...(M)> tiles(std::integer_sequence<int, M...>) {
  return {tile<M + 1>...};
}
constexpr auto kTiles = tiles(std::make_integer_sequence<int, kTileRows>{});

void product(const void* a, std::int64_t a_pitch, int m, const void* panel, int k, float* c,
             std::int64_t c_pitch, bool accumulate) {
  const int count = (m + kTileRows - 1) / kTileRows;  // rows spread evenly over the fewest tiles
  const char* rows = static_cast<const char*>(a);
  for (int i = 0, row = 0; i < count; ++i) {
    const int size = (m - row + count - i - 1) / (count - i);
    kTiles[static_cast<std::size_t>(size - 1)](rows + row * a_pitch * 2, a_pitch * 2,
                                               static_cast<const char*>(panel), k, c + row * c_pitch, c_pitch,
                                               accumulate);
    row += size;
  }
}

}  // namespace

PanelProduct bf16_dot_product() { return __builtin_cpu_supports("avx512bf16") ? product : nullptr; }

}  // namespace servoflow::ops::cpu

#else

namespace servoflow::ops::cpu {
PanelProduct bf16_dot_product() { return nullptr; }
}  // namespace servoflow::ops::cpu

#endif
