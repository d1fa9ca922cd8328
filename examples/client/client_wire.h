// The messages of openpi's policy server, as a client sees them: msgpack with NumPy arrays as maps
// {__ndarray__: true, data: bytes in C order, dtype: "<f8", shape: [2, 3]}.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "action_timeline.h"

namespace robot {

// A reply that is not what the protocol says; the message names the field.
class BadReply : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

template <class T>
struct Array {
  std::vector<std::size_t> shape;  // as many values as its product
  std::vector<T> values;           // in C order
};

// Text, a whole number (`num_steps`), joint values, noise, or a picture: bytes [height, width, 3] or
// [3, height, width].
using Value = std::variant<std::string, std::int64_t, Array<double>, Array<float>, Array<std::uint8_t>>;

// What one request holds. The keys are those of the robot's contract (`servoflow inspect`).
struct Observation {
  std::map<std::string, Value> fields;
  std::map<std::string, Value> images;  // a map of its own under the key "images", as ALOHA sends it
};

// Throws std::invalid_argument, which names the field, when an array's values do not fill its shape.
std::string encode(const Observation& observation);

// `actions` of a reply, float64 or float32, with every size checked. Throws BadReply.
Actions decode_actions(std::string_view reply);

// The entries of the server's first message that are text or whole numbers. Throws BadReply.
std::map<std::string, std::string> decode_metadata(std::string_view message);

// For messages: at most 300 bytes, without control characters.
std::string printable(std::string_view text);

}  // namespace robot
