#include "client_wire.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <msgpack.hpp>

namespace robot {
namespace {

static_assert(std::endian::native == std::endian::little, "arrays are sent as they lie in memory");
constexpr std::size_t kMaxSide = std::size_t{1} << 20;  // of `actions`

using Packer = msgpack::packer<msgpack::sbuffer>;

std::uint32_t size32(std::size_t size, const std::string& key) {
  if (size > std::numeric_limits<std::uint32_t>::max())
    throw std::invalid_argument(key + ": more than msgpack's 4 GiB");
  return static_cast<std::uint32_t>(size);
}

void pack_text(Packer& pack, std::string_view text) {
  pack.pack_str(size32(text.size(), "text"));
  pack.pack_str_body(text.data(), static_cast<std::uint32_t>(text.size()));
}

void pack_bytes(Packer& pack, const std::string& key, const void* data, std::size_t bytes) {
  pack.pack_bin(size32(bytes, key));
  if (bytes > 0) pack.pack_bin_body(static_cast<const char*>(data), static_cast<std::uint32_t>(bytes));
}

template <class T>
constexpr const char* dtype_of() {
  return std::is_same_v<T, double> ? "<f8" : std::is_same_v<T, float> ? "<f4" : "|u1";
}

template <class T>
void pack_array(Packer& pack, const std::string& key, const Array<T>& array) {
  std::size_t left = array.values.size();  // divided by every side: products of hostile shapes overflow
  bool fits = true;
  for (const std::size_t side : array.shape) {
    fits = fits && side > 0 && left % side == 0;
    if (!fits) break;
    left /= side;
  }
  if (!fits || left != 1)
    throw std::invalid_argument(key + ": " + std::to_string(array.values.size()) +
                                " values do not fill its shape");
  // The marker keys are bytes, as Python's packer makes them.
  const auto marker = [&](std::string_view name) { pack_bytes(pack, key, name.data(), name.size()); };
  pack.pack_map(4);
  marker("__ndarray__");
  pack.pack_true();
  marker("data");
  pack_bytes(pack, key, array.values.data(), array.values.size() * sizeof(T));
  marker("dtype");
  pack_text(pack, dtype_of<T>());
  marker("shape");
  pack.pack_array(size32(array.shape.size(), key));
  for (const std::size_t side : array.shape) pack.pack_uint64(side);
}

struct ValuePacker {
  Packer& pack;
  const std::string& key;
  void operator()(const std::string& text) const { pack_text(pack, text); }
  void operator()(std::int64_t whole) const { pack.pack_int64(whole); }
  template <class T>
  void operator()(const Array<T>& array) const {
    pack_array(pack, key, array);
  }
};

void pack_entries(Packer& pack, const std::map<std::string, Value>& entries) {
  for (const auto& [key, value] : entries) {
    pack_text(pack, key);
    std::visit(ValuePacker{pack, key}, value);
  }
}

// Parses a whole message. What it allocates is bounded by its size and these limits.
msgpack::object_handle unpack_map(std::string_view message) {
  constexpr std::size_t kItems = 65536, kDepth = 16;
  const msgpack::unpack_limit limit(kItems, kItems, message.size(), message.size(), message.size(), kDepth);
  msgpack::object_handle out;
  std::size_t used = 0;
  try {
    out = msgpack::unpack(message.data(), message.size(), used, nullptr, nullptr, limit);
  } catch (const std::exception& error) {  // the library reports malformed bytes and sizes by exceptions
    throw BadReply(std::string("the reply is not msgpack: ") + error.what());
  }
  if (used != message.size()) throw BadReply("the reply goes on behind its end");
  if (out.get().type != msgpack::type::MAP) throw BadReply("the reply is not a map");
  return out;
}

bool text_of(const msgpack::object& object, std::string_view& out) {
  if (object.type == msgpack::type::STR) {
    out = {object.via.str.ptr, object.via.str.size};
  } else if (object.type == msgpack::type::BIN) {
    out = {object.via.bin.ptr, object.via.bin.size};
  } else {
    return false;
  }
  return true;
}

// The value by that key, which may be text or bytes; null when there is none. Of equal keys the last counts.
const msgpack::object* find(const msgpack::object& map, std::string_view key) {
  const msgpack::object* found = nullptr;
  std::string_view name;
  for (std::uint32_t i = 0; i < map.via.map.size; ++i)
    if (text_of(map.via.map.ptr[i].key, name) && name == key) found = &map.via.map.ptr[i].val;
  return found;
}

std::size_t side_of(const msgpack::object& object) {
  if (object.type != msgpack::type::POSITIVE_INTEGER || object.via.u64 < 1 || object.via.u64 > kMaxSide)
    throw BadReply("actions: a side of the shape is not between 1 and " + std::to_string(kMaxSide));
  return static_cast<std::size_t>(object.via.u64);
}

template <class T>
void copy_values(std::string_view data, std::vector<double>& out) {
  for (std::size_t i = 0; i < out.size(); ++i) {
    T value;
    std::memcpy(&value, data.data() + i * sizeof(T), sizeof(T));
    out[i] = value;
  }
}

}  // namespace

std::string encode(const Observation& observation) {
  msgpack::sbuffer buffer;
  Packer pack(buffer);
  const bool has_images = !observation.images.empty();
  pack.pack_map(size32(observation.fields.size() + (has_images ? 1 : 0), "observation"));
  pack_entries(pack, observation.fields);
  if (has_images) {
    pack_text(pack, "images");
    pack.pack_map(size32(observation.images.size(), "images"));
    pack_entries(pack, observation.images);
  }
  return {buffer.data(), buffer.size()};
}

Actions decode_actions(std::string_view reply) {
  const msgpack::object_handle message = unpack_map(reply);
  const msgpack::object* array = find(message.get(), "actions");
  if (array == nullptr) throw BadReply("the reply has no actions");
  if (array->type != msgpack::type::MAP || find(*array, "__ndarray__") == nullptr)
    throw BadReply("actions: not an array");
  const msgpack::object* shape = find(*array, "shape");
  if (shape == nullptr || shape->type != msgpack::type::ARRAY || shape->via.array.size != 2)
    throw BadReply("actions: the shape is not [horizon, columns]");
  Actions out;
  out.horizon = side_of(shape->via.array.ptr[0]);
  out.dim = side_of(shape->via.array.ptr[1]);
  const msgpack::object* dtype = find(*array, "dtype");
  std::string_view type, data;
  if (dtype == nullptr || !text_of(*dtype, type) || (type != "<f8" && type != "<f4"))
    throw BadReply("actions: the dtype is neither <f8 nor <f4");
  const msgpack::object* bytes = find(*array, "data");
  if (bytes == nullptr || bytes->type != msgpack::type::BIN) throw BadReply("actions: no data");
  text_of(*bytes, data);
  const std::size_t size = type == "<f8" ? sizeof(double) : sizeof(float);
  const std::size_t needed = out.horizon * out.dim * size;  // sides of at most 2^20: below 2^43
  if (data.size() != needed)
    throw BadReply("actions: " + std::to_string(data.size()) + " bytes of data; the shape needs " +
                   std::to_string(needed));
  out.values.resize(out.horizon * out.dim);
  size == sizeof(double) ? copy_values<double>(data, out.values) : copy_values<float>(data, out.values);
  return out;
}

std::map<std::string, std::string> decode_metadata(std::string_view message) {
  const msgpack::object_handle handle = unpack_map(message);
  const msgpack::object& map = handle.get();
  std::map<std::string, std::string> out;
  for (std::uint32_t i = 0; i < map.via.map.size; ++i) {
    const msgpack::object& value = map.via.map.ptr[i].val;
    std::string_view key, text;
    if (!text_of(map.via.map.ptr[i].key, key)) continue;
    if (value.type == msgpack::type::POSITIVE_INTEGER) {
      out[std::string(key)] = std::to_string(value.via.u64);
    } else if (text_of(value, text)) {
      out[std::string(key)] = std::string(text);
    }
  }
  return out;
}

std::string printable(std::string_view text) {
  constexpr std::size_t kMost = 300;
  std::string out(text.substr(0, kMost));
  for (char& c : out)
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = ' ';
  return text.size() > kMost ? out + " [...]" : out;
}

}  // namespace robot
