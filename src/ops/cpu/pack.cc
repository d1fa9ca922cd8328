// Weights into 32-column panels. Rows are read in blocks of 16 pairs, so that the 32 source streams stay in
// the cache.
#include <bit>
#include <cmath>
#include <cstring>

#include "ops/cpu/kernels.h"

namespace servoflow::ops::cpu {
namespace {

float load(const std::byte* row, int i, DType dtype) {
  std::uint16_t bits;
  switch (dtype) {
    case DType::kF32: {
      float value;
      std::memcpy(&value, row + 4 * static_cast<std::size_t>(i), 4);
      return value;
    }
    case DType::kF64: {
      double value;
      std::memcpy(&value, row + 8 * static_cast<std::size_t>(i), 8);
      return static_cast<float>(value);
    }
    case DType::kBF16:
      std::memcpy(&bits, row + 2 * static_cast<std::size_t>(i), 2);
      return to_float(bf16{bits});
    default:
      std::memcpy(&bits, row + 2 * static_cast<std::size_t>(i), 2);
      return half_to_float(bits);
  }
}

// bf16 to bf16, the common case: pairs move as 32-bit words. Exponents of all ones (Inf, NaN) are collected
// on the way.
bool pack_bf16_pairs(const std::byte* const rows[kPanel], int pairs, std::uint32_t* panel) {
  constexpr int kBlock = 16;
  std::uint32_t bad = 0;
  for (int first = 0; first < pairs; first += kBlock) {
    const int count = std::min(kBlock, pairs - first);
    std::uint32_t block[kPanel][kBlock] = {};
    for (int r = 0; r < kPanel; ++r)
      if (rows[r] != nullptr)
        std::memcpy(block[r], rows[r] + 4 * static_cast<std::size_t>(first),
                    4 * static_cast<std::size_t>(count));
    for (int i = 0; i < count; ++i) {
      std::uint32_t* out = panel + static_cast<std::size_t>(first + i) * kPanel;
      for (int r = 0; r < kPanel; ++r) {
        const std::uint32_t word = block[r][i];
        out[r] = word;
        bad |= static_cast<std::uint32_t>((word & 0x7f80u) == 0x7f80u) |
               static_cast<std::uint32_t>((word & 0x7f800000u) == 0x7f800000u);
      }
    }
  }
  return bad == 0;
}

}  // namespace

bool pack_panel(const std::byte* const rows[kPanel], DType source, int k, DType target, void* panel) {
  bool finite = true;
  int i = 0;
  if (source == DType::kBF16 && target == DType::kBF16) {
    finite = pack_bf16_pairs(rows, k / 2, static_cast<std::uint32_t*>(panel));
    i = k / 2 * 2;
  }
  for (; i < k; ++i)
    for (int r = 0; r < kPanel; ++r) {
      const float value = rows[r] != nullptr ? load(rows[r], i, source) : 0.0f;
      if (target == DType::kF32) {
        static_cast<float*>(panel)[static_cast<std::size_t>(i) * kPanel + static_cast<std::size_t>(r)] =
            value;
        finite = finite && std::isfinite(value);
      } else {
        const bf16 rounded = to_bf16(value);
        static_cast<bf16*>(
            panel)[(static_cast<std::size_t>(i / 2) * kPanel + static_cast<std::size_t>(r)) * 2 +
                   static_cast<std::size_t>(i % 2)] = rounded;
        finite = finite && std::isfinite(to_float(rounded));
      }
    }
  return finite;
}

}  // namespace servoflow::ops::cpu
