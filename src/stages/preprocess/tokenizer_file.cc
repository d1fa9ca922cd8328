#include "stages/preprocess/tokenizer_file.h"

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/status_macros.h"

namespace servoflow::stages {
namespace {

// Field numbers of sentencepiece_model.proto.
constexpr std::uint64_t kNormalizer = 3, kDenormalizer = 5;  // of the model
constexpr std::uint64_t kCharacterMap = 2;                   // of a normalizer

Status damaged() { return Status::invalid("damaged or not a SentencePiece model file"); }

// Reads one protobuf message field by field.
class Fields {
 public:
  explicit Fields(std::string_view bytes) : bytes_(bytes) {}
  bool done() const { return bytes_.empty(); }
  // The next field's number; `content` is set for length-delimited ones. False when the bytes make no sense.
  bool next(std::uint64_t& number, std::string_view& content) {
    std::uint64_t key = 0, length = 0;
    content = {};
    if (!varint(key)) return false;
    number = key >> 3;
    switch (key & 7) {
      case 0:
        return varint(length);
      case 1:
        return skip(8);
      case 2:
        if (!varint(length) || length > bytes_.size()) return false;
        content = bytes_.substr(0, length);
        return skip(length);
      case 5:
        return skip(4);
      default:
        return false;  // groups are not used by this format
    }
  }

 private:
  bool varint(std::uint64_t& value) {
    value = 0;
    for (int shift = 0; shift < 64 && !bytes_.empty(); shift += 7) {
      const auto byte = static_cast<std::uint8_t>(bytes_[0]);
      bytes_.remove_prefix(1);
      value |= std::uint64_t{byte & 0x7fu} << shift;
      if (byte < 0x80) return true;
    }
    return false;
  }
  bool skip(std::uint64_t count) {
    if (count > bytes_.size()) return false;
    bytes_.remove_prefix(count);
    return true;
  }
  std::string_view bytes_;
};

// u32 size of the trie, the trie (a Darts double array of u32 units), then replacement strings ending in NUL.
Status check_character_map(std::string_view map) {
  if (map.empty()) return Status::ok_status();
  const auto word = [&](std::size_t i) {
    std::uint32_t value;
    std::memcpy(&value, map.data() + 4 * i, 4);
    return value;
  };
  if (map.size() < 8) return damaged();
  const std::size_t trie_bytes = word(0);
  if (trie_bytes % 4 != 0 || trie_bytes + 4 >= map.size() || map.back() != '\0') return damaged();
  const std::size_t units = trie_bytes / 4, text_bytes = map.size() - 4 - trie_bytes;
  const auto unit = [&](std::size_t i) { return word(1 + i); };
  for (std::size_t i = 0; i < units; ++i) {
    const std::uint32_t u = unit(i);
    if ((u >> 31) != 0) continue;  // holds a value; no walk passes through it
    const std::uint32_t offset = (u >> 10) << ((u & (1u << 9)) >> 6);
    const std::size_t children = i ^ offset;  // a child's index differs from this in its lowest byte only
    if ((children | 0xff) >= units) return damaged();
    const bool has_value = ((u >> 8) & 1) != 0;
    if (has_value && (unit(children) & 0x7fffffffu) >= text_bytes) return damaged();
  }
  return units == 0 ? damaged() : Status::ok_status();
}

Status check_normalizer(std::string_view message) {
  Fields fields(message);
  std::uint64_t number = 0;
  std::string_view content;
  while (!fields.done()) {
    if (!fields.next(number, content)) return damaged();
    if (number == kCharacterMap) SF_RETURN_IF_ERROR(check_character_map(content));
  }
  return Status::ok_status();
}

}  // namespace

Status check_tokenizer_file(std::string_view bytes) {
  Fields fields(bytes);
  std::uint64_t number = 0;
  std::string_view content;
  while (!fields.done()) {
    if (!fields.next(number, content)) return damaged();
    if (number == kNormalizer || number == kDenormalizer) SF_RETURN_IF_ERROR(check_normalizer(content));
  }
  return bytes.empty() ? damaged() : Status::ok_status();
}

}  // namespace servoflow::stages
