#include "weights/file_source.h"

#include <cstring>

#include "core/bf16.h"
#include "weights/manifest.h"

namespace servoflow::weights {
namespace {

template <typename Stored, typename Convert>
void row_to_floats(const std::byte* from, std::span<float> out, Convert convert) {
  for (std::size_t i = 0; i < out.size(); ++i) {
    Stored value;
    std::memcpy(&value, from + i * sizeof(Stored), sizeof(Stored));  // file offsets may be unaligned
    out[i] = convert(value);
  }
}

}  // namespace

FileSource::FileSource(std::shared_ptr<const TensorFiles> files,
                       std::unordered_map<std::string, StoredTensor> used)
    : files_(std::move(files)), used_(std::move(used)) {
  for (const auto& [name, stored] : used_) {
    const std::string dtype(dtype_name(stored.tensor->dtype));
    if (stored_dtype_.empty()) stored_dtype_ = dtype;
    if (stored_dtype_ != dtype) stored_dtype_ = "mixed";
  }
  if (const auto it = used_.find(kTokenTable); it != used_.end()) table_ = it->second;
}

Result<TensorData> FileSource::get(const std::string& name) const {
  const auto it = used_.find(name);
  if (it == used_.end()) return Status::invalid("tensor \"" + name + "\" is not part of this checkpoint");
  const SafeTensor& tensor = *it->second.tensor;
  return TensorData{tensor.dtype, tensor.shape, tensor.bytes, files_};
}

void FileSource::release(const std::string& name) const {
  if (const auto it = used_.find(name); it != used_.end()) it->second.file->release(*it->second.tensor);
}

void FileSource::release_part(const std::string& name, std::span<const std::byte> part) const {
  const auto it = used_.find(name);
  if (it == used_.end()) return;
  SafeTensor some = *it->second.tensor;
  some.bytes = part;
  it->second.file->release(some);
}

Status FileSource::token_rows(std::span<const std::int32_t> ids, std::span<float> out) const {
  if (!table_) return Status::invalid("this checkpoint has no token table");
  const SafeTensor& table = *table_.tensor;
  const std::int64_t rows = table.shape[0];
  const std::size_t width = static_cast<std::size_t>(table.shape[1]);
  if (out.size() != ids.size() * width)
    return Status::invalid("token_rows: the output does not fit the number of ids");
  const std::size_t row_bytes = width * dtype_size(table.dtype);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= rows)
      return Status::invalid("token id " + std::to_string(ids[i]) + " is outside the token table of " +
                             std::to_string(rows) + " rows");
    const std::byte* from = table.bytes.data() + static_cast<std::size_t>(ids[i]) * row_bytes;
    const std::span<float> row = out.subspan(i * width, width);
    switch (table.dtype) {
      case DType::kBF16:
        row_to_floats<bf16>(from, row, [](bf16 v) { return to_float(v); });
        break;
      case DType::kF16:
        row_to_floats<std::uint16_t>(from, row, [](std::uint16_t v) { return half_to_float(v); });
        break;
      case DType::kF32:
        std::memcpy(row.data(), from, row_bytes);
        break;
      default:
        row_to_floats<double>(from, row, [](double v) { return static_cast<float>(v); });
        break;
    }
  }
  return {};
}

}  // namespace servoflow::weights
