#include "quant/pack.h"

#include <cassert>
#include <cstring>

namespace servoflow::quant {

void store_row(Code code, std::span<const std::uint8_t> elements, std::uint8_t* row) {
  if (code_bits(code) != 4) {
    std::memcpy(row, elements.data(), elements.size());
    return;
  }
  const std::size_t pairs = elements.size() / 2;
  for (std::size_t i = 0; i < pairs; ++i)
    row[i] = static_cast<std::uint8_t>(elements[2 * i] | elements[2 * i + 1] << 4);
  if (elements.size() % 2 != 0) row[pairs] = elements.back();
}

std::vector<std::uint32_t> pack_words(std::span<const std::int8_t> values, int bits) {
  assert(bits == 4 || bits == 8);
  const std::size_t per_word = 32u / static_cast<unsigned>(bits);
  const int offset = 1 << (bits - 1);
  std::vector<std::uint32_t> words((values.size() + per_word - 1) / per_word);
  for (std::size_t i = 0; i < values.size(); ++i)
    words[i / per_word] |= static_cast<std::uint32_t>(values[i] + offset)
                           << (i % per_word * static_cast<unsigned>(bits));
  return words;
}

void unpack_words(std::span<const std::uint32_t> words, int bits, std::span<std::int8_t> values) {
  assert(bits == 4 || bits == 8);
  const std::size_t per_word = 32u / static_cast<unsigned>(bits);
  const std::uint32_t mask = (1u << bits) - 1u;
  const int offset = 1 << (bits - 1);
  assert(words.size() * per_word >= values.size());
  for (std::size_t i = 0; i < values.size(); ++i)
    values[i] = static_cast<std::int8_t>(
        static_cast<int>((words[i / per_word] >> (i % per_word * static_cast<unsigned>(bits))) & mask) -
        offset);
}

}  // namespace servoflow::quant
