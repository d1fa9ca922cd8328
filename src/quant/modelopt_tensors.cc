// The tensors of NVIDIA ModelOpt.
#include <algorithm>

#include "core/status_macros.h"
#include "quant/layer_reader.h"
#include "quant/layouts.h"
#include "quant/pack.h"

namespace servoflow::quant {
namespace {

// INT4 AWQ: byte (r / 2, k) holds row r in its low nibble where r is even, in two's complement.
Status read_awq(const LayerReader& reader, OwnedBytes& owned, QuantizedMatrix& m) {
  if (m.rows % 2 != 0)
    return reader.error("weight", "packs two output rows a byte; the layer has an odd number");
  const std::int64_t padded = stored_cols(m.format.weight, m.cols);
  SF_ASSIGN_OR_RETURN(
      const TensorView weight,
      reader.get("weight", {DType::kU8}, {Shape{m.rows / 2, m.cols}, Shape{m.rows / 2, padded}}));
  const std::span<const std::uint8_t> bytes = as_u8(weight.bytes);
  const auto stride = static_cast<std::size_t>(weight.shape[1]);
  m.pitch = row_bytes(Code::kInt4, m.cols);
  owned.codes.resize(static_cast<std::size_t>(m.rows) * m.pitch);
  std::vector<std::uint8_t> line(static_cast<std::size_t>(m.cols));
  for (std::int64_t r = 0; r < m.rows; ++r) {
    const std::uint8_t* row = bytes.data() + static_cast<std::size_t>(r / 2) * stride;
    for (std::int64_t k = 0; k < m.cols; ++k)
      line[static_cast<std::size_t>(k)] = (r % 2 != 0 ? row[k] >> 4 : row[k] & 15);
    store_row(Code::kInt4, line, owned.codes.data() + static_cast<std::size_t>(r) * m.pitch);
  }
  m.codes = owned.codes;
  return {};
}

Status read_codes(const LayerReader& reader, QuantizedMatrix& m) {
  const std::int64_t padded = stored_cols(m.format.weight, m.cols);
  const Code code = m.format.weight.code;
  const bool fp4 = code == Code::kE2M1;
  std::vector<Shape> shapes = {Shape{m.rows, fp4 ? padded / 2 : padded}};
  if (!fp4 || m.cols % 2 == 0) shapes.push_back(Shape{m.rows, fp4 ? m.cols / 2 : m.cols});
  const DType dtype = fp4 ? DType::kU8 : code == Code::kE4M3 ? DType::kF8E4M3 : DType::kI8;
  SF_ASSIGN_OR_RETURN(const TensorView weight, reader.get("weight", {dtype}, shapes));
  m.codes = as_u8(weight.bytes);
  m.pitch = static_cast<std::size_t>(weight.shape[1]);
  return code == Code::kE4M3 ? check_fp8_codes(reader, "weight", m.codes) : Status();
}

Shape scale_shape_of(const QuantizedMatrix& m) {
  switch (m.format.weight.granularity) {
    case Granularity::kTensor:
      return Shape{};
    case Granularity::kChannel:
      return Shape{m.rows};
    default:
      return Shape{m.scale_rows, m.scale_cols};
  }
}

}  // namespace

Status read_modelopt(const LayerReader& reader, const ConfigGroup&, OwnedBytes& owned, QuantizedMatrix& m) {
  const WeightFormat format = m.format.weight;
  SF_RETURN_IF_ERROR(format.code == Code::kInt4 ? read_awq(reader, owned, m) : read_codes(reader, m));
  std::vector<Shape> shapes = {scale_shape_of(m)};
  if (format.granularity == Granularity::kTensor) shapes.push_back(Shape{1});
  if (format.granularity == Granularity::kChannel) shapes.push_back(Shape{m.rows, 1});
  if (format.scale == ScaleCode::kE4M3) {
    SF_RETURN_IF_ERROR(read_scales(reader, "weight_scale", {DType::kF8E4M3}, shapes, owned, m));
    SF_ASSIGN_OR_RETURN(m.file_global_scale, reader.positive("weight_scale_2"));
    m.global_scale = m.file_global_scale;
  } else if (format.scale == ScaleCode::kE8M0) {
    SF_RETURN_IF_ERROR(read_scales(reader, "weight_scale", {DType::kU8, DType::kF8E8M0}, shapes, owned, m));
  } else {
    SF_RETURN_IF_ERROR(
        read_scales(reader, "weight_scale", {DType::kF32, DType::kBF16, DType::kF16}, shapes, owned, m));
  }
  if (m.format.input.needs_calibration()) {
    SF_ASSIGN_OR_RETURN(m.file_input_scale, reader.positive("input_scale"));
    m.input_scale = m.file_input_scale;
  }
  // Present where it was not folded into the layer before.
  if (reader.has("pre_quant_scale")) {
    SF_ASSIGN_OR_RETURN(m.input_multiplier, reader.floats("pre_quant_scale", {Shape{m.cols}}));
  }
  return {};
}

Result<std::vector<StoredTensor>> write_modelopt(const std::string& layer, const QuantizedMatrix& m) {
  const WeightFormat& format = m.format.weight;
  const bool scaled = !m.input_multiplier.empty();
  if (!modelopt_algorithm(m.format, scaled))
    return Status::invalid("layer " + layer + ": modelopt has no layout for " + name(m.format) +
                           (scaled ? " with pre_quant_scale" : "") + "; write compressed-tensors");
  if (scaled && m.input_multiplier.size() != static_cast<std::size_t>(m.cols))
    return Status::invalid("layer " + layer + ": the input multiplier has " +
                           std::to_string(m.input_multiplier.size()) + " elements for " +
                           std::to_string(m.cols) + " inputs");
  const std::int64_t cols = stored_cols(format, m.cols);
  std::vector<StoredTensor> out;
  const auto bytes_tensor = [&](DType dtype, const Shape& shape, std::span<const std::uint8_t> bytes) {
    const auto raw = std::as_bytes(bytes);
    out.push_back({layer + ".weight", dtype, shape, std::vector<std::byte>(raw.begin(), raw.end())});
  };
  if (format.code == Code::kInt4) {
    if (m.rows % 2 != 0)
      return Status::invalid("layer " + layer +
                             ": modelopt packs two output rows a byte; the layer has an odd number");
    std::vector<std::uint8_t> packed(static_cast<std::size_t>(m.rows / 2 * cols));
    for (std::int64_t r = 0; r < m.rows; ++r)
      for (std::int64_t k = 0; k < m.cols; ++k)
        packed[static_cast<std::size_t>(r / 2 * cols + k)] |=
            static_cast<std::uint8_t>((m.code(r, k) & 15) << (r % 2 * 4));
    bytes_tensor(DType::kU8, Shape{m.rows / 2, cols}, packed);
  } else if (format.code == Code::kE2M1) {
    bytes_tensor(DType::kU8, Shape{m.rows, cols / 2}, padded_codes(m, cols));
  } else {
    bytes_tensor(format.code == Code::kE4M3 ? DType::kF8E4M3 : DType::kI8, Shape{m.rows, cols},
                 padded_codes(m, cols));
  }
  if (format.scale == ScaleCode::kBFloat16) {
    out.push_back(floats_tensor(layer + ".weight_scale", scale_shape_of(m), m.decoded_scales()));
  } else {
    out.push_back(scales_tensor(layer + ".weight_scale", scale_shape_of(m), m));
  }
  if (format.global_scale)
    out.push_back(floats_tensor(layer + ".weight_scale_2", Shape{}, {&m.global_scale, 1}));
  if (m.format.input.needs_calibration())
    out.push_back(floats_tensor(layer + ".input_scale", Shape{}, {&*m.input_scale, 1}));
  if (scaled) out.push_back(floats_tensor(layer + ".pre_quant_scale", Shape{m.cols}, m.input_multiplier));
  return out;
}

LayerTensors layer_tensors(const std::string& linear_name, const ConfigGroup& group, Convention convention) {
  LayerTensors tensors;
  const auto required = [&](const char* part) { tensors.required.push_back(linear_name + "." + part); };
  const auto optional = [&](const char* part) { tensors.optional.push_back(linear_name + "." + part); };
  const WeightFormat& weight = group.format.weight;
  const InputFormat& input = group.format.input;
  if (convention == Convention::kModelOpt) {
    required("weight");
    required("weight_scale");
    if (weight.global_scale) required("weight_scale_2");
    if (input.needs_calibration()) required("input_scale");
    optional("pre_quant_scale");
    return tensors;
  }
  const bool packed = group.layout == "pack-quantized";
  required(packed || weight.code == Code::kE2M1 ? "weight_packed" : "weight");
  required("weight_scale");
  if (packed) {
    required("weight_shape");
    optional("weight_g_idx");
  }
  if (weight.zero_point) required("weight_zero_point");
  if (weight.global_scale) required("weight_global_scale");
  if (input.needs_calibration()) required(input.code == Code::kE2M1 ? "input_global_scale" : "input_scale");
  if (input.zero_point) required("input_zero_point");
  return tensors;
}

}  // namespace servoflow::quant
