// A weight matrix on the grid of its format: which scale each element has, and what rounding leaves. The
// methods of this folder choose scales and values here; quant/matrix.h turns both into bytes and defines what
// they mean.
#pragma once

#include <span>
#include <vector>

#include "quant/formats.h"
#include "quant/matrix.h"
#include "quant/methods/lattice.h"
#include "servoflow/status.h"

namespace servoflow::quant {

// The values that a code stands for. float32 and bfloat16 have none: a caller's mistake, asserts.
Lattice lattice_of(Code code);

// Scales of all elements of [rows, cols]. A value is scale · (code - zero); `scale` includes the global
// scale.
struct Grid {
  WeightFormat format;
  Lattice lattice = Lattice::integer(8);
  int rows = 0, cols = 0;
  int row_group = 1, group = 1;    // rows and columns that share a scale
  int groups = 1;                  // along K
  float global = 1;                // second level; 1 without one
  std::vector<float> scale, zero;  // [row groups, groups]; `zero` empty where symmetric
  std::size_t at(int row, int col) const {
    return static_cast<std::size_t>(row / row_group) * static_cast<std::size_t>(groups) +
           static_cast<std::size_t>(col / group);
  }
  float round(std::size_t at, float w) const {
    const float s = scale[at];
    if (s == 0) return 0;
    if (zero.empty()) return s * lattice.snap(w / s);
    return s * (lattice.snap(w / s + zero[at]) - zero[at]);
  }
};

// The grid that a quantized matrix lies on: of quantize(), the one round-to-nearest chooses.
Grid grid_of(const QuantizedMatrix& matrix);

// The same grid with the scales of least Σ importance[col] · (w - rounded w)² in each group, among those the
// format can store between `narrowest` and 1.0 of the scales given; for E4M3 block scales up to 1.5 of them,
// which includes the choice of every block between the largest codes 6 and 4 ("four over six"). Asymmetric
// groups also move each end alone. Never worse than the grid given by this measure. `importance` [cols],
// empty: all alike. Scales over blocks of rows and columns (fp8-block) stay as they are.
Grid least_squares(const Grid& start, std::span<const float> w, std::span<const float> importance = {},
                   float narrowest = 0.4f);

// w rounded to the nearest value of the grid, [rows, cols].
std::vector<float> round_to_grid(const Grid& grid, std::span<const float> w);
// Bytes for values that lie on the grid (or the nearest ones that do).
Result<QuantizedMatrix> encode_on_grid(const Grid& grid, std::span<const float> values,
                                       const LinearFormat& format);

// bias += E[x] · (W - W')ᵀ: takes the mean error out of every output. mean [cols]; bias [rows] is changed in
// place.
void correct_bias(std::span<const float> w, std::span<const float> rounded, std::span<const float> mean,
                  std::span<float> bias);

}  // namespace servoflow::quant
