// How a linear layer's weights and inputs are stored and rounded, as data: no class per format.
//
// A linear layer is y = x W^T with W [rows = outputs N, cols = inputs K], row-major; groups run along K.
// Where K is not a multiple of the group, the last group of each row is short: the absent elements count as
// zeros and are never multiplied.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "servoflow/status.h"

namespace servoflow::quant {

enum class Code : std::uint8_t { kFloat32, kBFloat16, kE4M3, kE5M2, kE2M1, kInt8, kInt4 };
// How many elements share a scale. kChannel: an output row of a weight. kToken: a row of an input. kGroup:
// `group` neighbours along K. kBlock: `group` x `group` elements of a weight.
enum class Granularity : std::uint8_t { kNone, kTensor, kChannel, kToken, kGroup, kBlock };
enum class ScaleCode : std::uint8_t { kFloat32, kBFloat16, kE4M3, kE8M0 };

struct WeightFormat {
  Code code = Code::kBFloat16;
  Granularity granularity = Granularity::kNone;
  int group = 0;  // kGroup, kBlock; else 0
  ScaleCode scale = ScaleCode::kFloat32;
  bool zero_point = false;    // asymmetric: W = (code - zero) * scale
  bool global_scale = false;  // two levels: W = code * scale * global_scale (NVFP4)
  bool operator==(const WeightFormat&) const = default;
  bool quantized() const { return code != Code::kFloat32 && code != Code::kBFloat16; }
};

// Inputs are rounded at run time, row by row. kBFloat16: not quantized, they keep the kernel's own precision.
// `dynamic` says where the scale comes from: the rows at hand (true), or calibration (false, one number for
// the layer or one per denoise step). Groups always take their own scale from the rows at hand; for NVFP4
// inputs `dynamic` is about the second level only: false is a calibrated global scale (compressed-tensors'
// "local"), true a global scale per row.
struct InputFormat {
  Code code = Code::kBFloat16;
  Granularity granularity = Granularity::kNone;
  int group = 0;
  ScaleCode scale = ScaleCode::kFloat32;
  bool dynamic = true;
  bool zero_point = false;  // int8 static only: x = (code - zero) * scale
  bool operator==(const InputFormat&) const = default;
  bool quantized() const { return code != Code::kFloat32 && code != Code::kBFloat16; }
  bool needs_calibration() const { return quantized() && !dynamic; }
};

struct LinearFormat {
  WeightFormat weight;
  InputFormat input;
  bool operator==(const LinearFormat&) const = default;
  bool quantized() const { return weight.quantized() || input.quantized(); }
};

// Bits of one element, without scales.
int code_bits(Code code);
// Largest magnitude a code can hold: 6, 448, 57344, 127, 7.
float code_max(Code code);
std::size_t scale_bytes(ScaleCode code);
std::string_view code_name(Code code);  // "fp32", "bf16", "fp8", "fp8e5m2", "fp4", "int8", "int4"

// Bits per weight of a [rows, cols] matrix, scales, zero points and global scale included.
double bits_per_weight(const WeightFormat& format, std::int64_t rows, std::int64_t cols);

// The format's name: one of the short names below, or "<weight>/<input>":
//   weight: fp32 bf16 | fp8-tensor fp8-channel fp8-block128 fp8e5m2-… | int8-tensor int8-channel int8-g128 |
//           int4-channel int4-g128 (any group), each int with "-asym" | nvfp4 mxfp4 mxfp8; "-sbf16", "-sf32"
//           where the scales' type is not the usual one (int4: bf16, all others: fp32)
//   input:  none | int8-token int8-tensor fp8-token fp8-tensor fp8-g128 nvfp4 mxfp4 mxfp8, with "-static" for
//           calibrated scales and "-asym" for int8-tensor-static with a zero point
// Short names: fp32 bf16 fp8-w8a8 fp8-w8a8-static fp8-w8a16 fp8-block int8-w8a8 int8-w8a8-static int8-w8a16
//   int4-g128-w4a16 (asymmetric) int4-g128-sym-w4a16 nvfp4-w4a16 nvfp4-w4a8 (FP8 inputs) nvfp4-w4a8-static
//   nvfp4-w4a4 (calibrated global scale) nvfp4-w4a4-dynamic mxfp4-w4a16 mxfp4-w4a4 mxfp8-w8a16 mxfp8-w8a8.
std::string name(const LinearFormat& format);
std::string name(const WeightFormat& format);
std::string name(const InputFormat& format);
// Inverse of name(). The error lists the names.
Result<LinearFormat> parse_format(std::string_view text);
// All short names, in the order above.
std::vector<std::string> format_names();

// Whether the parts make sense together (a group where one is needed, no zero point on floats, …). The
// message names the part and the cause.
Status validate(const LinearFormat& format);

}  // namespace servoflow::quant
