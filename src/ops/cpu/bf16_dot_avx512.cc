// bf16 panel products on VDPBF16PS. Compiled for AVX-512 BF16 as a whole; only called where the CPU has it.
//
// One tile is up to 14 rows by 32 columns: 28 accumulators, two panel vectors, and A broadcast pair by pair
// from memory. 28 independent chains cover the instruction's latency, and a panel vector is used 14 times per
// load.
#include "ops/cpu/low_bit.h"

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

// ---- sums by group along K, each times its column's scale
//
// A tile is up to 7 rows: 14 accumulators of the group at hand, 14 of the whole. So nothing goes to memory
// between groups, and 14 chains still cover the latency.
constexpr int kGroupedRows = 7;

template <int... R>
void grouped_rows(std::integer_sequence<int, R...>, const char* a, std::int64_t pitch, const char* panel,
                  int k, int group, const float* scales, float* c, std::int64_t c_pitch, bool accumulate) {
  constexpr int kRows = sizeof...(R), kBases = (kRows + 2) / 3;
  __m512 total0[kRows], total1[kRows];
  const auto begin = [&](const float* from, __m512& t0, __m512& t1) {
    t0 = accumulate ? _mm512_loadu_ps(from) : _mm512_setzero_ps();
    t1 = accumulate ? _mm512_loadu_ps(from + 16) : _mm512_setzero_ps();
  };
  (begin(c + R * c_pitch, total0[R], total1[R]), ...);
  const char* base[kBases];
  for (int i = 0; i < kBases; ++i) base[i] = a + 3 * i * pitch;
  for (; k > 0; k -= group, scales += kPanel) {
    const int terms = k < group ? k : group;
    __m512 left[kRows], right[kRows];
    ((left[R] = right[R] = _mm512_setzero_ps()), ...);
    const auto step = [&](auto load) {
      const __m512bh b0 = (__m512bh)_mm512_loadu_si512(panel);
      const __m512bh b1 = (__m512bh)_mm512_loadu_si512(panel + 64);
      const auto row = [&](const char* at, __m512& l, __m512& r) {
        const __m512bh x = (__m512bh)_mm512_set1_epi32(load(at));
        l = _mm512_dpbf16_ps(l, x, b0);
        r = _mm512_dpbf16_ps(r, x, b1);
      };
      (row(base[R / 3] + (R % 3) * pitch, left[R], right[R]), ...);
      panel += 128;
    };
    for (int i = terms / 2; i > 0; --i) {
      step([](const char* p) {
        int value;
        __builtin_memcpy(&value, p, 4);
        return value;
      });
      for (int j = 0; j < kBases; ++j) base[j] += 4;
    }
    if (terms % 2 != 0)  // the last k of all
      step([](const char* p) {
        std::uint16_t value;
        __builtin_memcpy(&value, p, 2);
        return static_cast<int>(value);
      });
    const __m512 s0 = _mm512_loadu_ps(scales), s1 = _mm512_loadu_ps(scales + 16);
    ((total0[R] = _mm512_fmadd_ps(left[R], s0, total0[R]),
      total1[R] = _mm512_fmadd_ps(right[R], s1, total1[R])),
     ...);
  }
  const auto store = [](float* out, __m512 t0, __m512 t1) {
    _mm512_storeu_ps(out, t0);
    _mm512_storeu_ps(out + 16, t1);
  };
  (store(c + R * c_pitch, total0[R], total1[R]), ...);
}
template <int M>
void grouped_tile(const char* a, std::int64_t pitch, const char* panel, int k, int group, const float* scales,
                  float* c, std::int64_t c_pitch, bool accumulate) {
  grouped_rows(std::make_integer_sequence<int, M>(), a, pitch, panel, k, group, scales, c, c_pitch,
               accumulate);
}

using GroupedTile = void (*)(const char*, std::int64_t, const char*, int, int, const float*, float*,
                             std::int64_t, bool);
template <int... M>
constexpr std::array<GroupedTile, sizeof...(M)> grouped_tiles(std::integer_sequence<int, M...>) {
  return {grouped_tile<M + 1>...};
}
constexpr auto kGroupedTiles = grouped_tiles(std::make_integer_sequence<int, kGroupedRows>{});

void grouped_product(const void* a, std::int64_t a_pitch, int m, const void* panel, int k, int group,
                     const float* scales, float* c, std::int64_t c_pitch, bool accumulate) {
  const int count = (m + kGroupedRows - 1) / kGroupedRows;
  const char* rows = static_cast<const char*>(a);
  for (int i = 0, row = 0; i < count; ++i) {
    const int size = (m - row + count - i - 1) / (count - i);
    kGroupedTiles[static_cast<std::size_t>(size - 1)](rows + row * a_pitch * 2, a_pitch * 2,
                                                      static_cast<const char*>(panel), k, group, scales,
                                                      c + row * c_pitch, c_pitch, accumulate);
    row += size;
  }
}

}  // namespace

PanelProduct bf16_dot_product() { return __builtin_cpu_supports("avx512bf16") ? product : nullptr; }
GroupedProduct bf16_dot_grouped_product() {
  return __builtin_cpu_supports("avx512bf16") ? grouped_product : nullptr;
}

}  // namespace servoflow::ops::cpu

#else

namespace servoflow::ops::cpu {
PanelProduct bf16_dot_product() { return nullptr; }
GroupedProduct bf16_dot_grouped_product() { return nullptr; }
}  // namespace servoflow::ops::cpu

#endif
