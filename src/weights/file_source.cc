#include "weights/file_source.h"

#include <cstring>
#include <map>

#include "core/bf16.h"
#include "core/status_macros.h"
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
                       std::unordered_map<std::string, StoredTensor> used,
                       std::unordered_map<std::string, StoredLayer> layers)
    : files_(std::move(files)), used_(std::move(used)), layers_(std::move(layers)) {
  std::map<std::string, quant::LinearFormat> formats;  // by name, so that reports do not depend on hashing
  for (const auto& [name, layer] : layers_)
    formats.emplace(quant::name(layer.group.format), layer.group.format);
  for (const auto& [name, format] : formats) formats_.push_back(format);
  for (const auto& [name, stored] : used_) {
    const std::string dtype(dtype_name(stored.tensor->dtype));
    if (stored_dtype_.empty()) stored_dtype_ = dtype;
    if (stored_dtype_ != dtype) stored_dtype_ = "mixed";
  }
  if (const auto it = used_.find(kTokenTable); it != used_.end()) table_ = it->second;
}

std::optional<quant::LinearFormat> FileSource::format_of(const std::string& name) const {
  const auto it = layers_.find(name);
  return it == layers_.end() ? std::nullopt : std::optional(it->second.group.format);
}

Result<std::optional<quant::QuantizedMatrix>> FileSource::quantized(const std::string& name) const {
  const auto it = layers_.find(name);
  if (it == layers_.end()) return std::optional<quant::QuantizedMatrix>();
  const StoredLayer& layer = it->second;
  const quant::TensorLookup lookup = [&layer](const std::string& wanted) -> std::optional<quant::TensorView> {
    const auto found = layer.tensors.find(wanted);
    if (found == layer.tensors.end()) return {};
    const SafeTensor& tensor = *found->second.tensor;
    return quant::TensorView{tensor.dtype, tensor.shape, tensor.bytes};
  };
  const std::string linear = name.substr(0, name.size() - std::string_view(".weight").size());
  SF_ASSIGN_OR_RETURN(quant::QuantizedMatrix matrix, quant::read_linear(linear, layer.group, layer.convention,
                                                                        layer.rows, layer.cols, lookup));
  return std::optional(std::move(matrix));
}

Result<TensorData> FileSource::get(const std::string& name) const {
  if (layers_.contains(name)) {
    SF_ASSIGN_OR_RETURN(const std::optional<quant::QuantizedMatrix> matrix, quantized(name));
    const auto values = std::make_shared<std::vector<float>>(quant::dequantize(*matrix));
    return TensorData{DType::kF32, {matrix->rows, matrix->cols}, std::as_bytes(std::span(*values)), values};
  }
  const auto it = used_.find(name);
  if (it == used_.end()) return Status::invalid("tensor \"" + name + "\" is not part of this checkpoint");
  const SafeTensor& tensor = *it->second.tensor;
  return TensorData{tensor.dtype, tensor.shape, tensor.bytes, files_};
}

void FileSource::release(const std::string& name) const {
  if (const auto layer = layers_.find(name); layer != layers_.end())
    for (const auto& [part, stored] : layer->second.tensors) stored.file->release(*stored.tensor);
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
