#include "quant/matrix.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cassert>
#include <cmath>
#include <cstring>
#include <string>

#include "core/bf16.h"
#include "core/status_macros.h"
#include "quant/pack.h"
#include "quant/scalars.h"
#include "quant/scales.h"

namespace servoflow::quant {
namespace {

struct Storage {
  std::vector<std::uint8_t> codes, scales;
};

// Rounds |x| < 2^22 to the nearest integer, ties to even: the sum has no fraction bits left. Vectorises.
inline float round_even(float x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  return (x + kMagic) - kMagic;
}

inline int to_integer_code(float x, int low, int high) {
  // NaN fails both comparisons and would pass; quantize() has refused it before.
  const float clamped = std::min(std::max(x, static_cast<float>(low)), static_cast<float>(high));
  return static_cast<int>(round_even(clamped));
}

// One byte per element, whatever the code's width.
void encode_run(Code code, const float* x, std::int64_t n, float scale, int zero, std::uint8_t* out) {
  const auto offset = static_cast<float>(zero);
  switch (code) {
    case Code::kInt8:
      for (std::int64_t i = 0; i < n; ++i)
        out[i] = static_cast<std::uint8_t>(to_integer_code(x[i] / scale + offset, -128, 127));
      break;
    case Code::kInt4:
      for (std::int64_t i = 0; i < n; ++i)
        out[i] = static_cast<std::uint8_t>(to_integer_code(x[i] / scale + offset, -8, 7) & 15);
      break;
    case Code::kE2M1:
      for (std::int64_t i = 0; i < n; ++i) out[i] = encode_e2m1(x[i] / scale);
      break;
    case Code::kE4M3:
      for (std::int64_t i = 0; i < n; ++i) out[i] = encode_e4m3(x[i] / scale);
      break;
    case Code::kE5M2:
      for (std::int64_t i = 0; i < n; ++i) out[i] = encode_e5m2(x[i] / scale);
      break;
    case Code::kFloat32:
    case Code::kBFloat16:
      assert(false);
  }
}

std::array<float, 256> value_table(Code code) {
  std::array<float, 256> table{};
  for (int c = 0; c < 256; ++c) {
    const auto byte = static_cast<std::uint8_t>(c);
    table[c] = code == Code::kE4M3   ? decode_e4m3(byte)
               : code == Code::kE5M2 ? decode_e5m2(byte)
               : code == Code::kInt8 ? static_cast<float>(static_cast<std::int8_t>(byte))
               : code == Code::kInt4 ? static_cast<float>(sign_extend_int4(byte & 15u))
                                     : decode_e2m1(byte);
  }
  return table;
}

const std::array<float, 256>& values_of(Code code) {
  static const std::array<std::array<float, 256>, 5> tables = {
      value_table(Code::kE4M3), value_table(Code::kE5M2), value_table(Code::kInt8), value_table(Code::kInt4),
      value_table(Code::kE2M1)};
  return tables[code == Code::kE4M3   ? 0
                : code == Code::kE5M2 ? 1
                : code == Code::kInt8 ? 2
                : code == Code::kInt4 ? 3
                                      : 4];
}

std::string shape_text(std::int64_t rows, std::int64_t cols) {
  return "[" + std::to_string(rows) + ", " + std::to_string(cols) + "]";
}

Status check_request(std::size_t elements, std::int64_t rows, std::int64_t cols, const LinearFormat& format) {
  SF_RETURN_IF_ERROR(validate(format));
  if (!format.weight.quantized())
    return Status::invalid("format " + name(format) + " does not quantize weights");
  std::int64_t expected = 0;
  if (rows <= 0 || cols <= 0 || __builtin_mul_overflow(rows, cols, &expected) ||
      static_cast<std::size_t>(expected) != elements)
    return Status::invalid("a matrix " + shape_text(rows, cols) + " was given " + std::to_string(elements) +
                           " elements");
  return {};
}

Status check_finite(std::span<const float> w, std::int64_t cols) {
  const auto is_finite = [](float x) {
    return (std::bit_cast<std::uint32_t>(x) & 0x7f800000u) != 0x7f800000u;
  };
  std::uint32_t bad = 0;  // without a way out of the loop, which then vectorises
  for (const float x : w) bad |= is_finite(x) ? 0u : 1u;
  if (bad == 0) return {};
  const auto i = static_cast<std::int64_t>(std::find_if_not(w.begin(), w.end(), is_finite) - w.begin());
  return Status::invalid("element [" + std::to_string(i / cols) + ", " + std::to_string(i % cols) +
                         "] is not finite");
}

// Widens [least, most] by the run. Eight lanes, so that the reduction vectorises without reassociating
// floats: extremes do not depend on the order.
void widen(const float* x, std::int64_t n, float& least, float& most) {
  float low[8], high[8];
  std::fill(low, low + 8, least);
  std::fill(high, high + 8, most);
  std::int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int lane = 0; lane < 8; ++lane) {
      low[lane] = x[i + lane] < low[lane] ? x[i + lane] : low[lane];
      high[lane] = x[i + lane] > high[lane] ? x[i + lane] : high[lane];
    }
  for (; i < n; ++i) {
    low[0] = std::min(low[0], x[i]);
    high[0] = std::max(high[0], x[i]);
  }
  least = *std::min_element(low, low + 8);
  most = *std::max_element(high, high + 8);
}

// An empty matrix with its storage, zero scales and codes.
QuantizedMatrix allocate(std::int64_t rows, std::int64_t cols, const LinearFormat& format,
                         Storage*& storage) {
  QuantizedMatrix m;
  m.format = format;
  m.rows = rows;
  m.cols = cols;
  m.pitch = row_bytes(format.weight.code, cols);
  const ScaleShape shape = scale_shape(format.weight, rows, cols);
  m.scale_rows = shape.rows;
  m.scale_cols = shape.cols;
  auto owner = std::make_shared<Storage>();
  owner->codes.resize(static_cast<std::size_t>(rows) * m.pitch);
  owner->scales.resize(static_cast<std::size_t>(shape.rows * shape.cols) * scale_bytes(format.weight.scale));
  m.codes = owner->codes;
  m.scales = owner->scales;
  if (format.weight.zero_point) m.zero_points.resize(static_cast<std::size_t>(shape.rows * shape.cols));
  storage = owner.get();
  m.owner = std::move(owner);
  return m;
}

void store_scale(const QuantizedMatrix& m, Storage& storage, std::int64_t index, float value) {
  const std::uint32_t bits = encode_scale(m.format.weight.scale, value);
  const std::size_t size = scale_bytes(m.format.weight.scale);
  std::memcpy(storage.scales.data() + static_cast<std::size_t>(index) * size, &bits, size);
}

// Columns that share one scale within a row.
std::int64_t run_length(const WeightFormat& format, std::int64_t cols) {
  return format.group > 0 ? format.group : cols;
}

// divide: what an element is divided by, given the scale at an index.
template <typename Divisor>
void encode_all(std::span<const float> w, QuantizedMatrix& m, Storage& storage, const Divisor& divisor) {
  const WeightFormat& format = m.format.weight;
  const std::int64_t run = run_length(format, m.cols);
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(m.cols));
  for (std::int64_t r = 0; r < m.rows; ++r) {
    for (std::int64_t k = 0; k < m.cols; k += run) {
      const std::int64_t index = m.scale_index(r, k);
      const int zero = format.zero_point ? m.zero_points[static_cast<std::size_t>(index)] : 0;
      encode_run(format.code, w.data() + r * m.cols + k, std::min(run, m.cols - k), divisor(index), zero,
                 bytes.data() + k);
    }
    store_row(format.code, bytes, storage.codes.data() + static_cast<std::size_t>(r) * m.pitch);
  }
}

Status set_scales(QuantizedMatrix& m, Storage& storage, std::span<const float> scales,
                  std::span<const std::int8_t> zero_points, float global_scale) {
  const auto count = static_cast<std::size_t>(m.scale_rows * m.scale_cols);
  if (scales.size() != count)
    return Status::invalid(std::to_string(scales.size()) + " scales were given; " + name(m.format) +
                           " needs " + shape_text(m.scale_rows, m.scale_cols) + " for " +
                           shape_text(m.rows, m.cols));
  if (m.format.weight.zero_point ? zero_points.size() != count : !zero_points.empty())
    return Status::invalid(std::to_string(zero_points.size()) + " zero points were given for " +
                           std::to_string(count) + " scales of " + name(m.format));
  if (!std::isfinite(global_scale) || global_scale <= 0.0f ||
      (!m.format.weight.global_scale && global_scale != 1.0f))
    return Status::invalid("global scale " + std::to_string(global_scale) + " does not suit " +
                           name(m.format));
  const int low = m.format.weight.code == Code::kInt4 ? -8 : -128,
            high = m.format.weight.code == Code::kInt4 ? 7 : 127;
  for (std::size_t i = 0; i < count; ++i) {
    if (!std::isfinite(scales[i]) || scales[i] < 0.0f)
      return Status::invalid("scale " + std::to_string(i) + " is negative or not finite");
    store_scale(m, storage, static_cast<std::int64_t>(i), scales[i]);
    if (!zero_points.empty()) {
      if (zero_points[i] < low || zero_points[i] > high)
        return Status::invalid("zero point " + std::to_string(i) + " is outside the codes");
      m.zero_points[i] = zero_points[i];
    }
  }
  m.global_scale = global_scale;
  if (m.format.weight.global_scale) {
    m.convention = Convention::kModelOpt;
    m.file_global_scale = global_scale;
  }
  return {};
}

}  // namespace

ScaleShape scale_shape(const WeightFormat& format, std::int64_t rows, std::int64_t cols) {
  const auto blocks = [&](std::int64_t n) { return (n + format.group - 1) / format.group; };
  switch (format.granularity) {
    case Granularity::kNone:
    case Granularity::kToken:
      return {0, 0};
    case Granularity::kTensor:
      return {1, 1};
    case Granularity::kChannel:
      return {rows, 1};
    case Granularity::kGroup:
      return {rows, blocks(cols)};
    case Granularity::kBlock:
      return {blocks(rows), blocks(cols)};
  }
  return {0, 0};
}

double bits_per_weight(const WeightFormat& format, std::int64_t rows, std::int64_t cols) {
  const ScaleShape shape = scale_shape(format, rows, cols);
  const double scales = static_cast<double>(shape.rows) * static_cast<double>(shape.cols);
  double bits = static_cast<double>(rows) * static_cast<double>(cols) * code_bits(format.code);
  bits += scales * 8.0 * static_cast<double>(format.quantized() ? scale_bytes(format.scale) : 0);
  if (format.zero_point) bits += scales * code_bits(format.code);
  if (format.global_scale) bits += 32.0;
  return bits / (static_cast<double>(rows) * static_cast<double>(cols));
}

std::int64_t QuantizedMatrix::scale_index(std::int64_t row, std::int64_t col) const {
  switch (format.weight.granularity) {
    case Granularity::kNone:
    case Granularity::kToken:
    case Granularity::kTensor:
      return 0;
    case Granularity::kChannel:
      return row;
    case Granularity::kGroup:
      return row * scale_cols + (group_of_column.empty() ? col / format.weight.group
                                                         : group_of_column[static_cast<std::size_t>(col)]);
    case Granularity::kBlock:
      return row / format.weight.group * scale_cols + col / format.weight.group;
  }
  return 0;
}

float QuantizedMatrix::scale_at(std::int64_t index) const {
  std::uint32_t bits = 0;
  const std::size_t size = scale_bytes(format.weight.scale);
  std::memcpy(&bits, scales.data() + static_cast<std::size_t>(index) * size, size);
  return decode_scale(format.weight.scale, bits);
}

float QuantizedMatrix::scale(std::int64_t row, std::int64_t col) const {
  return scale_at(scale_index(row, col));
}

std::vector<float> QuantizedMatrix::decoded_scales() const {
  std::vector<float> values(static_cast<std::size_t>(scale_rows * scale_cols));
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = scale_at(static_cast<std::int64_t>(i));
  return values;
}

int QuantizedMatrix::code(std::int64_t row, std::int64_t col) const {
  const std::uint8_t* line = codes.data() + static_cast<std::size_t>(row) * pitch;
  switch (format.weight.code) {
    case Code::kInt4:
      return sign_extend_int4(nibble(line, col));
    case Code::kE2M1:
      return static_cast<int>(nibble(line, col));
    case Code::kInt8:
      return static_cast<std::int8_t>(line[col]);
    default:
      return line[col];
  }
}

float QuantizedMatrix::code_value(std::int64_t row, std::int64_t col) const {
  return values_of(format.weight.code)[static_cast<std::uint8_t>(code(row, col))];
}

std::size_t QuantizedMatrix::bytes() const {
  return static_cast<std::size_t>(rows) * pitch + scales.size() + zero_points.size();
}

float max_magnitude(std::span<const float> values) {
  float least = 0.0f, most = 0.0f;
  widen(values.data(), static_cast<std::int64_t>(values.size()), least, most);
  return std::max(most, -least);  // in this order: never -0
}

int encode_element(Code code, float x, float scale, int zero_point) {
  std::uint8_t byte = 0;
  encode_run(code, &x, 1, scale, zero_point, &byte);
  return code == Code::kInt4   ? sign_extend_int4(byte)
         : code == Code::kInt8 ? static_cast<std::int8_t>(byte)
                               : byte;
}

Result<QuantizedMatrix> quantize(std::span<const float> w, std::int64_t rows, std::int64_t cols,
                                 const LinearFormat& format, const ScaleOptions& options) {
  SF_RETURN_IF_ERROR(check_request(w.size(), rows, cols, format));
  SF_RETURN_IF_ERROR(check_finite(w, cols));
  Storage* storage = nullptr;
  QuantizedMatrix m = allocate(rows, cols, format, storage);
  m.convention = options.convention;
  const auto count = static_cast<std::size_t>(m.scale_rows * m.scale_cols);
  if (!options.shrink.empty() && options.shrink.size() != count)
    return Status::invalid(std::to_string(options.shrink.size()) + " shrink factors were given for " +
                           std::to_string(count) + " scales");

  if (format.weight.global_scale) {
    const float amax = options.amax ? *options.amax : max_magnitude(w);
    if (!std::isfinite(amax) || amax < 0.0f)
      return Status::invalid("the shared largest magnitude is negative or not finite");
    const float block_max = options.block_scale_max > 0.0f     ? options.block_scale_max
                            : format.input.code == Code::kE4M3 ? kE4M3Max / kE2M1Max
                                                               : kE4M3Max;
    const bool modelopt = options.convention == Convention::kModelOpt;
    const float file = modelopt ? amax / (kE2M1Max * block_max) : block_max * kE2M1Max / amax;
    // A tensor of zeros, or of values so small that the quotient leaves binary32: no second level.
    m.file_global_scale = std::isnormal(file) && std::isnormal(1.0f / file) ? file : 1.0f;
    m.global_scale = modelopt ? m.file_global_scale : 1.0f / m.file_global_scale;
  }

  std::vector<float> low(count, 0.0f), high(count, 0.0f);
  const std::int64_t run = run_length(format.weight, cols);
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t k = 0; k < cols; k += run) {
      const auto index = static_cast<std::size_t>(m.scale_index(r, k));
      const float* x = w.data() + r * cols + k;
      float least = low[index], most = high[index];
      widen(x, std::min(run, cols - k), least, most);
      low[index] = least;
      high[index] = most;
    }
  }
  for (std::size_t i = 0; i < count; ++i) {
    const float shrink = options.shrink.empty() ? 1.0f : options.shrink[i];
    if (!std::isfinite(shrink) || shrink <= 0.0f)
      return Status::invalid("shrink factor " + std::to_string(i) + " is not a positive number");
    const ScalePair pair = scale_from_extremes(format.weight, low[i] * shrink, high[i] * shrink,
                                               options.convention, m.file_global_scale);
    store_scale(m, *storage, static_cast<std::int64_t>(i), pair.scale);
    if (format.weight.zero_point) m.zero_points[i] = static_cast<std::int8_t>(pair.zero_point);
  }
  // Each library divides by the scale as it forms it, which decides ties.
  const bool divides = format.weight.global_scale && options.convention == Convention::kCompressedTensors;
  encode_all(w, m, *storage, [&](std::int64_t index) {
    return divides ? m.scale_at(index) / m.file_global_scale : m.scale_at(index) * m.global_scale;
  });
  return m;
}

Result<QuantizedMatrix> quantize_with_scales(std::span<const float> w, std::int64_t rows, std::int64_t cols,
                                             const LinearFormat& format, std::span<const float> scales,
                                             std::span<const std::int8_t> zero_points, float global_scale) {
  SF_RETURN_IF_ERROR(check_request(w.size(), rows, cols, format));
  SF_RETURN_IF_ERROR(check_finite(w, cols));
  Storage* storage = nullptr;
  QuantizedMatrix m = allocate(rows, cols, format, storage);
  SF_RETURN_IF_ERROR(set_scales(m, *storage, scales, zero_points, global_scale));
  encode_all(w, m, *storage, [&](std::int64_t index) {
    const float scale = m.scale_at(index) * m.global_scale;
    // Codes under a zero scale mean nothing; infinity makes them all zero, or the zero point.
    return scale == 0.0f ? INFINITY : scale;
  });
  return m;
}

Result<QuantizedMatrix> assemble(std::span<const std::int8_t> element_codes, std::int64_t rows,
                                 std::int64_t cols, const LinearFormat& format, std::span<const float> scales,
                                 std::span<const std::int8_t> zero_points, float global_scale) {
  SF_RETURN_IF_ERROR(check_request(element_codes.size(), rows, cols, format));
  Storage* storage = nullptr;
  QuantizedMatrix m = allocate(rows, cols, format, storage);
  SF_RETURN_IF_ERROR(set_scales(m, *storage, scales, zero_points, global_scale));
  const Code code = format.weight.code;
  const int low = code == Code::kInt4 ? -8 : code == Code::kE2M1 ? 0 : -128;
  const int high = code == Code::kInt4 ? 7 : code == Code::kE2M1 ? 15 : 127;
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(cols));
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t k = 0; k < cols; ++k) {
      const std::int8_t element = element_codes[static_cast<std::size_t>(r * cols + k)];
      const int c = element;
      if (c < low || c > high)
        return Status::invalid("code " + std::to_string(c) + " of element " + shape_text(r, k) +
                               " does not fit " + std::string(code_name(code)));
      bytes[static_cast<std::size_t>(k)] = static_cast<std::uint8_t>(code == Code::kInt4 ? c & 15 : c);
    }
    store_row(code, bytes, storage->codes.data() + static_cast<std::size_t>(r) * m.pitch);
  }
  return m;
}

void dequantize_row(const QuantizedMatrix& m, std::int64_t row, std::span<float> out) {
  assert(row >= 0 && row < m.rows && out.size() == static_cast<std::size_t>(m.cols));
  const WeightFormat& format = m.format.weight;
  const std::uint8_t* line = m.codes.data() + static_cast<std::size_t>(row) * m.pitch;
  const std::array<float, 256>& values = values_of(format.code);
  const std::int64_t run = m.group_of_column.empty() ? run_length(format, m.cols) : 1;
  const bool nibbles = code_bits(format.code) == 4;
  for (std::int64_t k = 0; k < m.cols; k += run) {
    const std::int64_t index = m.scale_index(row, k), end = std::min(k + run, m.cols);
    const float scale = m.scale_at(index) * m.global_scale;
    const auto zero =
        static_cast<float>(format.zero_point ? m.zero_points[static_cast<std::size_t>(index)] : 0);
    if (nibbles) {
      float scaled[16];
      for (unsigned code = 0; code < 16; ++code) scaled[code] = (values[code] - zero) * scale;
      for (std::int64_t i = k; i < end; ++i) out[i] = scaled[nibble(line, i)];
    } else {
      for (std::int64_t i = k; i < end; ++i) out[i] = (values[line[i]] - zero) * scale;
    }
  }
}

std::vector<float> dequantize(const QuantizedMatrix& m) {
  std::vector<float> out(static_cast<std::size_t>(m.rows * m.cols));
  for (std::int64_t r = 0; r < m.rows; ++r)
    dequantize_row(
        m, r, std::span(out).subspan(static_cast<std::size_t>(r * m.cols), static_cast<std::size_t>(m.cols)));
  return out;
}

}  // namespace servoflow::quant
