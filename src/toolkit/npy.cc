#include "toolkit/npy.h"

#include <bit>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string_view>

#include "core/file.h"
#include "core/status_macros.h"

namespace servoflow::toolkit {
namespace {

static_assert(std::endian::native == std::endian::little, "the data is copied as it lies in the file");

constexpr std::string_view kMagic = "\x93NUMPY";
constexpr std::size_t kMaxHeader = 64 << 10;
constexpr std::size_t kMaxFile = std::size_t{256} << 20;

// The header's dict literal, read strictly: these three keys, once each, and nothing else.
class Header {
 public:
  explicit Header(std::string_view text) : text_(text) {}

  std::optional<std::string> descr;
  std::optional<bool> fortran_order;
  std::optional<Shape> shape;

  // Empty on success, else the cause.
  std::string parse() {
    if (!take('{')) return "does not start with '{'";
    while (!take('}')) {
      const std::optional<std::string> key = quoted();
      if (!key || !take(':')) return "a key or its ':' is missing at byte " + std::to_string(at_);
      if (const std::string cause = value(*key); !cause.empty()) return cause;
      if (!take(',') && peek() != '}') return "a ',' is missing after '" + *key + "'";
    }
    skip_blanks();
    if (at_ != text_.size()) return "text after the closing '}'";
    if (!descr || !fortran_order || !shape) return "descr, fortran_order or shape is missing";
    return "";
  }

 private:
  std::string value(const std::string& key) {
    if (key == "descr") {
      if (descr) return "descr appears twice";
      descr = quoted();
      return descr ? "" : "descr: not a quoted type (arrays of records are not supported)";
    }
    if (key == "fortran_order") {
      if (fortran_order) return "fortran_order appears twice";
      if (word("True")) fortran_order = true;
      if (!fortran_order && word("False")) fortran_order = false;
      return fortran_order ? "" : "fortran_order: neither True nor False";
    }
    if (key == "shape") {
      if (shape) return "shape appears twice";
      return dims();
    }
    return "unknown key '" + key.substr(0, 40) + "'";
  }

  std::string dims() {
    if (!take('(')) return "shape: not a tuple";
    Shape out;
    while (!take(')')) {
      std::int64_t dim = 0;
      std::size_t digits = 0;
      for (skip_blanks(); at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; ++at_, ++digits)
        if (digits < 12) dim = dim * 10 + (text_[at_] - '0');
      if (digits == 0 || digits > 12) return "shape: a dimension is not a plain number of up to 12 digits";
      if (out.rank() == Shape::kMaxRank) return "shape: more than 8 dimensions";
      out.push_back(dim);
      if (!take(',') && peek() != ')') return "shape: a ',' is missing";
    }
    shape = out;
    return "";
  }

  std::optional<std::string> quoted() {
    skip_blanks();
    if (at_ >= text_.size() || (text_[at_] != '\'' && text_[at_] != '"')) return {};
    const std::size_t end = text_.find(text_[at_], at_ + 1);
    if (end == std::string_view::npos) return {};
    std::string out(text_.substr(at_ + 1, end - at_ - 1));
    at_ = end + 1;
    return out;
  }
  bool word(std::string_view expected) {
    skip_blanks();
    if (text_.substr(at_, expected.size()) != expected) return false;
    at_ += expected.size();
    return true;
  }
  void skip_blanks() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n')) ++at_;
  }
  char peek() {
    skip_blanks();
    return at_ < text_.size() ? text_[at_] : '\0';
  }
  bool take(char c) {
    if (peek() != c) return false;
    ++at_;
    return true;
  }

  std::string_view text_;
  std::size_t at_ = 0;
};

template <typename T>
std::vector<double> widen(std::span<const std::byte> data, std::size_t count) {
  std::vector<double> out(count);
  for (std::size_t i = 0; i < count; ++i) {
    T value;
    std::memcpy(&value, data.data() + i * sizeof(T), sizeof(T));
    out[i] = static_cast<double>(value);
  }
  return out;
}

template <typename T>
std::vector<std::byte> encode(const Shape& shape, std::span<const T> values, const char* descr) {
  std::string dims;
  for (std::int64_t d : shape) dims += std::to_string(d) + ", ";
  if (shape.rank() > 1) dims.resize(dims.size() - 2);
  if (shape.rank() == 1) dims.resize(dims.size() - 1);
  std::string header =
      std::string("{'descr': '") + descr + "', 'fortran_order': False, 'shape': (" + dims + "), }";
  // NumPy aligns the data to 64 bytes, so that a mapped file can be used in place.
  const std::size_t before = kMagic.size() + 4;
  header.append(64 - (before + header.size() + 1) % 64, ' ');
  header += '\n';

  std::vector<std::byte> out(before + header.size() + values.size_bytes());
  std::memcpy(out.data(), kMagic.data(), kMagic.size());
  out[6] = std::byte{1};
  out[7] = std::byte{0};
  out[8] = static_cast<std::byte>(header.size() & 0xff);
  out[9] = static_cast<std::byte>(header.size() >> 8);
  std::memcpy(out.data() + before, header.data(), header.size());
  if (!values.empty()) std::memcpy(out.data() + before + header.size(), values.data(), values.size_bytes());
  return out;
}

}  // namespace

Result<NpyArray> parse_npy(std::span<const std::byte> bytes, const std::string& where) {
  if (bytes.size() < 10 || std::memcmp(bytes.data(), kMagic.data(), kMagic.size()) != 0)
    return Status::invalid(where + ": not a .npy file (write one with numpy.save)");
  const int major = std::to_integer<int>(bytes[6]);
  if (major < 1 || major > 3)
    return Status::invalid(where + ": .npy version " + std::to_string(major) +
                           " is unknown, 1 to 3 are supported");
  const std::size_t field = major == 1 ? 2 : 4;
  if (bytes.size() < 8 + field) return Status::invalid(where + ": header: the file ends inside its length");
  std::size_t length = 0;
  for (std::size_t i = 0; i < field; ++i) length |= std::to_integer<std::size_t>(bytes[8 + i]) << (8 * i);
  if (length > kMaxHeader)
    return Status::invalid(where + ": header: " + std::to_string(length) + " bytes are too many");
  if (length > bytes.size() - 8 - field) return Status::invalid(where + ": header: longer than the file");

  Header header({reinterpret_cast<const char*>(bytes.data()) + 8 + field, length});
  if (const std::string cause = header.parse(); !cause.empty())
    return Status::invalid(where + ": header: " + cause);
  const bool single = *header.descr == "<f4", dbl = *header.descr == "<f8";
  if (!single && !dbl)
    return Status::invalid(where + ": descr: type '" + header.descr->substr(0, 40) +
                           "' is not supported, save float32 or float64 (array.astype('<f4'))");
  if (*header.fortran_order && header.shape->rank() > 1)
    return Status::invalid(where + ": fortran_order: column-major data, save numpy.ascontiguousarray(array)");

  const std::size_t width = single ? 4 : 8;
  const std::span<const std::byte> data = bytes.subspan(8 + field + length);
  std::size_t count = 1;
  for (std::int64_t d : *header.shape)
    if (__builtin_mul_overflow(count, static_cast<std::size_t>(d), &count) || count > kMaxFile)
      return Status::invalid(where + ": shape: " + header.shape->to_string() + " is too large");
  if (count * width != data.size())
    return Status::invalid(where + ": data: " + std::to_string(data.size()) + " bytes, shape " +
                           header.shape->to_string() + " needs " + std::to_string(count * width));
  return NpyArray{*header.shape, single ? widen<float>(data, count) : widen<double>(data, count)};
}

Result<NpyArray> read_npy(const std::string& path) {
  SF_ASSIGN_OR_RETURN(const std::vector<std::uint8_t> bytes, read_binary_file(path, kMaxFile));
  return parse_npy(std::as_bytes(std::span(bytes)), path);
}

std::vector<std::byte> npy_bytes(const Shape& shape, std::span<const double> values) {
  return encode(shape, values, "<f8");
}
std::vector<std::byte> npy_bytes(const Shape& shape, std::span<const float> values) {
  return encode(shape, values, "<f4");
}

}  // namespace servoflow::toolkit
