#include "weights/loader.h"

#include <algorithm>
#include <cstring>

#include "core/bf16.h"
#include "core/status_macros.h"
#include "ops/host_rows.h"
#include "weights/manifest.h"

namespace servoflow::weights {
namespace {

ops::HostMatrix host_matrix(const TensorData& tensor, const std::string& name) {
  const std::int64_t rows = tensor.shape.rank() > 0 ? tensor.shape[0] : 1;
  const std::int64_t elements = tensor.shape.elements();
  return {
      tensor.dtype, static_cast<int>(rows), static_cast<int>(rows > 0 ? elements / rows : 0), tensor.bytes,
      name,         tensor.sequence};
}

}  // namespace

void Loader::count(const TensorData& tensor, const std::string& name) {
  parameters_ += static_cast<std::uint64_t>(tensor.shape.elements());
  source_.release(name);
  if (progress_) progress_(parameters_, total_);
}

Result<TensorData> Loader::from_source(const std::string& name) const {
  return backend_.generates() ? source_.describe(name) : source_.get(name);
}

namespace {

std::string_view linear_name(std::string_view tensor) {
  return tensor.ends_with(".weight") ? tensor.substr(0, tensor.size() - 7) : tensor;
}

// What a product's observer knows a weight by.
std::string joined(const std::vector<std::string>& names) {
  std::string out;
  for (const std::string& name : names) out += (out.empty() ? "" : " ") + name;
  return out;
}

}  // namespace

void Loader::note(const std::string& name, const std::string& precision, const std::string& kernel,
                  const ops::Weight& weight, int layers) {
  const std::string component(component_of(name));
  auto it = std::find_if(components_.begin(), components_.end(), [&](const ComponentPrecision& c) {
    return c.component == component && c.precision == precision && c.kernel == kernel;
  });
  if (it == components_.end())
    it = components_.insert(components_.end(),
                            {.component = component, .precision = precision, .kernel = kernel});
  it->layers += layers;
  it->parameters += static_cast<std::uint64_t>(weight.n) * static_cast<std::uint64_t>(weight.k);
  it->weight_bytes += weight.bytes;
}

// The format that these tensors, one product, have or are to get; nothing: floating point.
Result<std::optional<quant::LinearFormat>> Loader::low_bit_format(
    const std::vector<std::string>& names) const {
  std::optional<quant::LinearFormat> out;
  for (std::size_t i = 0; i < names.size(); ++i) {
    std::optional<quant::LinearFormat> format;
    if (const auto it = precision_.rounding.find(std::string(linear_name(names[i])));
        it != precision_.rounding.end())
      format = it->second;
    if (const std::optional<quant::LinearFormat> stored = source_.format_of(names[i])) format = stored;
    if (i > 0 && format != out)
      return Status::invalid(names[i] + ": " + (format ? quant::name(*format) : "floating point") + ", and " +
                             names[0] + " is " + (out ? quant::name(*out) : "floating point") +
                             "; both are computed as one product and need one format");
    out = format;
  }
  return out;
}

Result<ops::Weight> Loader::low_bit_matrix(const std::vector<std::string>& names,
                                           const ops::PackOptions& options) {
  std::vector<TensorData> tensors;
  std::vector<quant::QuantizedMatrix> rounded;
  std::vector<ops::HostMatrix> floats, parts;
  for (const std::string& name : names) {
    if (source_.format_of(name)) {
      SF_ASSIGN_OR_RETURN(std::optional<quant::QuantizedMatrix> stored, source_.quantized(name));
      rounded.push_back(std::move(*stored));
      tensors.push_back({.shape = {rounded.back().rows, rounded.back().cols}});
      continue;
    }
    SF_ASSIGN_OR_RETURN(TensorData tensor, source_.get(name));
    floats.push_back(host_matrix(tensor, name));
    tensors.push_back(std::move(tensor));
  }
  if (!floats.empty()) {
    const quant::LinearFormat& format = precision_.rounding.at(std::string(linear_name(names[0])));
    std::optional<float> amax;
    if (format.weight.global_scale) {
      SF_ASSIGN_OR_RETURN(amax, shared_amax(floats));
    }
    for (const ops::HostMatrix& host : floats) {
      SF_ASSIGN_OR_RETURN(quant::QuantizedMatrix matrix,
                          round_matrix(host, format, amax, backend_.threads()));
      rounded.push_back(std::move(matrix));
    }
  }
  for (std::size_t i = 0; i < names.size(); ++i)
    parts.push_back({.rows = static_cast<int>(rounded[i].rows),
                     .cols = static_cast<int>(rounded[i].cols),
                     .name = names[i],
                     .quantized = &rounded[i]});
  SF_ASSIGN_OR_RETURN(ops::Weight weight, backend_.pack(parts, options));
  packed_ += weight.bytes;
  weight.name = backend_.keep_name(joined(names));
  note(names[0], quant::name(weight.format), backend_.low_bit_kernel(weight.format), weight,
       static_cast<int>(names.size()));
  for (std::size_t i = 0; i < names.size(); ++i) count(tensors[i], names[i]);
  return weight;
}

Result<ops::Weight> Loader::matrix(const std::vector<std::string>& names, const ops::PackOptions& options) {
  SF_ASSIGN_OR_RETURN(const std::optional<quant::LinearFormat> format, low_bit_format(names));
  if (format && !precision_.dequantize) return low_bit_matrix(names, options);
  std::vector<TensorData> tensors;
  std::vector<ops::HostMatrix> parts;
  for (const std::string& name : names) {
    SF_ASSIGN_OR_RETURN(TensorData tensor, from_source(name));
    parts.push_back(host_matrix(tensor, name));
    tensors.push_back(std::move(tensor));
  }
  SF_ASSIGN_OR_RETURN(ops::Weight weight, backend_.pack(parts, options));
  packed_ += weight.bytes;
  weight.name = backend_.keep_name(joined(names));
  note(names[0], options.keep_float32 || precision_.base == "fp32" ? "fp32" : "bf16",
       format ? "dequantized from " + quant::name(*format) : "", weight, static_cast<int>(names.size()));
  for (std::size_t i = 0; i < names.size(); ++i) count(tensors[i], names[i]);
  return weight;
}

Result<ops::Weight> Loader::matrix_in_parts(const std::string& name, int& parts) {
  SF_ASSIGN_OR_RETURN(const TensorData tensor, source_.get(name));
  const ops::HostMatrix host = host_matrix(tensor, name);
  const auto cols = static_cast<std::size_t>(host.cols), rows = static_cast<std::size_t>(host.rows);
  std::vector<float> values(rows * cols);
  parts = 2;
  for (std::size_t r = 0; r < rows; ++r)
    SF_RETURN_IF_ERROR(ops::read_row(host, static_cast<int>(r), values.data() + r * cols));
  for (const float v : values)
    if (to_float(to_bf16(v)) != v) parts = 3;
  std::vector<bf16> wide(values.size() * static_cast<std::size_t>(parts));
  for (std::size_t r = 0; r < rows; ++r)
    for (std::size_t c = 0; c < cols; ++c) {
      bf16* to = wide.data() + r * cols * static_cast<std::size_t>(parts) + c;
      const float v = values[r * cols + c];
      to[0] = to[cols] = to_bf16(v);
      if (parts == 3) to[2 * cols] = to_bf16(v - to_float(to[0]));
    }
  const ops::HostMatrix whole{DType::kBF16, host.rows, host.cols * parts, std::as_bytes(std::span(wide)),
                              name};
  SF_ASSIGN_OR_RETURN(ops::Weight weight, backend_.pack({&whole, 1}, {}));
  packed_ += weight.bytes;
  count(tensor, name);
  return weight;
}

Result<const float*> Loader::vector(const std::vector<std::string>& names) {
  std::vector<float> values;
  for (const std::string& name : names) {
    SF_ASSIGN_OR_RETURN(const TensorData tensor, source_.get(name));
    const std::size_t begin = values.size(), size = static_cast<std::size_t>(tensor.shape.elements());
    values.resize(begin + size);
    SF_RETURN_IF_ERROR(ops::read_row({tensor.dtype, 1, static_cast<int>(size), tensor.bytes, name}, 0,
                                     values.data() + begin));
    count(tensor, name);
  }
  const std::uint64_t bytes = values.size() * sizeof(float);
  SF_ASSIGN_OR_RETURN(void* device, backend_.allocate(bytes));
  backend_.upload(device, values.data(), bytes);
  SF_RETURN_IF_ERROR(backend_.finish());
  packed_ += bytes;
  return static_cast<const float*>(device);
}

namespace {

// Whether a float32 tensor was widened from bfloat16, as published checkpoints are: half of it is zeros.
bool holds_bf16(std::span<const std::byte> floats) {
  for (std::size_t i = 0; i < floats.size(); i += 4)
    if (floats[i] != std::byte{0} || floats[i + 1] != std::byte{0}) return false;
  return true;
}

}  // namespace

Result<ops::Matrix> Loader::table(const std::string& name) {
  SF_ASSIGN_OR_RETURN(const TensorData tensor, from_source(name));
  const ops::HostMatrix host = host_matrix(tensor, name);
  const bool narrow = tensor.dtype == DType::kF32 && !host.sequence && holds_bf16(host.bytes);
  ops::Matrix out{.dtype = tensor.dtype == DType::kBF16 || narrow ? DType::kBF16 : DType::kF32,
                  .rows = host.rows,
                  .cols = host.cols,
                  .pitch = host.cols};
  const std::uint64_t row_bytes = static_cast<std::uint64_t>(host.cols) * dtype_size(out.dtype);
  SF_ASSIGN_OR_RETURN(out.data, backend_.allocate(static_cast<std::uint64_t>(host.rows) * row_bytes));
  if (host.sequence) {
    backend_.generate(out.data, out.dtype, static_cast<std::uint64_t>(tensor.shape.elements()),
                      *host.sequence);
  } else if (out.dtype == tensor.dtype) {
    backend_.upload(out.data, host.bytes.data(), host.bytes.size());
  } else {
    constexpr int kRows = 4096;  // at once
    const auto cols = static_cast<std::size_t>(host.cols);
    std::vector<float> values(cols);
    std::vector<std::byte> rows(kRows * row_bytes);
    for (int first = 0; first < host.rows; first += kRows) {
      const int count = std::min(kRows, host.rows - first);
      for (int r = 0; r < count; ++r) {
        SF_RETURN_IF_ERROR(ops::read_row(host, first + r, values.data()));
        std::byte* row = rows.data() + static_cast<std::uint64_t>(r) * row_bytes;
        if (narrow) {
          for (std::size_t i = 0; i < cols; ++i) reinterpret_cast<bf16*>(row)[i] = to_bf16(values[i]);
        } else {
          std::memcpy(row, values.data(), row_bytes);
        }
      }
      backend_.upload(static_cast<std::byte*>(out.data) + static_cast<std::uint64_t>(first) * row_bytes,
                      rows.data(), static_cast<std::uint64_t>(count) * row_bytes);
      SF_RETURN_IF_ERROR(backend_.finish());
    }
  }
  SF_RETURN_IF_ERROR(backend_.finish());
  packed_ += static_cast<std::uint64_t>(host.rows) * row_bytes;
  count(tensor, name);
  return out;
}

}  // namespace servoflow::weights
