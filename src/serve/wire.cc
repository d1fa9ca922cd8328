#include "serve/wire.h"

#include <algorithm>
#include <bit>
#include <charconv>
#include <cmath>
#include <cstring>
#include <limits>
#include <msgpack.hpp>
#include <optional>

namespace servoflow::serve {
namespace {

static_assert(std::endian::native == std::endian::little, "arrays are sent as they lie in memory");

struct NamedType {
  const char* name;
  WireType type;
};
// The names np.dtype takes beside its own code strings.
constexpr NamedType kNamed[] = {{"bool", {'b', 1}},    {"int8", {'i', 1}},    {"int16", {'i', 2}},
                                {"int32", {'i', 4}},   {"int64", {'i', 8}},   {"uint8", {'u', 1}},
                                {"uint16", {'u', 2}},  {"uint32", {'u', 4}},  {"uint64", {'u', 8}},
                                {"float16", {'f', 2}}, {"float32", {'f', 4}}, {"float64", {'f', 8}}};

// "<f4" and the like; nothing for what has no fixed size or is not data (objects, records, dates, complex).
std::optional<WireType> parse_dtype(std::string_view text) {
  for (const NamedType& named : kNamed)
    if (text == named.name) return named.type;
  WireType type;
  if (!text.empty() && std::string_view("<>|=").find(text[0]) != std::string_view::npos) {
    type.big_endian = text[0] == '>';
    text.remove_prefix(1);
  }
  if (text.size() < 2 || std::string_view("biufUS").find(text[0]) == std::string_view::npos) return {};
  type.kind = text[0];
  text.remove_prefix(1);
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), type.bytes);
  if (error != std::errc() || end != text.data() + text.size() || text[0] == '-') return {};
  const bool is_text = type.kind == 'U' || type.kind == 'S';
  constexpr int kMaxCharacters = 1 << 20;
  if (is_text) {
    if (type.bytes > kMaxCharacters) return {};
    if (type.kind == 'U') type.bytes *= 4;
    return type;
  }
  const int low = type.kind == 'f' ? 2 : 1, high = type.kind == 'b' ? 1 : 8;
  if (type.bytes < low || type.bytes > high || !std::has_single_bit(static_cast<unsigned>(type.bytes)))
    return {};
  return type;
}

float half_to_float(std::uint16_t half) {
  const int exponent = (half >> 10) & 31;
  const int fraction = half & 1023;
  const float sign = (half & 0x8000) != 0 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction != 0 ? std::numeric_limits<float>::quiet_NaN() : sign * HUGE_VALF;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
  return sign * std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
}

// Builds the tree. msgpack's parser calls it; it stops the parser by returning false, `problem` then says
// why.
class TreeBuilder : public msgpack::null_visitor {
 public:
  explicit TreeBuilder(const WireLimits& limits) : limits_(limits) {}

  std::string problem;
  WireValue root;
  bool complete = false;

  bool visit_nil() { return add({}); }
  bool visit_boolean(bool v) {
    WireValue value{.kind = WireValue::Kind::kBool};
    value.boolean = v;
    return add(std::move(value));
  }
  bool visit_positive_integer(std::uint64_t v) {
    WireValue value{.kind = WireValue::Kind::kUint};
    value.whole = v;
    return add(std::move(value));
  }
  bool visit_negative_integer(std::int64_t v) {
    WireValue value{.kind = WireValue::Kind::kInt};
    value.integer = v;
    return add(std::move(value));
  }
  bool visit_float32(float v) { return visit_float64(v); }
  bool visit_float64(double v) {
    WireValue value{.kind = WireValue::Kind::kReal};
    value.real = v;
    return add(std::move(value));
  }
  bool visit_str(const char* v, std::uint32_t size) { return add_bytes(WireValue::Kind::kText, v, size); }
  bool visit_bin(const char* v, std::uint32_t size) { return add_bytes(WireValue::Kind::kBytes, v, size); }
  bool visit_ext(const char* /*v*/, std::uint32_t /*size*/) {
    return stop("msgpack extension types are not accepted");
  }
  bool start_array(std::uint32_t size) { return open(WireValue::Kind::kList, size); }
  bool end_array() { return close(); }
  bool start_map(std::uint32_t pairs) { return open(WireValue::Kind::kMap, std::uint64_t{2} * pairs); }
  bool start_map_key() {
    in_key_ = true;
    return true;
  }
  bool end_map_key() { return true; }
  bool end_map() { return close(); }
  void parse_error(std::size_t /*parsed*/, std::size_t at) {
    if (problem.empty()) problem = "message: byte " + std::to_string(at) + " begins no msgpack value";
  }
  void insufficient_bytes(std::size_t /*parsed*/, std::size_t at) {
    if (problem.empty())
      problem = "message: ends in the middle of a value (at byte " + std::to_string(at) + ")";
  }

 private:
  using Kind = WireValue::Kind;

  // Where we are: "observation/image" and "state[3]".
  std::string path() const {
    std::string out;
    for (const WireValue& level : stack_) {
      if (level.kind == Kind::kList) {
        out += "[" + std::to_string(level.items.size()) + "]";
      } else if (!level.keys.empty()) {
        out += (out.empty() ? "" : "/") + printable(level.keys.back());
      }
    }
    return out.empty() ? "message" : out;
  }
  static std::string printable(std::string_view text) {
    const std::string shown = quoted(text);
    return shown.substr(1, shown.size() - 2);
  }
  bool stop(const std::string& cause) {
    if (problem.empty()) problem = path() + ": " + cause;
    return false;
  }
  // Counts what a list or map announces; nothing is allocated for it.
  bool count(std::uint64_t values) {
    if (values > limits_.max_values - announced_)
      return stop("more than " + std::to_string(limits_.max_values) + " values in one message");
    announced_ += static_cast<std::size_t>(values);
    return true;
  }

  bool add_bytes(Kind kind, const char* data, std::uint32_t size) {
    const std::string_view bytes(data, size);
    if (in_key_) {
      in_key_ = false;
      if (size > limits_.max_key_bytes)
        return stop("a key of " + std::to_string(size) + " bytes; at most " +
                    std::to_string(limits_.max_key_bytes));
      stack_.back().keys.push_back(bytes);
      return true;
    }
    WireValue value{.kind = kind};
    value.bytes = bytes;
    return add(std::move(value));
  }

  bool add(WireValue value) {
    if (in_key_) return stop(std::string("a key is ") + value.kind_name() + "; keys are strings");
    if (stack_.empty()) {
      if (value.kind != Kind::kMap) return stop(std::string("is ") + value.kind_name() + "; expected a map");
      root = std::move(value);
      complete = true;
      return true;
    }
    stack_.back().items.push_back(std::move(value));
    return true;
  }

  bool open(Kind kind, std::uint64_t children) {
    if (in_key_) return stop("a key is a list or a map; keys are strings");
    if (static_cast<int>(stack_.size()) >= limits_.max_depth)
      return stop("nested deeper than " + std::to_string(limits_.max_depth));
    if (!count(children)) return false;
    stack_.push_back({.kind = kind});
    return true;
  }

  bool close() {
    WireValue done = std::move(stack_.back());
    stack_.pop_back();
    if (done.kind == Kind::kMap && !convert(done)) return false;
    return add(std::move(done));
  }

  // Of equal keys the last wins, as in Python. Sorting indices keeps a message of many keys cheap.
  static void keep_last(WireValue& map) {
    std::vector<std::size_t> order(map.keys.size());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t a, std::size_t b) { return map.keys[a] < map.keys[b]; });
    std::vector<char> dropped(map.keys.size(), 0);
    bool any = false;
    for (std::size_t i = 0; i + 1 < order.size(); ++i)
      if (map.keys[order[i]] == map.keys[order[i + 1]]) {
        dropped[order[i]] = 1;
        any = true;
      }
    if (!any) return;
    std::size_t kept = 0;
    for (std::size_t i = 0; i < map.keys.size(); ++i) {
      if (dropped[i] != 0) continue;
      if (kept != i) {
        map.keys[kept] = map.keys[i];
        map.items[kept] = std::move(map.items[i]);
      }
      ++kept;
    }
    map.keys.resize(kept);
    map.items.resize(kept);
  }

  // A map with a marker becomes an array or a scalar.
  bool convert(WireValue& map) {
    keep_last(map);
    const bool is_array = map.find("__ndarray__") != nullptr;
    if (!is_array && map.find("__npgeneric__") == nullptr) return true;
    const char* what = is_array ? "array" : "scalar";
    const WireValue* dtype = map.find("dtype");
    const WireValue* data = map.find("data");
    if (dtype == nullptr) return stop(std::string(what) + " without dtype");
    if (dtype->kind != Kind::kText && dtype->kind != Kind::kBytes)
      return stop(std::string("dtype: is ") + dtype->kind_name() + "; expected a name such as \"<f4\"");
    const std::optional<WireType> type = parse_dtype(dtype->bytes);
    if (!type)
      return stop("dtype: " + quoted(dtype->bytes) +
                  " is not accepted; numbers, booleans and text are (never objects, records or dates)");
    if (data == nullptr) return stop(std::string(what) + " without data");
    if (!is_array) return convert_scalar(map, *type, *data);
    if (data->kind != Kind::kBytes)
      return stop(std::string("data: is ") + data->kind_name() + "; expected bytes");

    WireValue out{.kind = Kind::kArray};
    out.array.type = *type;
    out.array.dtype = dtype->bytes;
    out.array.data = {reinterpret_cast<const std::uint8_t*>(data->bytes.data()), data->bytes.size()};
    const WireValue* shape = map.find("shape");
    if (shape == nullptr) return stop("array without shape");
    if (!read_shape(*shape, out.array)) return false;
    const std::size_t needed = out.array.elements * static_cast<std::size_t>(type->bytes);
    if (needed != data->bytes.size())
      return stop("data: " + std::to_string(data->bytes.size()) + " bytes; shape " + out.array.shape_text() +
                  " of " + quoted(dtype->bytes) + " needs " + std::to_string(needed));
    map = std::move(out);
    return true;
  }

  bool read_shape(const WireValue& shape, WireArray& out) {
    std::span<const WireValue> sides = shape.items;
    if (shape.kind == Kind::kUint) {
      sides = {&shape, 1};  // NumPy takes a bare number, too
    } else if (shape.kind != Kind::kList) {
      return stop(std::string("shape: is ") + shape.kind_name() + "; expected a list of whole numbers");
    }
    if (sides.size() > static_cast<std::size_t>(limits_.max_dimensions))
      return stop("shape: " + std::to_string(sides.size()) + " dimensions; at most " +
                  std::to_string(limits_.max_dimensions));
    out.elements = 1;
    bool has_zero = false;
    for (const WireValue& side : sides) {
      if (side.kind != Kind::kUint) return stop("shape: a side is not a whole number of 0 or more");
      has_zero = has_zero || side.whole == 0;
    }
    for (const WireValue& side : sides) {
      if (side.whole > limits_.max_elements ||
          (!has_zero && out.elements > limits_.max_elements / side.whole))
        return stop("shape: more than " + std::to_string(limits_.max_elements) + " elements");
      out.elements *= has_zero ? 1 : static_cast<std::size_t>(side.whole);
      out.shape.push_back(static_cast<std::size_t>(side.whole));
    }
    if (has_zero) out.elements = 0;
    return true;
  }

  bool convert_scalar(WireValue& map, const WireType& type, const WireValue& data) {
    const bool is_text = type.kind == 'U' || type.kind == 'S';
    const bool fits = is_text ? data.kind == Kind::kText || data.kind == Kind::kBytes : data.is_number();
    if (!fits)
      return stop(std::string("data: is ") + data.kind_name() + "; expected " +
                  (is_text ? "text" : "a number") + " for a scalar");
    WireValue value = data;
    map = std::move(value);
    return true;
  }

  const WireLimits& limits_;
  std::vector<WireValue> stack_;
  std::size_t announced_ = 0;
  bool in_key_ = false;
};

}  // namespace

double WireArray::number(std::size_t i) const {
  const std::size_t size = static_cast<std::size_t>(type.bytes);
  std::uint8_t raw[8] = {};
  std::memcpy(raw, data.data() + i * size, size);
  if (type.big_endian) std::reverse(raw, raw + size);
  std::uint64_t bits = 0;
  std::memcpy(&bits, raw, 8);
  switch (type.kind) {
    case 'f':
      if (size == 2) return half_to_float(static_cast<std::uint16_t>(bits));
      return size == 4 ? std::bit_cast<float>(static_cast<std::uint32_t>(bits)) : std::bit_cast<double>(bits);
    case 'i': {
      const int unused = 64 - 8 * static_cast<int>(size);  // shifted up and back: the sign is kept
      return static_cast<double>(static_cast<std::int64_t>(bits << unused) >> unused);
    }
    case 'b':
      return bits != 0 ? 1 : 0;
    default:
      return static_cast<double>(bits);
  }
}

std::string WireArray::shape_text() const {
  std::string out = "[";
  for (std::size_t side : shape) out += (out.size() > 1 ? ", " : "") + std::to_string(side);
  return out + "]";
}

bool WireValue::is_number() const {
  return kind == Kind::kBool || kind == Kind::kInt || kind == Kind::kUint || kind == Kind::kReal;
}

double WireValue::number() const {
  switch (kind) {
    case Kind::kBool:
      return boolean ? 1 : 0;
    case Kind::kInt:
      return static_cast<double>(integer);
    case Kind::kUint:
      return static_cast<double>(whole);
    default:
      return real;
  }
}

const WireValue* WireValue::find(std::string_view key) const {
  const auto it = std::find(keys.rbegin(), keys.rend(), key);
  return it == keys.rend() ? nullptr : &items[static_cast<std::size_t>(keys.rend() - it) - 1];
}

const char* WireValue::kind_name() const {
  switch (kind) {
    case Kind::kNil:
      return "nil";
    case Kind::kBool:
      return "a boolean";
    case Kind::kInt:
    case Kind::kUint:
      return "a whole number";
    case Kind::kReal:
      return "a number";
    case Kind::kText:
      return "a string";
    case Kind::kBytes:
      return "bytes";
    case Kind::kList:
      return "a list";
    case Kind::kMap:
      return "a map";
    case Kind::kArray:
      return "an array";
  }
  return "unknown";
}

Result<WireValue> parse_message(std::span<const std::uint8_t> message, const WireLimits& limits) {
  if (message.empty()) return Status::invalid("message: is empty; expected a msgpack map");
  if (message.size() > limits.max_bytes)
    return Status::invalid("message: " + std::to_string(message.size()) + " bytes; at most " +
                           std::to_string(limits.max_bytes));
  TreeBuilder builder(limits);
  std::size_t used = 0;
  try {
    const bool parsed =
        msgpack::parse(reinterpret_cast<const char*>(message.data()), message.size(), used, builder);
    if (!parsed || !builder.complete || !builder.problem.empty())
      return Status::invalid(builder.problem.empty() ? "message: is not msgpack" : builder.problem);
  } catch (const std::exception& error) {  // msgpack reports some sizes by exceptions
    return Status::invalid(std::string("message: is not msgpack: ") + error.what());
  }
  if (used != message.size())
    return Status::invalid("message: " + std::to_string(message.size() - used) +
                           " bytes behind the end of the map");
  return std::move(builder.root);
}

std::string quoted(std::string_view name) {
  std::string out = "\"";
  std::size_t shown = std::min<std::size_t>(name.size(), 100);
  // Not in the middle of a character.
  while (shown < name.size() && shown > 0 && (static_cast<unsigned char>(name[shown]) & 0xc0) == 0x80)
    --shown;
  const bool printable = is_utf8(name.substr(0, shown));
  for (const char c : name.substr(0, shown)) {
    const auto byte = static_cast<unsigned char>(c);
    out += byte < 0x20 || byte == 0x7f || (byte >= 0x80 && !printable) ? '?' : c;
  }
  return out + (shown < name.size() ? "…\"" : "\"");
}

bool is_utf8(std::string_view text) {
  for (std::size_t i = 0; i < text.size();) {
    const auto lead = static_cast<unsigned char>(text[i]);
    if (lead < 0x80) {
      ++i;
      continue;
    }
    const std::size_t bytes = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
    if (lead < 0xc2 || lead > 0xf4 || text.size() - i < bytes) return false;
    std::uint32_t point = lead & (0x7fu >> bytes);
    for (std::size_t k = 1; k < bytes; ++k) {
      const auto next = static_cast<unsigned char>(text[i + k]);
      if ((next & 0xc0) != 0x80) return false;
      point = (point << 6) | (next & 0x3fu);
    }
    constexpr std::uint32_t kSmallest[] = {0, 0, 0x80, 0x800, 0x10000};
    if (point < kSmallest[bytes] || point > 0x10ffff || (point >= 0xd800 && point <= 0xdfff)) return false;
    i += bytes;
  }
  return true;
}

struct WireWriter::Impl {
  msgpack::sbuffer buffer;
  msgpack::packer<msgpack::sbuffer> pack{buffer};

  void key(std::string_view name) {  // Python's packer makes these keys from bytes
    pack.pack_bin(static_cast<std::uint32_t>(name.size()));
    pack.pack_bin_body(name.data(), static_cast<std::uint32_t>(name.size()));
  }
};

WireWriter::WireWriter() : impl_(new Impl) {}
WireWriter::~WireWriter() { delete impl_; }

WireWriter& WireWriter::map(std::size_t entries) {
  impl_->pack.pack_map(static_cast<std::uint32_t>(entries));
  return *this;
}
WireWriter& WireWriter::list(std::size_t items) {
  impl_->pack.pack_array(static_cast<std::uint32_t>(items));
  return *this;
}
WireWriter& WireWriter::text(std::string_view value) {
  impl_->pack.pack_str(static_cast<std::uint32_t>(value.size()));
  impl_->pack.pack_str_body(value.data(), static_cast<std::uint32_t>(value.size()));
  return *this;
}
WireWriter& WireWriter::real(double value) {
  impl_->pack.pack_double(value);
  return *this;
}
WireWriter& WireWriter::whole(std::uint64_t value) {
  impl_->pack.pack_uint64(value);
  return *this;
}
WireWriter& WireWriter::boolean(bool value) {
  value ? impl_->pack.pack_true() : impl_->pack.pack_false();
  return *this;
}
WireWriter& WireWriter::nil() {
  impl_->pack.pack_nil();
  return *this;
}
void WireWriter::raw_array(std::string_view dtype, const void* data, std::size_t bytes,
                           std::span<const std::size_t> shape) {
  map(4);
  impl_->key("__ndarray__");
  boolean(true);
  impl_->key("data");
  impl_->pack.pack_bin(static_cast<std::uint32_t>(bytes));
  impl_->pack.pack_bin_body(static_cast<const char*>(data), static_cast<std::uint32_t>(bytes));
  impl_->key("dtype");
  text(dtype);
  impl_->key("shape");
  list(shape.size());
  for (const std::size_t side : shape) whole(side);
}
WireWriter& WireWriter::array(std::span<const double> values, std::span<const std::size_t> shape) {
  raw_array("<f8", values.data(), values.size_bytes(), shape);
  return *this;
}
WireWriter& WireWriter::array(std::span<const float> values, std::span<const std::size_t> shape) {
  raw_array("<f4", values.data(), values.size_bytes(), shape);
  return *this;
}
std::string WireWriter::take() {
  std::string out(impl_->buffer.data(), impl_->buffer.size());
  impl_->buffer.clear();
  return out;
}

}  // namespace servoflow::serve
