// A quantized weight matrix in the engine's neutral layout, and the arithmetic that defines what it means.
//
// Files of compressed-tensors and ModelOpt are read into this layout (codes are views into the file where the
// bytes agree) and backends pack it into their own. It is not meant for computing: no kernel reads it
// directly.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "quant/formats.h"
#include "servoflow/status.h"

namespace servoflow::quant {

// Which library's formulas and file numbers: they differ in the divisor of integer scales, in the scale of an
// all-zero group, and in the direction of the global scale.
enum class Convention : std::uint8_t { kCompressedTensors, kModelOpt };
// "compressed-tensors", "modelopt".
inline std::string_view convention_name(Convention convention) {
  return convention == Convention::kModelOpt ? "modelopt" : "compressed-tensors";
}

struct QuantizedMatrix {
  LinearFormat format;
  std::int64_t rows = 0, cols = 0;  // N, K without padding

  // Codes, row-major. 8-bit codes: a byte per element (int8 in two's complement). 4-bit codes: byte j of a
  // row holds element 2j in its low and 2j+1 in its high nibble (int4 in two's complement, E2M1 as s|ee|m). A
  // row takes `pitch` bytes, at least ceil(cols * bits / 8); what lies beyond the columns must not be read
  // for its value.
  std::span<const std::uint8_t> codes;
  std::size_t pitch = 0;

  // Scales in their own code (ScaleCode; native byte order), row-major [rows or row blocks, groups or column
  // blocks]: 1 entry for kTensor, rows for kChannel. May be unaligned: use scale().
  std::span<const std::uint8_t> scales;
  std::int64_t scale_rows = 0, scale_cols = 0;
  std::vector<std::int8_t> zero_points;  // as many as scales when format.weight.zero_point, else none
  // The group of each column where they are not in order (weight_g_idx of old checkpoints with "actorder":
  // "group"); empty: col / group. Nothing here makes such matrices.
  std::vector<std::int32_t> group_of_column;

  // Always the multiplier: W = (code - zero) * scale * global_scale. 1 without a second level.
  // `file_global_scale` is the number the file holds, whose direction `convention` tells (compressed-tensors:
  // its reciprocal); 0: none.
  float global_scale = 1.0f;
  float file_global_scale = 0.0f;
  Convention convention = Convention::kCompressedTensors;

  // Multiply input k by this before anything else (pre_quant_scale, SmoothQuant, AWQ); [cols] or empty.
  std::vector<float> input_multiplier;
  // Static input scale as the multiplier x ~ code * input_scale; for NVFP4 inputs the global scale amax/2688.
  // Absent: dynamic. `file_input_scale` as above. Per denoise step where calibrated so; else empty.
  std::optional<float> input_scale;
  float file_input_scale = 0.0f;
  int input_zero_point = 0;
  std::vector<float> step_input_scales;

  std::shared_ptr<const void>
      owner;  // of codes and scales; null: they are views into a mapping that outlives this

  // The scale of element (row, col) without the global scale.
  float scale(std::int64_t row, std::int64_t col) const;
  // The scale at position `index` of `scales`.
  float scale_at(std::int64_t index) const;
  std::int64_t scale_index(std::int64_t row, std::int64_t col) const;
  // All scales, decoded, without the global scale: [scale_rows, scale_cols].
  std::vector<float> decoded_scales() const;
  // The integer code (int8, int4), or the raw bits of a float code, of element (row, col).
  int code(std::int64_t row, std::int64_t col) const;
  // The value of the code alone: an integer, or the float it stands for. Zero points and scales not applied.
  float code_value(std::int64_t row, std::int64_t col) const;
  // Bytes that codes, scales and zero points take in this layout.
  std::size_t bytes() const;
};

struct ScaleOptions {
  Convention convention = Convention::kCompressedTensors;
  // Largest magnitude for the global scale, over a set of layers that share it (q, k, v; gate, up). Absent:
  // W's own.
  std::optional<float> amax;
  // NVFP4: the block scale that the largest block gets; 448 in both libraries, 448/6 where FP8 inputs follow
  // (ModelOpt's W4A8_NVFP4_FP8: code * scale then fits E4M3), 256 for "four over six". 0: 448, or 448/6 if
  // the format's input is E4M3.
  float block_scale_max = 0.0f;
  // Multiplies the magnitude (range, if asymmetric) that each scale is computed from: [scale_rows *
  // scale_cols], or empty for 1. How clipping searches try candidates.
  std::span<const float> shrink;
};

// The shape of a format's scales for a [rows, cols] matrix.
struct ScaleShape {
  std::int64_t rows = 0, cols = 0;
};
ScaleShape scale_shape(const WeightFormat& format, std::int64_t rows, std::int64_t cols);

// Largest magnitude. NaN and infinity are the caller's to refuse.
float max_magnitude(std::span<const float> values);

// Rounds W [rows, cols] to nearest, with scales from its own extremes. Fails for a format that is not
// quantized, that cannot hold the matrix, or for values that are not finite (the first is named).
Result<QuantizedMatrix> quantize(std::span<const float> w, std::int64_t rows, std::int64_t cols,
                                 const LinearFormat& format, const ScaleOptions& options = {});

// Rounds with scales given: `scales` [scale_rows * scale_cols] are the multipliers without global scale,
// rounded to the format's scale code first (to nearest; E8M0 to the power of two below); `zero_points` as
// many or empty.
Result<QuantizedMatrix> quantize_with_scales(std::span<const float> w, std::int64_t rows, std::int64_t cols,
                                             const LinearFormat& format, std::span<const float> scales,
                                             std::span<const std::int8_t> zero_points = {},
                                             float global_scale = 1.0f);

// Codes given: one value per element, an integer for int8 and int4, the raw bits for float codes. For methods
// that choose codes themselves (GPTQ).
Result<QuantizedMatrix> assemble(std::span<const std::int8_t> element_codes, std::int64_t rows,
                                 std::int64_t cols, const LinearFormat& format, std::span<const float> scales,
                                 std::span<const std::int8_t> zero_points = {}, float global_scale = 1.0f);

// The code of one value under a scale: what quantize() does to each element. `inverse` is not used: x is
// divided by scale, as both libraries do.
int encode_element(Code code, float x, float scale, int zero_point);

// out [cols] = row `row` of the matrix as numbers: (code - zero) * (scale * global_scale), in binary32.
void dequantize_row(const QuantizedMatrix& matrix, std::int64_t row, std::span<float> out);
// All rows, [rows * cols].
std::vector<float> dequantize(const QuantizedMatrix& matrix);

// What execution does to inputs: each of n rows of k floats, `pitch` floats apart, is rounded to the format
// and back, in place: code = round(x * inverse) (ties to even, saturating), then code * scale. In binary32:
//   int8-token, int8-tensor   scale amax / 127, inverse 127 / amax, codes -127..127
//   fp8-token, -tensor, -gN   scale amax / 448, inverse 448 / amax
//   static int8, fp8          scale given, inverse 1 / scale, codes -128..127; (round(x * inverse) + zero -
//   zero) * scale nvfp4                     global g = static_scale, or the row's amax / 2688; block
//   E4M3(amax / 6 / g), 0 block scale
//                             stays 0 and its elements become 0
//   mxfp4, mxfp8              2^(floor(log2 amax) - 2 or 8), amax first rounded as compressed-tensors does
// A row of zeros stays zeros. static_scale is required exactly if format.needs_calibration(); a caller's
// mistake asserts.
void fake_quantize_rows(const InputFormat& format, float* rows, std::int64_t n, std::int64_t k,
                        std::int64_t pitch, std::optional<float> static_scale = std::nullopt,
                        int zero_point = 0);

}  // namespace servoflow::quant
