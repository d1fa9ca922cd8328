#include "core/safetensors.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>

#include "core/bf16.h"
#include "core/json.h"
#include "core/status_macros.h"

namespace servoflow {
namespace {

static_assert(std::endian::native == std::endian::little, "tensor bytes are used in place");

constexpr std::uint64_t kMaxHeader = 100'000'000;  // the reference implementation's limit
constexpr std::size_t kMaxProblems = 16;           // told in full; the rest is counted
constexpr std::size_t kMaxShown = 160;             // characters of a name or cause taken from the file

std::string clipped(const std::string& text) {
  if (text.size() <= kMaxShown) return text;
  std::size_t end = kMaxShown;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xc0) == 0x80)
    --end;  // never half a UTF-8 character
  return text.substr(0, end) + "…";
}

// A name out of an untrusted header, on one line and of bounded length.
std::string quoted(const std::string& name) {
  std::string out = clipped(name);
  for (char& c : out)
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  return "\"" + out + "\"";
}

class Problems {
 public:
  void add(std::string what) {
    if (++count_ <= kMaxProblems) list_.push_back(std::move(what));
  }
  Status status(const std::string& where) const {
    if (count_ == 0) return {};
    if (count_ == 1) return Status::invalid(where + ": " + list_[0]);
    std::string out = where + ": " + std::to_string(count_) + " problems in the header:";
    for (const std::string& line : list_) out += "\n  " + line;
    if (count_ > list_.size()) out += "\n  and " + std::to_string(count_ - list_.size()) + " more";
    return Status::invalid(out);
  }

 private:
  std::vector<std::string> list_;
  std::size_t count_ = 0;
};

// Bytes of a tensor, or nothing if they overflow. Bounded so that Shape::elements() cannot overflow either.
std::optional<std::uint64_t> byte_size(DType dtype, const Shape& shape) {
  std::uint64_t bytes = dtype_size(dtype);
  for (const std::int64_t d : shape)
    if (__builtin_mul_overflow(bytes, static_cast<std::uint64_t>(d), &bytes) ||
        bytes > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()))
      return std::nullopt;
  return bytes;
}

bool is_size(const Json& value) {
  return value.is_number_unsigned() &&
         value.get<std::uint64_t>() <= static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
}

struct Placed {
  SafeTensor tensor;
  std::uint64_t begin = 0, end = 0;
};

// One header entry: {"dtype": …, "shape": […], "data_offsets": [begin, end]}. Returns the cause if it is
// wrong.
std::string read_entry(const Json& entry, std::uint64_t data_size, Placed& out) {
  if (!entry.is_object()) return "expected an object, found " + json_kind(entry);
  for (const auto& [key, value] : entry.items())
    if (key != "dtype" && key != "shape" && key != "data_offsets") return "unknown key " + quoted(key);
  for (const char* key : {"dtype", "shape", "data_offsets"})
    if (!entry.contains(key)) return std::string(key) + " is missing";
  const Json& dtype = entry["dtype"];
  if (!dtype.is_string()) return "dtype: expected a string, found " + json_kind(dtype);
  const std::optional<DType> known = dtype_from_name(dtype.get_ref<const std::string&>());
  if (!known) return "dtype: unknown name " + quoted(dtype.get_ref<const std::string&>());
  out.tensor.dtype = *known;

  const Json& shape = entry["shape"];
  if (!shape.is_array()) return "shape: expected an array, found " + json_kind(shape);
  if (shape.size() > Shape::kMaxRank)
    return "shape: " + std::to_string(shape.size()) + " dimensions, at most " +
           std::to_string(Shape::kMaxRank) + " are supported";
  for (const Json& dim : shape) {
    if (!is_size(dim))
      return "shape: " + clipped(dim.dump(-1, ' ', true, Json::error_handler_t::replace)) +
             " is not a valid dimension";
    out.tensor.shape.push_back(dim.get<std::int64_t>());
  }

  const Json& offsets = entry["data_offsets"];
  if (!offsets.is_array() || offsets.size() != 2 || !is_size(offsets[0]) || !is_size(offsets[1]))
    return "data_offsets: expected two non-negative integers";
  out.begin = offsets[0].get<std::uint64_t>();
  out.end = offsets[1].get<std::uint64_t>();
  const std::string range = "[" + std::to_string(out.begin) + ", " + std::to_string(out.end) + "]";
  if (out.begin > out.end) return "data_offsets " + range + " end before they begin";
  if (out.end > data_size)
    return "data_offsets " + range + " reach beyond the file, which holds " + std::to_string(data_size) +
           " bytes of data (is it cut short?)";
  const std::optional<std::uint64_t> bytes = byte_size(*known, out.tensor.shape);
  if (!bytes) return "shape " + out.tensor.shape.to_string() + " overflows";
  if (*bytes != out.end - out.begin)
    return std::string(dtype_name(*known)) + " " + out.tensor.shape.to_string() + " needs " +
           std::to_string(*bytes) + " bytes, data_offsets " + range + " hold " +
           std::to_string(out.end - out.begin);
  return "";
}

// The data section must be covered exactly once: neither overlaps nor holes nor a tail nobody owns.
void check_cover(const std::vector<Placed>& placed, std::uint64_t data_size, Problems& problems) {
  std::uint64_t covered = 0;
  const std::string* previous = nullptr;
  for (const Placed& p : placed) {
    if (p.begin < covered) {
      problems.add("tensor " + quoted(p.tensor.name) + ": overlaps " + quoted(*previous) + " by " +
                   std::to_string(std::min(covered, p.end) - p.begin) + " bytes");
    } else if (p.begin > covered) {
      problems.add("tensor " + quoted(p.tensor.name) + ": starts at byte " + std::to_string(p.begin) +
                   ", leaving a hole after byte " + std::to_string(covered));
    }
    if (p.end >= covered) previous = &p.tensor.name;
    covered = std::max(covered, p.end);
  }
  if (covered < data_size)
    problems.add(std::to_string(data_size - covered) + " bytes after the last tensor belong to none");
}

template <typename Stored, typename Out>
void convert(std::span<const std::byte> bytes, std::vector<Out>& out) {
  for (std::size_t i = 0; i < out.size(); ++i) {
    Stored value;
    std::memcpy(&value, bytes.data() + i * sizeof(Stored), sizeof(Stored));
    if constexpr (std::is_same_v<Stored, bf16>) {
      out[i] = static_cast<Out>(to_float(value));
    } else {
      out[i] = static_cast<Out>(value);
    }
  }
}

template <typename Out>
Result<std::vector<Out>> converted(const SafeTensor& tensor) {
  std::vector<Out> out(tensor.bytes.size() / dtype_size(tensor.dtype));
  switch (tensor.dtype) {
    case DType::kF64:
      convert<double>(tensor.bytes, out);
      break;
    case DType::kF32:
      convert<float>(tensor.bytes, out);
      break;
    case DType::kBF16:
      convert<bf16>(tensor.bytes, out);
      break;
    case DType::kF16: {
      for (std::size_t i = 0; i < out.size(); ++i) {
        std::uint16_t half;
        std::memcpy(&half, tensor.bytes.data() + i * 2, 2);
        out[i] = static_cast<Out>(half_to_float(half));
      }
      break;
    }
    case DType::kI64:
      convert<std::int64_t>(tensor.bytes, out);
      break;
    case DType::kI32:
      convert<std::int32_t>(tensor.bytes, out);
      break;
    case DType::kI16:
      convert<std::int16_t>(tensor.bytes, out);
      break;
    case DType::kI8:
      convert<std::int8_t>(tensor.bytes, out);
      break;
    case DType::kU64:
      convert<std::uint64_t>(tensor.bytes, out);
      break;
    case DType::kU32:
      convert<std::uint32_t>(tensor.bytes, out);
      break;
    case DType::kU16:
      convert<std::uint16_t>(tensor.bytes, out);
      break;
    case DType::kU8:
      convert<std::uint8_t>(tensor.bytes, out);
      break;
    case DType::kBool: {
      for (std::size_t i = 0; i < out.size(); ++i) out[i] = tensor.bytes[i] != std::byte{0} ? Out{1} : Out{0};
      break;
    }
    case DType::kF8E4M3:
    case DType::kF8E5M2:
    case DType::kF8E8M0:
      return Status::invalid("tensor " + quoted(tensor.name) + ": " + std::string(dtype_name(tensor.dtype)) +
                             " values cannot be read as numbers here; store them as F32 or BF16");
  }
  return out;
}

}  // namespace

Result<SafetensorsFile> SafetensorsFile::parse(std::span<const std::byte> bytes, const std::string& where) {
  constexpr std::string_view kLfs = "version https://git-lfs";
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  if (text.starts_with(kLfs))
    return Status::invalid(where +
                           ": is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`");
  if (bytes.size() < 8)
    return Status::invalid(where + ": " + std::to_string(bytes.size()) +
                           " bytes are too few for a safetensors file (is it cut short?)");
  std::uint64_t header_size;
  std::memcpy(&header_size, bytes.data(), 8);
  if (header_size > kMaxHeader)
    return Status::invalid(where + ": header length " + std::to_string(header_size) +
                           " is above the limit of " + std::to_string(kMaxHeader) +
                           " bytes; this is no safetensors file");
  if (header_size > bytes.size() - 8)
    return Status::invalid(where + ": header length " + std::to_string(header_size) +
                           " is beyond the file's " + std::to_string(bytes.size()) +
                           " bytes (is it cut short?)");
  const std::string_view header_text = text.substr(8, header_size);
  if (!header_text.starts_with('{')) return Status::invalid(where + ": header is not a JSON object");
  Result<Json> header = parse_json(header_text, "");
  if (!header.ok()) return Status::invalid(where + ": header" + clipped(header.status().message()));

  SafetensorsFile file;
  file.path_ = where;
  const std::span<const std::byte> data = bytes.subspan(8 + header_size);
  Problems problems;
  std::vector<Placed> placed;
  bool all_placed = true;
  for (const auto& [name, entry] : header->items()) {
    if (name == "__metadata__") {
      if (!entry.is_object()) {
        problems.add("__metadata__: expected an object, found " + json_kind(entry));
        continue;
      }
      for (const auto& [key, value] : entry.items()) {
        if (value.is_string()) {
          file.metadata_[key] = value.get<std::string>();
        } else {
          problems.add("__metadata__ " + quoted(key) + ": expected a string, found " + json_kind(value));
        }
      }
      continue;
    }
    Placed p;
    p.tensor.name = name;
    if (std::string cause = read_entry(entry, data.size(), p); !cause.empty()) {
      problems.add("tensor " + quoted(name) + ": " + std::move(cause));
      all_placed = false;
      continue;
    }
    p.tensor.bytes = data.subspan(p.begin, p.end - p.begin);
    placed.push_back(std::move(p));
  }
  std::sort(placed.begin(), placed.end(), [](const Placed& a, const Placed& b) {
    return std::tie(a.begin, a.end, a.tensor.name) < std::tie(b.begin, b.end, b.tensor.name);
  });
  // A broken entry leaves an apparent hole, which would only repeat that entry's own problem.
  if (all_placed) check_cover(placed, data.size(), problems);
  SF_RETURN_IF_ERROR(problems.status(where));

  file.tensors_.reserve(placed.size());
  for (Placed& p : placed) {
    file.index_.emplace(p.tensor.name, file.tensors_.size());
    file.tensors_.push_back(std::move(p.tensor));
  }
  return file;
}

Result<SafetensorsFile> SafetensorsFile::open(const std::string& path) {
  SF_ASSIGN_OR_RETURN(MappedFile mapped, MappedFile::open(path));
  auto owner = std::make_shared<MappedFile>(std::move(mapped));
  SF_ASSIGN_OR_RETURN(SafetensorsFile file, parse(owner->bytes(), path));
  file.file_ = std::move(owner);
  return file;
}

const SafeTensor* SafetensorsFile::find(const std::string& name) const {
  const auto it = index_.find(name);
  return it == index_.end() ? nullptr : &tensors_[it->second];
}

void SafetensorsFile::release(const SafeTensor& tensor) const {
  // Parsed memory is the caller's; dropping its pages would zero them.
  if (!file_->bytes().empty()) file_->release(tensor.bytes);
}

Result<std::vector<float>> to_floats(const SafeTensor& tensor) { return converted<float>(tensor); }
Result<std::vector<double>> to_doubles(const SafeTensor& tensor) { return converted<double>(tensor); }

Result<std::unique_ptr<SafetensorsWriter>> SafetensorsWriter::create(
    const std::string& path, const std::vector<Entry>& entries,
    const std::map<std::string, std::string>& metadata) {
  Json header = Json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  std::uint64_t offset = 0;
  for (const Entry& entry : entries) {
    const std::string where = path + ": tensor " + quoted(entry.name) + ": ";
    if (entry.name.empty() || entry.name == "__metadata__")
      return Status::invalid(where + "not a valid name");
    if (header.contains(entry.name)) return Status::invalid(where + "declared twice");
    Json dims = Json::array();
    for (const std::int64_t d : entry.shape) {
      if (d < 0)
        return Status::invalid(where + "shape " + entry.shape.to_string() + " has a negative dimension");
      dims.push_back(d);
    }
    const std::optional<std::uint64_t> bytes = byte_size(entry.dtype, entry.shape);
    std::uint64_t end = 0;
    if (!bytes || __builtin_add_overflow(offset, *bytes, &end))
      return Status::invalid(where + "shape " + entry.shape.to_string() + " overflows");
    header[entry.name] = {
        {"dtype", dtype_name(entry.dtype)}, {"shape", std::move(dims)}, {"data_offsets", {offset, end}}};
    offset = end;
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const Json::exception&) {
    return Status::invalid(path + ": a tensor name or metadata text is not valid UTF-8");
  }
  text.append((8 - text.size() % 8) % 8, ' ');  // tensor data starts on 8 bytes
  if (text.size() > kMaxHeader) return Status::invalid(path + ": the header is larger than readers accept");

  static std::atomic<unsigned> serial{0};
  std::unique_ptr<SafetensorsWriter> writer(new SafetensorsWriter);
  writer->path_ = path;
  writer->temporary_ = path + ".tmp" + std::to_string(::getpid()) + "." + std::to_string(serial++);
  writer->file_ = std::fopen(writer->temporary_.c_str(), "wbe");
  if (writer->file_ == nullptr) return Status::invalid(path + ": cannot write: " + std::strerror(errno));
  const std::uint64_t length = text.size();
  writer->expected_ = 8 + length + offset;
  SF_RETURN_IF_ERROR(writer->write(std::as_bytes(std::span(&length, 1))));
  SF_RETURN_IF_ERROR(writer->write(std::as_bytes(std::span(text.data(), text.size()))));
  return writer;
}

SafetensorsWriter::~SafetensorsWriter() {
  if (file_ == nullptr) return;
  std::fclose(file_);
  ::unlink(temporary_.c_str());
}

Status SafetensorsWriter::write(std::span<const std::byte> bytes) {
  if (file_ == nullptr) return Status::runtime(path_ + ": written to after it was finished");
  if (bytes.size() > expected_ - written_)
    return Status::runtime(path_ + ": more tensor bytes were given than declared");
  if (!bytes.empty() && std::fwrite(bytes.data(), 1, bytes.size(), file_) != bytes.size())
    return Status::runtime(path_ + ": write error: " + std::strerror(errno));
  written_ += bytes.size();
  return {};
}

Status SafetensorsWriter::finish() {
  if (file_ == nullptr) return Status::runtime(path_ + ": finished twice");
  if (written_ != expected_)
    return Status::runtime(path_ + ": " + std::to_string(expected_ - written_) +
                           " declared tensor bytes were never given");
  const bool closed = std::fclose(std::exchange(file_, nullptr)) == 0;
  if (closed && std::rename(temporary_.c_str(), path_.c_str()) == 0) return {};
  const Status status = Status::runtime(path_ + ": cannot write: " + std::strerror(errno));
  ::unlink(temporary_.c_str());
  return status;
}

}  // namespace servoflow
