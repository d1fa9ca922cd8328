#include "weights/loader.h"

#include "core/status_macros.h"
#include "ops/host_rows.h"

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

Result<ops::Weight> Loader::matrix(const std::vector<std::string>& names, const ops::PackOptions& options) {
  std::vector<TensorData> tensors;
  std::vector<ops::HostMatrix> parts;
  for (const std::string& name : names) {
    SF_ASSIGN_OR_RETURN(TensorData tensor, from_source(name));
    parts.push_back(host_matrix(tensor, name));
    tensors.push_back(std::move(tensor));
  }
  SF_ASSIGN_OR_RETURN(ops::Weight weight, backend_.pack(parts, options));
  packed_ += weight.bytes;
  for (std::size_t i = 0; i < names.size(); ++i) count(tensors[i], names[i]);
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

Result<ops::Matrix> Loader::table(const std::string& name) {
  SF_ASSIGN_OR_RETURN(const TensorData tensor, from_source(name));
  const ops::HostMatrix host = host_matrix(tensor, name);
  const bool as_is = tensor.dtype == DType::kBF16 || tensor.dtype == DType::kF32;
  ops::Matrix out{
      .dtype = as_is ? tensor.dtype : DType::kF32, .rows = host.rows, .cols = host.cols, .pitch = host.cols};
  const std::uint64_t row_bytes = static_cast<std::uint64_t>(host.cols) * dtype_size(out.dtype);
  SF_ASSIGN_OR_RETURN(out.data, backend_.allocate(static_cast<std::uint64_t>(host.rows) * row_bytes));
  if (host.sequence) {
    backend_.generate(out.data, out.dtype, static_cast<std::uint64_t>(tensor.shape.elements()),
                      *host.sequence);
  } else if (as_is) {
    backend_.upload(out.data, host.bytes.data(), host.bytes.size());
  } else {
    std::vector<float> values(static_cast<std::size_t>(host.cols));
    for (int r = 0; r < host.rows; ++r) {
      SF_RETURN_IF_ERROR(ops::read_row(host, r, values.data()));
      backend_.upload(static_cast<std::byte*>(out.data) + static_cast<std::uint64_t>(r) * row_bytes,
                      values.data(), row_bytes);
      SF_RETURN_IF_ERROR(backend_.finish());
    }
  }
  SF_RETURN_IF_ERROR(backend_.finish());
  packed_ += static_cast<std::uint64_t>(host.rows) * row_bytes;
  count(tensor, name);
  return out;
}

}  // namespace servoflow::weights
