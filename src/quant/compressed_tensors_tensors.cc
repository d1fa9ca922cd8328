// The tensors of compressed-tensors.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/status_macros.h"
#include "quant/layer_reader.h"
#include "quant/layouts.h"
#include "quant/pack.h"

namespace servoflow::quant {
namespace {

std::int64_t words_of(std::int64_t elements, int bits) { return (elements * bits + 31) / 32; }

// [1] or [] for one scale, [N, 1] or [N] per channel, the full grid otherwise.
std::vector<Shape> scale_shapes(const QuantizedMatrix& m) {
  switch (m.format.weight.granularity) {
    case Granularity::kTensor:
      return {Shape{1}, Shape{}, Shape{1, 1}};
    case Granularity::kChannel:
      return {Shape{m.rows, 1}, Shape{m.rows}};
    default:
      return {Shape{m.scale_rows, m.scale_cols}};
  }
}

// A row of codes in the file: K columns, or K rounded up to whole groups.
Status read_fp4(const LayerReader& reader, QuantizedMatrix& m) {
  const std::int64_t padded = stored_cols(m.format.weight, m.cols);
  std::vector<Shape> shapes = {Shape{m.rows, padded / 2}};
  if (m.cols % 2 == 0) shapes.push_back(Shape{m.rows, m.cols / 2});
  SF_ASSIGN_OR_RETURN(const TensorView packed, reader.get("weight_packed", {DType::kU8}, shapes));
  m.codes = as_u8(packed.bytes);
  m.pitch = static_cast<std::size_t>(packed.shape[1]);
  return {};
}

Status read_packed_int(const LayerReader& reader, OwnedBytes& owned, QuantizedMatrix& m) {
  const int bits = code_bits(m.format.weight.code);
  const std::int64_t padded = stored_cols(m.format.weight, m.cols);
  SF_ASSIGN_OR_RETURN(const TensorView shape,
                      reader.get("weight_shape", {DType::kI64, DType::kI32}, {Shape{2}}));
  std::int64_t sides[2];
  if (shape.dtype == DType::kI64) {
    std::memcpy(sides, shape.bytes.data(), sizeof(sides));
  } else {
    std::int32_t narrow[2];
    std::memcpy(narrow, shape.bytes.data(), sizeof(narrow));
    std::copy(narrow, narrow + 2, sides);
  }
  if (sides[0] != m.rows || (sides[1] != m.cols && sides[1] != padded))
    return reader.error("weight_shape", "says [" + std::to_string(sides[0]) + ", " +
                                            std::to_string(sides[1]) + "], the network has [" +
                                            std::to_string(m.rows) + ", " + std::to_string(m.cols) + "]");
  SF_ASSIGN_OR_RETURN(const TensorView packed,
                      reader.get("weight_packed", {DType::kI32}, {Shape{m.rows, words_of(sides[1], bits)}}));
  // Little-endian words hold element i at nibble or byte i, as our rows do; only the offset differs, and
  // adding half the range is flipping the top bit.
  owned.codes.resize(packed.bytes.size());
  const std::uint8_t flip = bits == 4 ? 0x88 : 0x80;
  const std::span<const std::uint8_t> words = as_u8(packed.bytes);
  for (std::size_t i = 0; i < words.size(); ++i) owned.codes[i] = words[i] ^ flip;
  m.codes = owned.codes;
  m.pitch = static_cast<std::size_t>(packed.shape[1]) * 4;

  if (reader.has("weight_g_idx")) {
    SF_ASSIGN_OR_RETURN(m.group_of_column, reader.int32s("weight_g_idx", Shape{m.cols}));
    if (m.format.weight.granularity != Granularity::kGroup)
      return reader.error("weight_g_idx", "belongs to groups, not to " + name(m.format));
    bool ordered = true;
    for (std::int64_t k = 0; k < m.cols; ++k) {
      const std::int32_t g = m.group_of_column[static_cast<std::size_t>(k)];
      if (g < 0 || g >= m.scale_cols)
        return reader.error("weight_g_idx", "column " + std::to_string(k) + " is in group " +
                                                std::to_string(g) + " of " + std::to_string(m.scale_cols));
      ordered &= g == k / m.format.weight.group;
    }
    if (ordered) m.group_of_column.clear();
  }
  if (!m.format.weight.zero_point) return {};
  // Packed along N: word (r / per, g) holds rows r / per * per and up.
  const std::int64_t word_rows = words_of(m.rows, bits), per = 32 / bits;
  SF_ASSIGN_OR_RETURN(const std::vector<std::int32_t> zeros,
                      reader.int32s("weight_zero_point", Shape{word_rows, m.scale_cols}));
  m.zero_points.resize(static_cast<std::size_t>(m.rows * m.scale_cols));
  const auto mask = (1u << bits) - 1u;
  for (std::int64_t r = 0; r < m.rows; ++r)
    for (std::int64_t g = 0; g < m.scale_cols; ++g) {
      const auto word =
          static_cast<std::uint32_t>(zeros[static_cast<std::size_t>(r / per * m.scale_cols + g)]);
      const auto code = static_cast<int>((word >> (r % per * bits)) & mask);
      m.zero_points[static_cast<std::size_t>(r * m.scale_cols + g)] =
          static_cast<std::int8_t>(code - (1 << (bits - 1)));
    }
  return {};
}

Status read_plain(const LayerReader& reader, QuantizedMatrix& m) {
  const std::int64_t padded = stored_cols(m.format.weight, m.cols);
  const bool fp8 = m.format.weight.code == Code::kE4M3;
  SF_ASSIGN_OR_RETURN(const TensorView weight, reader.get("weight", {fp8 ? DType::kF8E4M3 : DType::kI8},
                                                          {Shape{m.rows, m.cols}, Shape{m.rows, padded}}));
  m.codes = as_u8(weight.bytes);
  m.pitch = static_cast<std::size_t>(weight.shape[1]);
  if (fp8) SF_RETURN_IF_ERROR(check_fp8_codes(reader, "weight", m.codes));
  if (!m.format.weight.zero_point) return {};
  SF_ASSIGN_OR_RETURN(const TensorView zeros, reader.get("weight_zero_point", {DType::kI8}, scale_shapes(m)));
  const std::span<const std::uint8_t> bytes = as_u8(zeros.bytes);
  m.zero_points.resize(bytes.size());
  if (!bytes.empty()) std::memcpy(m.zero_points.data(), bytes.data(), bytes.size());
  return {};
}

Status read_inputs(const LayerReader& reader, QuantizedMatrix& m) {
  const InputFormat& input = m.format.input;
  if (!input.needs_calibration()) return {};
  if (input.code == Code::kE2M1) {
    SF_ASSIGN_OR_RETURN(m.file_input_scale, reader.positive("input_global_scale"));
    m.input_scale = 1.0f / m.file_input_scale;
    return {};
  }
  SF_ASSIGN_OR_RETURN(m.file_input_scale, reader.positive("input_scale"));
  m.input_scale = m.file_input_scale;
  if (!input.zero_point) return {};
  SF_ASSIGN_OR_RETURN(const TensorView zero,
                      reader.get("input_zero_point", {DType::kI8}, {Shape{1}, Shape{}}));
  m.input_zero_point = static_cast<std::int8_t>(zero.bytes[0]);
  return {};
}

}  // namespace

Status read_compressed_tensors(const LayerReader& reader, const ConfigGroup& group, OwnedBytes& owned,
                               QuantizedMatrix& m) {
  const WeightFormat format = m.format.weight;  // read_scales may change the scales' type
  if (group.layout == "pack-quantized") {
    SF_RETURN_IF_ERROR(read_packed_int(reader, owned, m));
  } else if (format.code == Code::kE2M1) {
    SF_RETURN_IF_ERROR(read_fp4(reader, m));
  } else {
    SF_RETURN_IF_ERROR(read_plain(reader, m));
  }
  if (format.scale == ScaleCode::kE4M3) {
    SF_RETURN_IF_ERROR(read_scales(reader, "weight_scale", {DType::kF8E4M3}, scale_shapes(m), owned, m));
    SF_ASSIGN_OR_RETURN(m.file_global_scale, reader.positive("weight_global_scale"));
    m.global_scale = 1.0f / m.file_global_scale;
  } else if (format.scale == ScaleCode::kE8M0) {
    SF_RETURN_IF_ERROR(
        read_scales(reader, "weight_scale", {DType::kU8, DType::kF8E8M0}, scale_shapes(m), owned, m));
  } else {
    SF_RETURN_IF_ERROR(read_scales(reader, "weight_scale", {DType::kF32, DType::kBF16, DType::kF16},
                                   scale_shapes(m), owned, m));
  }
  return read_inputs(reader, m);
}

Result<std::vector<StoredTensor>> write_compressed_tensors(const std::string& layer,
                                                           const QuantizedMatrix& m) {
  const std::optional<std::string_view> layout = compressed_tensors_layout(m.format);
  if (!layout)
    return Status::invalid("layer " + layer + ": compressed-tensors has no layout for " + name(m.format));
  if (!m.input_multiplier.empty())
    return Status::invalid(
        "layer " + layer +
        ": compressed-tensors has no place for pre_quant_scale; fold it into the layer before, or "
        "write modelopt");
  const WeightFormat& format = m.format.weight;
  const int bits = code_bits(format.code);
  const std::int64_t cols = stored_cols(format, m.cols);
  std::vector<StoredTensor> out;
  const auto bytes_tensor = [&](const char* part, DType dtype, const Shape& shape,
                                std::span<const std::uint8_t> bytes) {
    const auto raw = std::as_bytes(bytes);
    out.push_back({layer + "." + part, dtype, shape, std::vector<std::byte>(raw.begin(), raw.end())});
  };
  const Shape scales =
      format.granularity == Granularity::kTensor ? Shape{1} : Shape{m.scale_rows, m.scale_cols};

  if (*layout == "pack-quantized") {
    const std::int64_t per = 32 / bits, words = words_of(cols, bits);
    std::vector<std::uint32_t> packed;
    packed.reserve(static_cast<std::size_t>(m.rows * words));
    const std::vector<std::uint8_t> codes = padded_codes(m, cols);
    const std::size_t pitch = row_bytes(format.code, cols);
    std::vector<std::int8_t> line(static_cast<std::size_t>(cols));
    for (std::int64_t r = 0; r < m.rows; ++r) {
      const std::uint8_t* row = codes.data() + static_cast<std::size_t>(r) * pitch;
      for (std::int64_t k = 0; k < cols; ++k)
        line[static_cast<std::size_t>(k)] = static_cast<std::int8_t>(
            bits == 4 ? sign_extend_int4(nibble(row, k)) : static_cast<std::int8_t>(row[k]));
      const std::vector<std::uint32_t> row_words = pack_words(line, bits);
      packed.insert(packed.end(), row_words.begin(), row_words.end());
    }
    const auto as_bytes = [](const std::vector<std::uint32_t>& v) {
      return std::span(reinterpret_cast<const std::uint8_t*>(v.data()), v.size() * 4);
    };
    bytes_tensor("weight_packed", DType::kI32, Shape{m.rows, words}, as_bytes(packed));
    out.push_back(scales_tensor(layer + ".weight_scale", scales, m));
    const std::int64_t sides[2] = {m.rows, cols};
    bytes_tensor("weight_shape", DType::kI64, Shape{2},
                 {reinterpret_cast<const std::uint8_t*>(sides), sizeof(sides)});
    if (format.zero_point) {
      const std::int64_t word_rows = words_of(m.rows, bits);
      std::vector<std::uint32_t> zeros(static_cast<std::size_t>(word_rows * m.scale_cols));
      for (std::int64_t r = 0; r < m.rows; ++r)
        for (std::int64_t g = 0; g < m.scale_cols; ++g) {
          const int code = m.zero_points[static_cast<std::size_t>(r * m.scale_cols + g)] + (1 << (bits - 1));
          zeros[static_cast<std::size_t>(r / per * m.scale_cols + g)] |= static_cast<std::uint32_t>(code)
                                                                         << (r % per * bits);
        }
      bytes_tensor("weight_zero_point", DType::kI32, Shape{word_rows, m.scale_cols}, as_bytes(zeros));
    }
  } else if (format.code == Code::kE2M1) {
    bytes_tensor("weight_packed", DType::kU8, Shape{m.rows, cols / 2}, padded_codes(m, cols));
    out.push_back(scales_tensor(layer + ".weight_scale", scales, m));
    if (format.global_scale) {
      const bool own = m.convention == Convention::kCompressedTensors && m.file_global_scale > 0.0f;
      const float global = own ? m.file_global_scale : 1.0f / m.global_scale;
      out.push_back(floats_tensor(layer + ".weight_global_scale", Shape{1}, {&global, 1}));
    }
  } else {
    bytes_tensor("weight", format.code == Code::kE4M3 ? DType::kF8E4M3 : DType::kI8, Shape{m.rows, cols},
                 padded_codes(m, cols));
    out.push_back(scales_tensor(layer + ".weight_scale", scales, m));
  }
  if (!m.format.input.needs_calibration()) return out;
  if (m.format.input.code == Code::kE2M1) {
    const bool own = m.convention == Convention::kCompressedTensors && m.file_input_scale > 0.0f;
    const float global = own ? m.file_input_scale : 1.0f / *m.input_scale;
    out.push_back(floats_tensor(layer + ".input_global_scale", Shape{1}, {&global, 1}));
  } else {
    out.push_back(floats_tensor(layer + ".input_scale", Shape{1}, {&*m.input_scale, 1}));
    const auto zero = static_cast<std::uint8_t>(m.input_zero_point);
    if (m.format.input.zero_point) bytes_tensor("input_zero_point", DType::kI8, Shape{1}, {&zero, 1});
  }
  return out;
}

}  // namespace servoflow::quant
