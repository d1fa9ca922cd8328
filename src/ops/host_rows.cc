#include "ops/host_rows.h"

#include <cmath>
#include <cstring>
#include <numbers>

#include "core/bf16.h"

namespace servoflow::ops {

Status check_parts(std::span<const HostMatrix> parts, const PackOptions& options) {
  if (parts.empty()) return Status::runtime("pack: no parts");
  for (const HostMatrix& p : parts) {
    if (!is_float(p.dtype))
      return Status::invalid(p.name + ": dtype " + std::string(dtype_name(p.dtype)) + " cannot be packed");
    if (p.rows <= 0 || p.cols <= 0 || p.cols != parts[0].cols ||
        p.bytes.size() !=
            static_cast<std::size_t>(p.rows) * static_cast<std::size_t>(p.cols) * dtype_size(p.dtype))
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

Status read_row(const HostMatrix& part, int r, float* out) {
  const std::size_t size = dtype_size(part.dtype), cols = static_cast<std::size_t>(part.cols);
  const std::byte* in = part.bytes.data() + static_cast<std::size_t>(r) * cols * size;
  bool finite = true;
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
  if (finite) return {};
  std::size_t bad = 0;
  while (std::isfinite(out[bad])) ++bad;
  return Status::invalid(part.name + ": element [" + std::to_string(r) + ", " + std::to_string(bad) +
                         "] is " + (std::isnan(out[bad]) ? "NaN" : "infinite") +
                         "; `servoflow inspect --scan` lists all such tensors");
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
