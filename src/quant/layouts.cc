#include "quant/layouts.h"

#include <array>

namespace servoflow::quant {
namespace {

bool is_nvfp4(const WeightFormat& w) { return w.code == Code::kE2M1 && w.scale == ScaleCode::kE4M3; }
bool is_mx(const WeightFormat& w) { return w.scale == ScaleCode::kE8M0; }

struct Algorithm {
  std::string_view name;
  std::string_view format;  // with the usual group
  bool pre_quant_scale;     // whether it is the algorithm for layers whose inputs are multiplied first
  bool plain;               // … and for those whose are not
};
// Where two names mean the same tensors, the first is written.
constexpr std::array<Algorithm, 10> kAlgorithms = {{
    {"FP8", "fp8-w8a8-static", false, true},
    {"FP8_PER_CHANNEL_PER_TOKEN", "fp8-w8a8", false, true},
    {"NVFP4", "nvfp4-w4a4", false, true},
    {"NVFP4_AWQ", "nvfp4-w4a4", true, false},
    {"W4A16_NVFP4", "nvfp4-w4a16", true, true},
    {"W4A8_NVFP4_FP8", "nvfp4-w4a8-static", true, true},
    {"W4A16_AWQ", "int4-g128-sf32/none", true, true},
    {"W8A16", "int8-w8a16", true, true},
    {"W8A8_SQ_PER_CHANNEL", "int8-w8a8-static", true, true},
    {"MXFP8", "mxfp8-w8a8", false, true},
}};

}  // namespace

std::optional<std::string_view> compressed_tensors_layout(const LinearFormat& format) {
  const WeightFormat& w = format.weight;
  const InputFormat& i = format.input;
  if (!w.quantized() || !validate(format).ok()) return std::nullopt;
  switch (w.code) {
    case Code::kE2M1:
      return is_nvfp4(w) ? "nvfp4-pack-quantized" : "mxfp4-pack-quantized";
    case Code::kE4M3:
      if (is_mx(w)) return "mxfp8-quantized";
      return i.quantized() ? "float-quantized" : "naive-quantized";
    case Code::kInt8:
      if (i.code == Code::kE4M3 || i.code == Code::kE2M1 || w.granularity == Granularity::kBlock)
        return std::nullopt;
      if (i.quantized() && w.granularity != Granularity::kGroup && !w.zero_point) return "int-quantized";
      [[fallthrough]];
    case Code::kInt4:
      if (i.code == Code::kE4M3 || i.code == Code::kE2M1) return std::nullopt;
      // Zero points are packed per group or channel only.
      if (w.zero_point && w.granularity == Granularity::kTensor) return std::nullopt;
      return "pack-quantized";
    default:
      return std::nullopt;
  }
}

std::optional<LinearFormat> modelopt_format(std::string_view algorithm, int group) {
  for (const Algorithm& known : kAlgorithms) {
    if (known.name != algorithm) continue;
    LinearFormat format = *parse_format(known.format);
    if (group == 0 || group == format.weight.group) return format;
    if (algorithm != "W4A16_AWQ") return std::nullopt;  // the other groups are part of the format
    format.weight.group = group;
    return format;
  }
  return std::nullopt;
}

std::optional<std::string_view> modelopt_algorithm(const LinearFormat& format, bool pre_quant_scale) {
  LinearFormat wanted = format;
  // Scales are stored as F32 whatever they were.
  if (wanted.weight.scale == ScaleCode::kBFloat16) wanted.weight.scale = ScaleCode::kFloat32;
  for (const Algorithm& known : kAlgorithms) {
    if (!(pre_quant_scale ? known.pre_quant_scale : known.plain)) continue;
    const int group = wanted.weight.granularity == Granularity::kGroup ? wanted.weight.group : 0;
    const std::optional<LinearFormat> means = modelopt_format(known.name, group);
    if (means && *means == wanted) return known.name;
  }
  return std::nullopt;
}

std::int64_t stored_cols(const WeightFormat& format, std::int64_t cols) {
  if (format.granularity != Granularity::kGroup) return cols;
  return (cols + format.group - 1) / format.group * format.group;
}

}  // namespace servoflow::quant
