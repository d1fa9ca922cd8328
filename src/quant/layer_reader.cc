#include "quant/layer_reader.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/bf16.h"
#include "core/status_macros.h"
#include "quant/layouts.h"
#include "quant/pack.h"
#include "quant/scales.h"

namespace servoflow::quant {

Result<TensorView> LayerReader::get(const std::string& part, std::initializer_list<DType> dtypes,
                                    const std::vector<Shape>& shapes) const {
  const std::optional<TensorView> found = lookup_(full(part));
  if (!found) return error(part, "missing");
  const std::optional<TensorView>& tensor = found;
  if (std::find(dtypes.begin(), dtypes.end(), tensor->dtype) == dtypes.end()) {
    std::string expected;
    for (const DType dtype : dtypes)
      expected += (expected.empty() ? "" : " or ") + std::string(dtype_name(dtype));
    return error(part, "is " + std::string(dtype_name(tensor->dtype)) + ", expected " + expected);
  }
  if (std::find(shapes.begin(), shapes.end(), tensor->shape) == shapes.end()) {
    std::string expected;
    for (const Shape& shape : shapes) expected += (expected.empty() ? "" : " or ") + shape.to_string();
    return error(part, "has shape " + tensor->shape.to_string() + ", expected " + expected);
  }
  // The shape is one of ours, so the product does not overflow.
  const auto bytes = static_cast<std::size_t>(tensor->shape.elements()) * dtype_size(tensor->dtype);
  if (tensor->bytes.size() != bytes)
    return error(part,
                 "has " + std::to_string(tensor->bytes.size()) + " bytes, expected " + std::to_string(bytes));
  return *tensor;
}

Result<std::vector<float>> LayerReader::floats(const std::string& part,
                                               const std::vector<Shape>& shapes) const {
  SF_ASSIGN_OR_RETURN(const TensorView tensor, get(part, {DType::kF32, DType::kBF16, DType::kF16}, shapes));
  std::vector<float> values(static_cast<std::size_t>(tensor.shape.elements()));
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (tensor.dtype == DType::kF32) {
      std::memcpy(&values[i], tensor.bytes.data() + i * 4, 4);
    } else {
      std::uint16_t bits;
      std::memcpy(&bits, tensor.bytes.data() + i * 2, 2);
      values[i] = tensor.dtype == DType::kBF16 ? to_float(bf16{bits}) : half_to_float(bits);
    }
    if (!std::isfinite(values[i])) return error(part, "element " + std::to_string(i) + " is not finite");
  }
  return values;
}

Result<float> LayerReader::positive(const std::string& part) const {
  SF_ASSIGN_OR_RETURN(const std::vector<float> values, floats(part, {Shape{}, Shape{1}}));
  if (!std::isnormal(values[0]) || values[0] < 0.0f || !std::isfinite(1.0f / values[0]))
    return error(part, "must be a positive number, is " + std::to_string(values[0]));
  return values[0];
}

Result<std::vector<std::int32_t>> LayerReader::int32s(const std::string& part, const Shape& shape) const {
  SF_ASSIGN_OR_RETURN(const TensorView tensor, get(part, {DType::kI32}, {shape}));
  std::vector<std::int32_t> values(tensor.bytes.size() / 4);
  if (!values.empty()) std::memcpy(values.data(), tensor.bytes.data(), tensor.bytes.size());
  return values;
}

Status read_scales(const LayerReader& reader, const std::string& part, std::initializer_list<DType> dtypes,
                   const std::vector<Shape>& shapes, OwnedBytes& owned, QuantizedMatrix& m) {
  SF_ASSIGN_OR_RETURN(const TensorView tensor, reader.get(part, dtypes, shapes));
  switch (tensor.dtype) {
    case DType::kF16: {
      SF_ASSIGN_OR_RETURN(const std::vector<float> wide, reader.floats(part, shapes));
      owned.scales.resize(wide.size() * 4);
      std::memcpy(owned.scales.data(), wide.data(), owned.scales.size());
      m.scales = owned.scales;
      m.format.weight.scale = ScaleCode::kFloat32;
      break;
    }
    case DType::kF32:
      m.scales = as_u8(tensor.bytes);
      m.format.weight.scale = ScaleCode::kFloat32;
      break;
    case DType::kBF16:
      m.scales = as_u8(tensor.bytes);
      m.format.weight.scale = ScaleCode::kBFloat16;
      break;
    default:  // E4M3 and E8M0 are part of the format
      m.scales = as_u8(tensor.bytes);
  }
  const std::int64_t count = m.scale_rows * m.scale_cols;
  for (std::int64_t i = 0; i < count; ++i) {
    // UE4M3 has no sign; a file that sets it means something else.
    const bool signed_code =
        m.format.weight.scale == ScaleCode::kE4M3 && m.scales[static_cast<std::size_t>(i)] > 0x80;
    const float value = m.scale_at(i);
    if (signed_code || !std::isfinite(value) || value < 0.0f)
      return reader.error(part, "scale " + std::to_string(i) + " is negative or not finite");
  }
  return {};
}

Status check_fp8_codes(const LayerReader& reader, const std::string& part,
                       std::span<const std::uint8_t> codes) {
  bool nan = false;
  for (const std::uint8_t code : codes) nan |= (code & 0x7fu) == 0x7fu;
  if (!nan) return {};
  const auto at =
      std::find_if(codes.begin(), codes.end(), [](std::uint8_t code) { return (code & 0x7fu) == 0x7fu; });
  return reader.error(part, "element " + std::to_string(at - codes.begin()) + " is NaN");
}

Result<QuantizedMatrix> read_linear(const std::string& linear_name, const ConfigGroup& group,
                                    Convention convention, std::int64_t rows, std::int64_t cols,
                                    const TensorLookup& lookup) {
  constexpr std::int64_t kMaxSide = std::int64_t{1}
                                    << 30;  // products with small factors stay far from overflow
  if (rows <= 0 || cols <= 0 || rows > kMaxSide || cols > kMaxSide)
    return Status::invalid("layer " + linear_name + ": [" + std::to_string(rows) + ", " +
                           std::to_string(cols) + "] is no shape of a matrix");
  if (Status status = validate(group.format); !status.ok() || !group.format.weight.quantized())
    return Status::invalid("layer " + linear_name + ": format " + name(group.format) + " holds no codes");
  QuantizedMatrix m;
  m.format = group.format;
  m.rows = rows;
  m.cols = cols;
  m.convention = convention;
  const ScaleShape shape = scale_shape(group.format.weight, rows, cols);
  m.scale_rows = shape.rows;
  m.scale_cols = shape.cols;
  auto owned = std::make_shared<OwnedBytes>();
  const LayerReader reader(linear_name, lookup);
  SF_RETURN_IF_ERROR(convention == Convention::kModelOpt ? read_modelopt(reader, group, *owned, m)
                                                         : read_compressed_tensors(reader, group, *owned, m));
  m.owner = std::move(owned);
  return m;
}

Result<std::vector<StoredTensor>> write_linear(const std::string& linear_name, const QuantizedMatrix& matrix,
                                               Convention convention) {
  SF_RETURN_IF_ERROR(validate(matrix.format));
  if (matrix.format.input.needs_calibration() && !matrix.input_scale)
    return Status::invalid("layer " + linear_name + ": " + name(matrix.format) +
                           " has static inputs but no input scale; calibrate first");
  if (!matrix.group_of_column.empty())
    return Status::invalid("layer " + linear_name +
                           ": groups in another order than the columns are read, not written");
  if (!matrix.step_input_scales.empty())
    return Status::invalid(
        "layer " + linear_name +
        ": neither library has a place for input scales per denoise step; keep them in the plan's "
        "calibration file and store their maximum here");
  return convention == Convention::kModelOpt ? write_modelopt(linear_name, matrix)
                                             : write_compressed_tensors(linear_name, matrix);
}

StoredTensor floats_tensor(const std::string& name, const Shape& shape, std::span<const float> values) {
  const std::span<const std::byte> bytes = std::as_bytes(values);
  return {name, DType::kF32, shape, std::vector<std::byte>(bytes.begin(), bytes.end())};
}

std::vector<std::uint8_t> padded_codes(const QuantizedMatrix& m, std::int64_t cols) {
  const Code code = m.format.weight.code;
  const std::size_t pitch = row_bytes(code, cols);
  std::vector<std::uint8_t> out(static_cast<std::size_t>(m.rows) * pitch);
  std::vector<std::uint8_t> line(static_cast<std::size_t>(cols));
  const std::uint8_t mask = code_bits(code) == 4 ? 15 : 255;
  for (std::int64_t r = 0; r < m.rows; ++r) {
    for (std::int64_t k = 0; k < m.cols; ++k)
      line[static_cast<std::size_t>(k)] = static_cast<std::uint8_t>(m.code(r, k)) & mask;
    // A padded element must decode to zero: its code is its group's zero point.
    for (std::int64_t k = m.cols; k < cols; ++k) {
      const int zero =
          m.zero_points.empty() ? 0 : m.zero_points[static_cast<std::size_t>(m.scale_index(r, k))];
      line[static_cast<std::size_t>(k)] = static_cast<std::uint8_t>(zero) & mask;
    }
    store_row(code, line, out.data() + static_cast<std::size_t>(r) * pitch);
  }
  return out;
}

StoredTensor scales_tensor(const std::string& name, const Shape& shape, const QuantizedMatrix& m) {
  const ScaleCode code = m.format.weight.scale;
  const DType dtype = code == ScaleCode::kFloat32    ? DType::kF32
                      : code == ScaleCode::kBFloat16 ? DType::kBF16
                      : code == ScaleCode::kE4M3     ? DType::kF8E4M3
                                                     : DType::kU8;
  const auto bytes = std::as_bytes(m.scales);
  return {name, dtype, shape, std::vector<std::byte>(bytes.begin(), bytes.end())};
}

}  // namespace servoflow::quant
