#include "ops/host_rows.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <numbers>

#include "core/bf16.h"

namespace servoflow::ops {

Status check_parts(std::span<const HostMatrix> parts, const PackOptions& options) {
  if (parts.empty()) return Status::runtime("pack: no parts");
  for (const HostMatrix& p : parts) {
    if ((p.quantized != nullptr) != (parts[0].quantized != nullptr))
      return Status::invalid(p.name + ": quantized, and " + parts[0].name +
                             " is not, or the reverse; both are computed "
                             "as one product and must be stored alike");
    if (p.quantized != nullptr) {
      if (p.quantized->rows != p.rows || p.quantized->cols != p.cols || p.cols != parts[0].cols ||
          p.rows <= 0)
        return Status::runtime(p.name + ": pack: shape and quantized matrix disagree");
      continue;
    }
    if (!is_float(p.dtype))
      return Status::invalid(p.name + ": dtype " + std::string(dtype_name(p.dtype)) + " cannot be packed");
    if (p.rows <= 0 || p.cols <= 0 || p.cols != parts[0].cols ||
        (!p.sequence && p.bytes.size() != static_cast<std::size_t>(p.rows) *
                                              static_cast<std::size_t>(p.cols) * dtype_size(p.dtype)))
      return Status::runtime(p.name + ": pack: shape and bytes disagree");
  }
  if (options.mode == PackMode::kInterleave && (parts.size() != 2 || parts[0].rows != parts[1].rows))
    return Status::runtime(parts[0].name + ": pack: gate and up must have the same shape");
  if (options.mode == PackMode::kHeads) {
    bool whole = parts.size() == 3 && options.head_dim > 0;
    for (const HostMatrix& p : parts) whole = whole && p.rows % options.head_dim == 0;
    if (!whole) return Status::runtime(parts[0].name + ": pack: q, k and v must be whole heads");
  }
  return {};
}

namespace {

Status not_finite(const HostMatrix& part, int r, const float* row) {
  std::size_t bad = 0;
  while (std::isfinite(row[bad])) ++bad;
  return Status::invalid(part.name + ": element [" + std::to_string(r) + ", " + std::to_string(bad) +
                         "] is " + (std::isnan(row[bad]) ? "NaN" : "infinite") +
                         "; `servoflow inspect --scan` lists all such tensors");
}

}  // namespace

Status read_row(const HostMatrix& part, int r, float* out) {
  const std::size_t size = dtype_size(part.dtype), cols = static_cast<std::size_t>(part.cols);
  bool finite = true;
  if (part.quantized != nullptr) {
    quant::dequantize_row(*part.quantized, r, {out, cols});
    for (std::size_t i = 0; i < cols; ++i) finite = finite && std::isfinite(out[i]);
    return finite ? Status() : not_finite(part, r, out);
  }
  const std::byte* in = part.bytes.data() + static_cast<std::size_t>(r) * cols * size;
  for (std::size_t i = 0; i < cols; ++i, in += size) {
    float value = 0;
    if (part.dtype == DType::kF32) {
      std::memcpy(&value, in, 4);
    } else if (part.dtype == DType::kF64) {
      double wide;
      std::memcpy(&wide, in, 8);
      value = static_cast<float>(wide);
    } else {
      std::uint16_t bits;
      std::memcpy(&bits, in, 2);
      value = part.dtype == DType::kBF16 ? to_float(bf16{bits}) : half_to_float(bits);
    }
    out[i] = value;
    finite = finite && std::isfinite(value);
  }
  return finite ? Status() : not_finite(part, r, out);
}

namespace {

std::uint8_t to_byte(std::int32_t sum) {
  return static_cast<std::uint8_t>(std::clamp(sum >> kResamplingBits, 0, 255));
}

// The channel of a frame, and its two axes.
struct Channel {
  const std::uint8_t* pixels;
  std::int64_t row, column;  // distances
  const std::int32_t *x_first, *x_second, *x_weights, *y_first, *y_second, *y_weights;
  int x_taps, y_taps;

  Channel(const Frame& f, const std::byte* data, int channel) {
    const auto table = [&](std::int64_t at) { return reinterpret_cast<const std::int32_t*>(data + at); };
    pixels = reinterpret_cast<const std::uint8_t*>(data + f.pixels) +
             (f.planes != 0 ? static_cast<std::int64_t>(channel) * f.width * f.height : channel);
    column = f.planes != 0 ? 1 : 3;
    row = column * f.width;
    x_first = table(f.column_table);
    x_second = x_first + f.columns;
    x_weights = x_second + f.columns;
    y_first = table(f.row_table);
    y_second = y_first + f.rows;
    y_weights = y_second + f.rows;
    x_taps = f.column_taps;
    y_taps = f.row_taps;
  }
  std::uint8_t at(int y, int x) const { return pixels[y * row + x * column]; }
  float fixed_point(int y, int x) const {
    constexpr std::int32_t kHalf = std::int32_t{1} << (kResamplingBits - 1);
    std::int32_t sum = kHalf;
    for (int j = 0; j < y_second[y]; ++j) {
      std::int32_t line = kHalf;
      for (int i = 0; i < x_second[x]; ++i)
        line += at(y_first[y] + j, x_first[x] + i) * x_weights[x * x_taps + i];
      sum += to_byte(line) * y_weights[y * y_taps + j];
    }
    return static_cast<float>(to_byte(sum)) / 255.0f * 2.0f - 1.0f;
  }
  float between(int y, int x, bool unit) const {
    const auto value = [&](int from_y, int from_x) {
      const float v = static_cast<float>(at(from_y, from_x)) / 255.0f;
      return unit ? v : v * 2.0f - 1.0f;
    };
    const float right = std::bit_cast<float>(x_weights[x]), left = 1.0f - right;
    const float down = std::bit_cast<float>(y_weights[y]), up = 1.0f - down;
    const float top = value(y_first[y], x_first[x]) * left + value(y_first[y], x_second[x]) * right;
    const float bottom = value(y_second[y], x_first[x]) * left + value(y_second[y], x_second[x]) * right;
    const float out = top * up + bottom * down;
    return unit ? std::clamp(out, 0.0f, 1.0f) * 2.0f - 1.0f : std::clamp(out, -1.0f, 1.0f);
  }
};

}  // namespace

void letterbox_rows(const Letterbox& op, int pictures) {
  const std::int64_t size = std::int64_t{3} * op.image * op.image;
  for (int p = 0; p < pictures; ++p) {
    const Frame& f = op.frames[p];
    float* out = op.pixels + p * size;
    if (f.resampling == Resampling::kReady) {
      std::memcpy(out, op.data + f.pixels, static_cast<std::size_t>(size) * sizeof(float));
      continue;
    }
    std::fill(out, out + size, -1.0f);
    for (int c = 0; c < 3; ++c) {
      const Channel channel(f, op.data, c);
      for (int y = 0; y < f.rows; ++y)
        for (int x = 0; x < f.columns; ++x)
          out[(static_cast<std::int64_t>(f.top + y) * op.image + f.left + x) * 3 + c] =
              f.resampling == Resampling::kFixedPoint
                  ? channel.fixed_point(y, x)
                  : channel.between(y, x, f.resampling == Resampling::kUnit);
    }
  }
}

void put_patch_value(const PatchRows& op, std::int64_t row, int i, float value) {
  if (op.out.dtype == DType::kF32) {
    static_cast<float*>(op.out.data)[row * op.out.pitch + i] = value;
    return;
  }
  const int values = 3 * op.patch * op.patch;
  bf16* out = static_cast<bf16*>(op.out.data) + row * op.out.pitch + i;
  out[0] = to_bf16(value);
  out[values] = to_bf16(value - to_float(out[0]));
  if (op.out.cols == 3 * values) out[2 * values] = out[0];
}

void scale_row(const Matrix& x, std::int64_t r, float scale, float* out) {
  for (int c = 0; c < x.cols; ++c)
    out[c] = scale * (x.dtype == DType::kBF16 ? to_float(static_cast<const bf16*>(x.data)[r * x.pitch + c])
                                              : static_cast<const float*>(x.data)[r * x.pitch + c]);
}

void time_features(float t, int width, double min_period, double max_period, float* out) {
  const int half = width / 2;
  for (int i = 0; i < half; ++i) {
    const double fraction = half > 1 ? static_cast<double>(i) / (half - 1) : 0.0;
    const double angle = 2 * std::numbers::pi * static_cast<double>(t) /
                         (min_period * std::pow(max_period / min_period, fraction));
    out[i] = static_cast<float>(std::sin(angle));
    out[half + i] = static_cast<float>(std::cos(angle));
  }
}

}  // namespace servoflow::ops
