#include "quant/methods/weight_grid.h"

#include <algorithm>
#include <cassert>
#include <cmath>

#include "core/bf16.h"

namespace servoflow::quant {
namespace {

const Lattice& e4m3() {
  static const Lattice lattice = Lattice::e4m3();
  return lattice;
}

// The scale as the file will hold it; 0 where it cannot.
float storable(const Grid& grid, float scale) {
  switch (grid.format.scale) {
    case ScaleCode::kFloat32:
      return scale;
    case ScaleCode::kBFloat16:
      return to_float(to_bf16(scale));
    case ScaleCode::kE4M3:
      return e4m3().snap(scale / grid.global) * grid.global;
    case ScaleCode::kE8M0:
      return std::ldexp(1.0f, std::clamp(std::ilogb(scale), -127, 127));
  }
  return scale;
}

struct Choice {
  float scale = 0, zero = 0;
};

Choice from_range(const Grid& grid, float low, float high) {
  const float span = grid.lattice.max() - grid.lattice.lowest();
  Choice out{.scale = storable(grid, (high - low) / span)};
  if (out.scale > 0)
    out.zero = std::clamp(std::nearbyint(grid.lattice.lowest() - low / out.scale), grid.lattice.lowest(),
                          grid.lattice.max());
  return out;
}

// One set of elements that share a scale: runs of a row, and each column's weight.
struct Group {
  std::vector<float> values;
  std::vector<float> importance;  // empty: all alike
};

double squared_error(const Grid& grid, Choice choice, const Group& group) {
  const bool zero = !grid.zero.empty();
  double sum = 0;
  for (std::size_t i = 0; i < group.values.size(); ++i) {
    const float w = group.values[i];
    const float rounded =
        zero ? choice.scale * (grid.lattice.snap(w / choice.scale + choice.zero) - choice.zero)
             : choice.scale * grid.lattice.snap(w / choice.scale);
    const double e = static_cast<double>(w) - static_cast<double>(rounded);
    sum += e * e * (group.importance.empty() ? 1.0 : static_cast<double>(group.importance[i]));
  }
  return sum;
}

Choice search(const Grid& grid, Choice start, const Group& group, float narrowest) {
  constexpr int kTries = 48;
  Choice best = start;
  if (start.scale == 0) return best;
  double least = squared_error(grid, best, group);
  const auto consider = [&](Choice choice) {
    if (!(choice.scale > 0) || (choice.scale == best.scale && choice.zero == best.zero)) return;
    if (const double e = squared_error(grid, choice, group); e < least) {
      least = e;
      best = choice;
    }
  };
  switch (grid.format.scale) {
    case ScaleCode::kE4M3:  // few exist: try each
      for (const float code : e4m3().magnitudes()) {
        const float scale = code * grid.global;
        if (scale >= start.scale * narrowest && scale <= start.scale * 1.5f) consider({scale, 0});
      }
      return best;
    case ScaleCode::kE8M0:
      consider({start.scale / 2, 0});
      consider({start.scale * 2, 0});
      return best;
    case ScaleCode::kFloat32:
    case ScaleCode::kBFloat16:
      break;
  }
  float low = 0, high = 0;
  for (const float v : group.values) {
    low = std::min(low, v);
    high = std::max(high, v);
  }
  for (int i = 1; i < kTries; ++i) {
    const float part = 1.0f - (1.0f - narrowest) * static_cast<float>(i) / kTries;
    if (grid.zero.empty()) {
      consider({storable(grid, start.scale * part), 0});
    } else {
      consider(from_range(grid, low * part, high));
      consider(from_range(grid, low, high * part));
      consider(from_range(grid, low * part, high * part));
    }
  }
  return best;
}

}  // namespace

Lattice lattice_of(Code code) {
  switch (code) {
    case Code::kE4M3:
      return Lattice::e4m3();
    case Code::kE5M2:
      return Lattice::e5m2();
    case Code::kE2M1:
      return Lattice::e2m1();
    case Code::kInt8:
      return Lattice::integer(8);
    case Code::kInt4:
      return Lattice::integer(4);
    case Code::kFloat32:
    case Code::kBFloat16:
      break;
  }
  assert(false && "not a quantized code");
  return Lattice::integer(8);
}

Grid grid_of(const QuantizedMatrix& m) {
  Grid out{.format = m.format.weight,
           .lattice = lattice_of(m.format.weight.code),
           .rows = static_cast<int>(m.rows),
           .cols = static_cast<int>(m.cols),
           .global = m.global_scale,
           .scale = m.decoded_scales()};
  switch (out.format.granularity) {
    case Granularity::kTensor:
      out.row_group = std::max(1, out.rows);
      out.group = std::max(1, out.cols);
      break;
    case Granularity::kGroup:
      out.group = out.format.group;
      break;
    case Granularity::kBlock:
      out.row_group = out.group = out.format.group;
      break;
    case Granularity::kNone:
    case Granularity::kChannel:
    case Granularity::kToken:
      out.group = std::max(1, out.cols);
      break;
  }
  out.groups = static_cast<int>(m.scale_cols);
  for (float& s : out.scale) s *= m.global_scale;
  out.zero.assign(m.zero_points.begin(), m.zero_points.end());
  return out;
}

Grid least_squares(const Grid& start, std::span<const float> w, std::span<const float> importance,
                   float narrowest) {
  Grid out = start;
  if (start.format.granularity == Granularity::kBlock) return out;
  Group group;
  for (int r = 0; r < start.rows; r += start.row_group)
    for (int c = 0; c < start.cols; c += start.group) {
      group.values.clear();
      group.importance.clear();
      const int columns = std::min(start.group, start.cols - c);
      for (int i = r; i < std::min(start.rows, r + start.row_group); ++i) {
        const auto row = w.subspan(
            static_cast<std::size_t>(i) * static_cast<std::size_t>(start.cols) + static_cast<std::size_t>(c),
            static_cast<std::size_t>(columns));
        group.values.insert(group.values.end(), row.begin(), row.end());
        if (importance.empty()) continue;
        const auto weight =
            importance.subspan(static_cast<std::size_t>(c), static_cast<std::size_t>(columns));
        group.importance.insert(group.importance.end(), weight.begin(), weight.end());
      }
      const std::size_t at = start.at(r, c);
      const Choice best =
          search(start, {start.scale[at], start.zero.empty() ? 0 : start.zero[at]}, group, narrowest);
      out.scale[at] = best.scale;
      if (!out.zero.empty()) out.zero[at] = best.zero;
    }
  return out;
}

std::vector<float> round_to_grid(const Grid& grid, std::span<const float> w) {
  std::vector<float> out(w.size());
  std::size_t i = 0;
  for (int r = 0; r < grid.rows; ++r)
    for (int c = 0; c < grid.cols; ++c, ++i) out[i] = grid.round(grid.at(r, c), w[i]);
  return out;
}

Result<QuantizedMatrix> encode_on_grid(const Grid& grid, std::span<const float> values,
                                       const LinearFormat& format) {
  std::vector<float> scales(grid.scale);
  for (float& s : scales) s = s > 0 ? s / grid.global : 1.0f;  // a group without scale holds only zeros
  const std::vector<std::int8_t> zeros(grid.zero.begin(), grid.zero.end());
  return quantize_with_scales(values, grid.rows, grid.cols, format, scales, zeros, grid.global);
}

void correct_bias(std::span<const float> w, std::span<const float> rounded, std::span<const float> mean,
                  std::span<float> bias) {
  const std::size_t cols = mean.size();
  for (std::size_t r = 0; r < bias.size(); ++r) {
    double sum = 0;
    for (std::size_t c = 0; c < cols; ++c)
      sum += static_cast<double>(mean[c]) *
             (static_cast<double>(w[r * cols + c]) - static_cast<double>(rounded[r * cols + c]));
    bias[r] = static_cast<float>(static_cast<double>(bias[r]) + sum);
  }
}

}  // namespace servoflow::quant
