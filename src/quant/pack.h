// Nibbles and words: the packings that the file formats share.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "quant/formats.h"

namespace servoflow::quant {

inline int sign_extend_int4(unsigned nibble) { return static_cast<int>((nibble & 15u) ^ 8u) - 8; }

// Element `col` of a row of nibbles: the low one of byte col / 2 where col is even.
inline unsigned nibble(const std::uint8_t* row, std::int64_t col) {
  return (row[col / 2] >> (col % 2 * 4)) & 15u;
}

// Bytes of a row of the neutral layout, without padding.
inline std::size_t row_bytes(Code code, std::int64_t cols) {
  return code_bits(code) == 4 ? static_cast<std::size_t>((cols + 1) / 2) : static_cast<std::size_t>(cols);
}

// One byte per element into the neutral layout. An odd row's last high nibble is 0.
void store_row(Code code, std::span<const std::uint8_t> elements, std::uint8_t* row);

// compressed-tensors' int packing: 2^(bits-1) is added, element i takes bits [i*bits, (i+1)*bits) of a row of
// 32-bit words, least significant first; a row takes ceil(n*bits/32) words, the rest of its last word is 0.
// `values` are the signed codes, bits is 4 or 8.
std::vector<std::uint32_t> pack_words(std::span<const std::int8_t> values, int bits);
void unpack_words(std::span<const std::uint32_t> words, int bits, std::span<std::int8_t> values);

}  // namespace servoflow::quant
