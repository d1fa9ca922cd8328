// Products on VDPBF16PS with panels of codes. The first tile of rows decodes the panel pair by pair and
// leaves it behind for the others: integer units decode while the floating-point units multiply. So few rows
// pay as little for codes as many do. Compiled for AVX-512 BF16 as a whole; only called where the CPU has it.
#include "ops/cpu/low_bit.h"

#if defined(__x86_64__) && defined(__AVX512BF16__)
#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "ops/cpu/nibbles_avx512-inl.h"

namespace servoflow::ops::cpu {
namespace {

// Registers are the limit: two sums per row (four where groups have sums of their own), and what a decoder
// keeps.
constexpr int kDecodingRows = 10, kGroupedDecodingRows = 5;

// Rows of x, three per base pointer (x86 address modes reach that far), from pair to pair of k.
template <int M>
struct Rows {
  static constexpr int kBases = (M + 2) / 3;
  Rows(const char* a, std::int64_t row_bytes) : pitch(row_bytes) {
    for (int i = 0; i < kBases; ++i) base[static_cast<std::size_t>(i)] = a + 3 * i * row_bytes;
  }
  void advance() {
    for (const char*& b : base) b += 4;
  }
  // `bytes`: 4, or 2 for the last of an odd number of k's, whose neighbour belongs to somebody else.
  template <std::size_t kBytes>
  __m512bh pair(int r) const {
    int value = 0;
    std::memcpy(&value, base[static_cast<std::size_t>(r / 3)] + (r % 3) * pitch, kBytes);
    return (__m512bh)_mm512_set1_epi32(value);
  }
  std::array<const char*, kBases> base;
  std::int64_t pitch;
};

struct Sums {
  __m512 left, right;
};

// One pair of k's: decoded, left behind, and multiplied with the rows.
template <std::size_t kBytes, class Decoder, int... R>
inline void step(std::integer_sequence<int, R...>, const Decoder& decoder, const std::byte* in,
                 std::uint32_t* out, Rows<sizeof...(R)>& rows, std::array<Sums, sizeof...(R)>& sums) {
  _mm_prefetch(reinterpret_cast<const char*>(in) + 2048, _MM_HINT_T0);
  __m512i low, high;
  decoder.row(in, low, high);
  _mm512_storeu_si512(out, low);
  _mm512_storeu_si512(out + 16, high);
  const auto row = [&](__m512bh x, Sums& s) {
    s.left = _mm512_dpbf16_ps(s.left, x, (__m512bh)low);
    s.right = _mm512_dpbf16_ps(s.right, x, (__m512bh)high);
  };
  (row(rows.template pair<kBytes>(R), std::get<R>(sums)), ...);
  rows.advance();
}

template <int... R>
inline void clear(std::integer_sequence<int, R...>, std::array<Sums, sizeof...(R)>& sums) {
  ((std::get<R>(sums) = {_mm512_setzero_ps(), _mm512_setzero_ps()}), ...);
}

template <class Decoder, int... R>
void tile(std::integer_sequence<int, R...> rows_of, const char* a, std::int64_t a_bytes,
          const UnpackBlock& block, int k, float* c, std::int64_t c_pitch, bool accumulate) {
  Decoder decoder(block);
  Rows<sizeof...(R)> rows(a, a_bytes);
  std::array<Sums, sizeof...(R)> sums;
  clear(rows_of, sums);
  const int group = block.group_pairs > 0 ? block.group_pairs : block.pairs;
  const std::byte* in = block.data;
  std::uint32_t* out = block.panel;
  for (int first = 0, g = 0; first < block.pairs; first += group, ++g) {
    decoder.group(g);
    const int end = std::min(first + group, k / 2);
    for (int p = first; p < end; ++p, in += kPanel, out += kPanel)
      step<4>(rows_of, decoder, in, out, rows, sums);
    if (k % 2 != 0 && first + group >= block.pairs) step<2>(rows_of, decoder, in, out, rows, sums);
  }
  const auto store = [&](float* to, const Sums& s) {
    _mm512_storeu_ps(to, accumulate ? _mm512_add_ps(_mm512_loadu_ps(to), s.left) : s.left);
    _mm512_storeu_ps(to + 16, accumulate ? _mm512_add_ps(_mm512_loadu_ps(to + 16), s.right) : s.right);
  };
  (store(c + R * c_pitch, std::get<R>(sums)), ...);
}

// Sums of groups, each times its column's scale.
template <class Decoder, int... R>
void grouped_tile(std::integer_sequence<int, R...> rows_of, const char* a, std::int64_t a_bytes,
                  const UnpackBlock& block, int k, const float* scales, float* c, std::int64_t c_pitch,
                  bool accumulate) {
  Decoder decoder(block);
  Rows<sizeof...(R)> rows(a, a_bytes);
  std::array<Sums, sizeof...(R)> totals, sums;
  clear(rows_of, totals);
  if (accumulate)
    ((std::get<R>(totals) = {_mm512_loadu_ps(c + R * c_pitch), _mm512_loadu_ps(c + R * c_pitch + 16)}), ...);
  const std::byte* in = block.data;
  std::uint32_t* out = block.panel;
  for (int first = 0, g = 0; first < block.pairs; first += block.group_pairs, ++g, scales += kPanel) {
    decoder.group(g);
    clear(rows_of, sums);
    const int end = std::min(first + block.group_pairs, k / 2);
    for (int p = first; p < end; ++p, in += kPanel, out += kPanel)
      step<4>(rows_of, decoder, in, out, rows, sums);
    if (k % 2 != 0 && first + block.group_pairs >= block.pairs)
      step<2>(rows_of, decoder, in, out, rows, sums);
    const __m512 s0 = _mm512_loadu_ps(scales), s1 = _mm512_loadu_ps(scales + 16);
    ((std::get<R>(totals) = {_mm512_fmadd_ps(std::get<R>(sums).left, s0, std::get<R>(totals).left),
                             _mm512_fmadd_ps(std::get<R>(sums).right, s1, std::get<R>(totals).right)}),
     ...);
  }
  const auto store = [](float* to, const Sums& s) {
    _mm512_storeu_ps(to, s.left);
    _mm512_storeu_ps(to + 16, s.right);
  };
  (store(c + R * c_pitch, std::get<R>(totals)), ...);
}

void product(const void* a, std::int64_t a_pitch, int m, const UnpackBlock& block, int k, const float* scales,
             float* c, std::int64_t c_pitch, bool accumulate) {
  static const Unpack unpack = unpack_avx512();
  static const PanelProduct plain = bf16_dot_product();
  static const GroupedProduct grouped = bf16_dot_grouped_product();
  const char* rows = static_cast<const char*>(a);
  const bool in_place = m >= kDecodingRows && decodes_in_place(block.codes, block.adds_exponents, scales);
  int done = 0;
  if (in_place && scales == nullptr) {
    tile<AddedExponents>(std::make_integer_sequence<int, kDecodingRows>(), rows, a_pitch * 2, block, k, c,
                         c_pitch, accumulate);
    done = kDecodingRows;
  } else if (in_place) {
    constexpr std::make_integer_sequence<int, kGroupedDecodingRows> few;
    block.shifts != nullptr
        ? grouped_tile<LookedUp<true>>(few, rows, a_pitch * 2, block, k, scales, c, c_pitch, accumulate)
        : grouped_tile<LookedUp<false>>(few, rows, a_pitch * 2, block, k, scales, c, c_pitch, accumulate);
    done = kGroupedDecodingRows;
  } else {
    unpack(block);
  }
  if (done == m) return;
  rows += done * a_pitch * 2;
  c += done * c_pitch;
  scales == nullptr ? plain(rows, a_pitch, m - done, block.panel, k, c, c_pitch, accumulate)
                    : grouped(rows, a_pitch, m - done, block.panel, k, 2 * block.group_pairs, scales, c,
                              c_pitch, accumulate);
}

}  // namespace

CodesProduct bf16_dot_codes_product() {
  return bf16_dot_product() != nullptr && unpack_avx512() != nullptr ? product : nullptr;
}

}  // namespace servoflow::ops::cpu

#else

namespace servoflow::ops::cpu {
CodesProduct bf16_dot_codes_product() { return nullptr; }
}  // namespace servoflow::ops::cpu

#endif
