// msgpack with NumPy arrays, as openpi's clients send it: bytes to a tree of values, under hard limits.
//
// An array travels as a map {__ndarray__: true, data: bytes in C order, dtype: "<f4", shape: [2, 3]}, a NumPy
// scalar as {__npgeneric__: true, data: value, dtype: "<f4"}; the keys of both are bytes in Python's packer
// and strings in others, and either is read. Arrays and scalars become values of their own kind here,
// checked: known fixed-size dtypes only (never objects), a shape whose product fits, and exactly as many
// bytes as that needs. Every message names the field by its path, "images/cam_high: dtype".
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "servoflow/status.h"

namespace servoflow::serve {

struct WireLimits {
  std::size_t max_bytes = std::size_t{64} << 20;    // of one message
  int max_depth = 16;                               // of nested maps and lists
  std::size_t max_values = 65536;                   // values in one message, map keys included
  std::size_t max_elements = std::size_t{1} << 28;  // in one array
  int max_dimensions = 8;                           // of one array
  std::size_t max_key_bytes = 1024;                 // of one map key
};

// A NumPy dtype of fixed-size elements.
struct WireType {
  char kind = 0;  // 'b' bool, 'i' signed, 'u' unsigned, 'f' float, 'U' text (UTF-32), 'S' bytes
  int bytes = 0;  // of one element
  bool big_endian = false;
};

// An array whose data lie, in C order and possibly unaligned, inside the message.
struct WireArray {
  WireType type;
  std::string_view dtype;  // as it was sent
  std::vector<std::size_t> shape;
  std::size_t elements = 0;  // the product of `shape`
  std::span<const std::uint8_t> data;

  // Element `i` of a numeric array (kinds b, i, u, f).
  double number(std::size_t i) const;
  std::string shape_text() const;  // "[2, 3]"
};

struct WireValue {
  enum class Kind { kNil, kBool, kInt, kUint, kReal, kText, kBytes, kList, kMap, kArray };
  Kind kind = Kind::kNil;
  bool boolean = false;
  std::int64_t integer = 0;            // kInt: negative
  std::uint64_t whole = 0;             // kUint
  double real = 0;                     // kReal
  std::string_view bytes;              // kText, kBytes: inside the message
  std::vector<WireValue> items;        // kList: its items; kMap: its values, in order
  std::vector<std::string_view> keys;  // kMap: of `items`; of equal keys only the last is kept
  WireArray array;                     // kArray

  bool is_number() const;  // kBool, kInt, kUint, kReal
  double number() const;   // of these
  // The map's value by that key; null when there is none or this is no map.
  const WireValue* find(std::string_view key) const;
  const char* kind_name() const;  // "a map", "an array", … for messages
};

// Parses one message: a map at the top, nothing behind it. The tree points into `message`.
Result<WireValue> parse_message(std::span<const std::uint8_t> message, const WireLimits& limits);

// "name" for a message: printable, at most 100 characters, in quotes.
std::string quoted(std::string_view name);

// Whether `text` is UTF-8 without overlong forms and surrogates.
bool is_utf8(std::string_view text);

// Writes messages, arrays in the same form (with byte-string keys, as the reference does).
class WireWriter {
 public:
  WireWriter();
  ~WireWriter();
  WireWriter(const WireWriter&) = delete;
  WireWriter& operator=(const WireWriter&) = delete;

  WireWriter& map(std::size_t entries);
  WireWriter& list(std::size_t items);
  WireWriter& text(std::string_view value);  // also a map's key
  WireWriter& real(double value);
  WireWriter& whole(std::uint64_t value);
  WireWriter& boolean(bool value);
  WireWriter& nil();
  WireWriter& array(std::span<const double> values, std::span<const std::size_t> shape);  // "<f8"
  WireWriter& array(std::span<const float> values, std::span<const std::size_t> shape);   // "<f4"
  std::string take();

 private:
  void raw_array(std::string_view dtype, const void* data, std::size_t bytes,
                 std::span<const std::size_t> shape);
  struct Impl;
  Impl* impl_;
};

}  // namespace servoflow::serve
