#include "quant/formats.h"

#include <array>
#include <charconv>
#include <optional>
#include <utility>

#include "core/status_macros.h"
#include "quant/scalars.h"

namespace servoflow::quant {
namespace {

using Kind = Granularity;

constexpr WeightFormat kBF16Weight{};
constexpr WeightFormat kFP32Weight{.code = Code::kFloat32};
constexpr WeightFormat kNvfp4{.code = Code::kE2M1,
                              .granularity = Kind::kGroup,
                              .group = 16,
                              .scale = ScaleCode::kE4M3,
                              .global_scale = true};
constexpr WeightFormat kMxfp4{
    .code = Code::kE2M1, .granularity = Kind::kGroup, .group = 32, .scale = ScaleCode::kE8M0};
constexpr WeightFormat kMxfp8{
    .code = Code::kE4M3, .granularity = Kind::kGroup, .group = 32, .scale = ScaleCode::kE8M0};
constexpr WeightFormat kFP8Channel{.code = Code::kE4M3, .granularity = Kind::kChannel};
constexpr WeightFormat kFP8Tensor{.code = Code::kE4M3, .granularity = Kind::kTensor};
constexpr WeightFormat kFP8Block{.code = Code::kE4M3, .granularity = Kind::kBlock, .group = 128};
constexpr WeightFormat kInt8Channel{.code = Code::kInt8, .granularity = Kind::kChannel};
constexpr WeightFormat kInt4G128{
    .code = Code::kInt4, .granularity = Kind::kGroup, .group = 128, .scale = ScaleCode::kBFloat16};
constexpr WeightFormat kInt4G128Asym{.code = Code::kInt4,
                                     .granularity = Kind::kGroup,
                                     .group = 128,
                                     .scale = ScaleCode::kBFloat16,
                                     .zero_point = true};

constexpr InputFormat kNone{};
constexpr InputFormat kFP8Token{.code = Code::kE4M3, .granularity = Kind::kToken};
constexpr InputFormat kFP8Static{.code = Code::kE4M3, .granularity = Kind::kTensor, .dynamic = false};
constexpr InputFormat kFP8G128{.code = Code::kE4M3, .granularity = Kind::kGroup, .group = 128};
constexpr InputFormat kInt8Token{.code = Code::kInt8, .granularity = Kind::kToken};
constexpr InputFormat kInt8Static{.code = Code::kInt8, .granularity = Kind::kTensor, .dynamic = false};
constexpr InputFormat kNvfp4Static{.code = Code::kE2M1,
                                   .granularity = Kind::kGroup,
                                   .group = 16,
                                   .scale = ScaleCode::kE4M3,
                                   .dynamic = false};
constexpr InputFormat kNvfp4Dynamic{
    .code = Code::kE2M1, .granularity = Kind::kGroup, .group = 16, .scale = ScaleCode::kE4M3};
constexpr InputFormat kMxfp4Input{
    .code = Code::kE2M1, .granularity = Kind::kGroup, .group = 32, .scale = ScaleCode::kE8M0};
constexpr InputFormat kMxfp8Input{
    .code = Code::kE4M3, .granularity = Kind::kGroup, .group = 32, .scale = ScaleCode::kE8M0};

struct Named {
  std::string_view name;
  LinearFormat format;
};
constexpr std::array<Named, 20> kShortNames = {{
    {"fp32", {kFP32Weight, kNone}},
    {"bf16", {kBF16Weight, kNone}},
    {"fp8-w8a8", {kFP8Channel, kFP8Token}},
    {"fp8-w8a8-static", {kFP8Tensor, kFP8Static}},
    {"fp8-w8a16", {kFP8Channel, kNone}},
    {"fp8-block", {kFP8Block, kFP8G128}},
    {"int8-w8a8", {kInt8Channel, kInt8Token}},
    {"int8-w8a8-static", {kInt8Channel, kInt8Static}},
    {"int8-w8a16", {kInt8Channel, kNone}},
    {"int4-g128-w4a16", {kInt4G128Asym, kNone}},
    {"int4-g128-sym-w4a16", {kInt4G128, kNone}},
    {"nvfp4-w4a16", {kNvfp4, kNone}},
    {"nvfp4-w4a8", {kNvfp4, kFP8Token}},
    {"nvfp4-w4a8-static", {kNvfp4, kFP8Static}},
    {"nvfp4-w4a4", {kNvfp4, kNvfp4Static}},
    {"nvfp4-w4a4-dynamic", {kNvfp4, kNvfp4Dynamic}},
    {"mxfp4-w4a16", {kMxfp4, kNone}},
    {"mxfp4-w4a4", {kMxfp4, kMxfp4Input}},
    {"mxfp8-w8a16", {kMxfp8, kNone}},
    {"mxfp8-w8a8", {kMxfp8, kMxfp8Input}},
}};

constexpr ScaleCode usual_scale(Code code) {
  return code == Code::kInt4 ? ScaleCode::kBFloat16 : ScaleCode::kFloat32;
}

// Takes a word off the front of "a-b-c".
std::string_view take(std::string_view& text) {
  const std::size_t dash = text.find('-');
  const std::string_view word = text.substr(0, dash);
  text = dash == std::string_view::npos ? std::string_view() : text.substr(dash + 1);
  return word;
}

// The number after `prefix`, or nothing.
std::optional<int> number_after(std::string_view word, std::string_view prefix) {
  if (!word.starts_with(prefix)) return std::nullopt;
  word.remove_prefix(prefix.size());
  int value = 0;
  const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), value);
  if (error != std::errc() || end != word.data() + word.size() || value <= 0) return std::nullopt;
  return value;
}

std::optional<Code> code_of(std::string_view word) {
  for (const Code code : {Code::kE4M3, Code::kE5M2, Code::kInt8, Code::kInt4})
    if (word == code_name(code)) return code;
  return std::nullopt;
}

std::optional<WeightFormat> parse_weight(std::string_view text) {
  if (text == "fp32") return kFP32Weight;
  if (text == "bf16") return kBF16Weight;
  if (text == "nvfp4") return kNvfp4;
  if (text == "mxfp4") return kMxfp4;
  if (text == "mxfp8") return kMxfp8;
  const std::optional<Code> code = code_of(take(text));
  if (!code) return std::nullopt;
  WeightFormat format{.code = *code, .scale = usual_scale(*code)};
  const std::string_view grain = take(text);
  if (grain == "tensor") {
    format.granularity = Kind::kTensor;
  } else if (grain == "channel") {
    format.granularity = Kind::kChannel;
  } else if (const auto block = number_after(grain, "block")) {
    format.granularity = Kind::kBlock;
    format.group = *block;
  } else if (const auto group = number_after(grain, "g")) {
    format.granularity = Kind::kGroup;
    format.group = *group;
  } else {
    return std::nullopt;
  }
  while (!text.empty()) {
    const std::string_view word = take(text);
    if (word == "asym" && !format.zero_point) {
      format.zero_point = true;
    } else if (word == "sbf16" && usual_scale(*code) != ScaleCode::kBFloat16) {
      format.scale = ScaleCode::kBFloat16;
    } else if (word == "sf32" && usual_scale(*code) != ScaleCode::kFloat32) {
      format.scale = ScaleCode::kFloat32;
    } else {
      return std::nullopt;
    }
  }
  return format;
}

std::optional<InputFormat> parse_input(std::string_view text) {
  if (text == "none") return kNone;
  InputFormat format;
  const std::string_view first = take(text);
  if (first == "nvfp4") {
    format = kNvfp4Dynamic;
  } else if (first == "mxfp4") {
    format = kMxfp4Input;
  } else if (first == "mxfp8") {
    format = kMxfp8Input;
  } else {
    const std::optional<Code> code = code_of(first);
    if (!code) return std::nullopt;
    format.code = *code;
    const std::string_view grain = take(text);
    if (grain == "token") {
      format.granularity = Kind::kToken;
    } else if (grain == "tensor") {
      format.granularity = Kind::kTensor;
    } else if (const auto group = number_after(grain, "g")) {
      format.granularity = Kind::kGroup;
      format.group = *group;
    } else {
      return std::nullopt;
    }
  }
  while (!text.empty()) {
    const std::string_view word = take(text);
    if (word == "static" && format.dynamic) {
      format.dynamic = false;
    } else if (word == "asym" && !format.zero_point) {
      format.zero_point = true;
    } else {
      return std::nullopt;
    }
  }
  return format;
}

std::string grain_name(Granularity granularity, int group) {
  switch (granularity) {
    case Kind::kNone:
      return "";
    case Kind::kTensor:
      return "-tensor";
    case Kind::kChannel:
      return "-channel";
    case Kind::kToken:
      return "-token";
    case Kind::kGroup:
      return "-g" + std::to_string(group);
    case Kind::kBlock:
      return "-block" + std::to_string(group);
  }
  return "";
}

Status validate_weight(const WeightFormat& w) {
  const auto bad = [](const std::string& why) { return Status::invalid("weight format: " + why); };
  if (!w.quantized()) {
    return w.granularity == Kind::kNone && w.group == 0 && !w.zero_point && !w.global_scale
               ? Status::ok_status()
               : bad("fp32 and bf16 have neither scales nor zero points");
  }
  if (w.granularity == Kind::kNone || w.granularity == Kind::kToken)
    return bad("scales are per tensor, channel, group or block");
  const bool grouped = w.granularity == Kind::kGroup || w.granularity == Kind::kBlock;
  if (grouped != (w.group > 0))
    return bad(grouped ? "the group size is missing" : "a group size without groups");
  if (w.group > 65536) return bad("groups larger than 65536 are not supported");
  const bool integer = w.code == Code::kInt8 || w.code == Code::kInt4;
  if (w.zero_point && !integer) return bad("only int8 and int4 have zero points");
  if (w.zero_point && w.granularity == Kind::kBlock) return bad("block scales have no zero points");
  if (w.global_scale && w != kNvfp4) return bad("only nvfp4 has a global scale");
  if (w.code == Code::kE2M1 && w != kNvfp4 && w != kMxfp4)
    return bad(
        "fp4 comes as nvfp4 (groups of 16, E4M3 scales, global scale) or mxfp4 (groups of 32, E8M0 scales)");
  if (w.scale == ScaleCode::kE8M0 && w != kMxfp4 && w != kMxfp8)
    return bad("E8M0 scales belong to mxfp4 and mxfp8");
  if (w.scale == ScaleCode::kE4M3 && w.code != Code::kE2M1) return bad("E4M3 scales belong to nvfp4");
  if (w.code == Code::kInt4 && w.granularity == Kind::kBlock) return bad("int4 has no block scales");
  return {};
}

Status validate_input(const InputFormat& i) {
  const auto bad = [](const std::string& why) { return Status::invalid("input format: " + why); };
  if (!i.quantized()) {
    return i == kNone ? Status::ok_status()
                      : bad("unquantized inputs are bf16, without scales or zero points");
  }
  if (i.code == Code::kE2M1 || i.scale != ScaleCode::kFloat32) {
    InputFormat dynamic = i;
    dynamic.dynamic = true;
    if (dynamic == kNvfp4Dynamic || i == kMxfp4Input || i == kMxfp8Input) return {};
    return bad("fp4 inputs come as nvfp4 or mxfp4, E8M0 scales as mxfp4 or mxfp8");
  }
  if (i.code == Code::kInt4) return bad("int4 inputs are not supported");
  if (i.code == Code::kE5M2) return bad("fp8 inputs are E4M3");
  const bool grouped = i.granularity == Kind::kGroup;
  if (grouped != (i.group > 0))
    return bad(grouped ? "the group size is missing" : "a group size without groups");
  if (i.group > 65536) return bad("groups larger than 65536 are not supported");
  if (i.granularity != Kind::kTensor && i.granularity != Kind::kToken && !grouped)
    return bad("scales are per tensor, token or group");
  if (!i.dynamic && i.granularity != Kind::kTensor) return bad("static scales are per tensor");
  if (i.zero_point && (i.code != Code::kInt8 || i.dynamic))
    return bad("only static int8 inputs have zero points");
  return {};
}

}  // namespace

int code_bits(Code code) {
  switch (code) {
    case Code::kFloat32:
      return 32;
    case Code::kBFloat16:
      return 16;
    case Code::kE4M3:
    case Code::kE5M2:
    case Code::kInt8:
      return 8;
    case Code::kE2M1:
    case Code::kInt4:
      return 4;
  }
  return 0;
}

float code_max(Code code) {
  switch (code) {
    case Code::kFloat32:
    case Code::kBFloat16:
      return 0x1.fep127f;
    case Code::kE4M3:
      return kE4M3Max;
    case Code::kE5M2:
      return kE5M2Max;
    case Code::kE2M1:
      return kE2M1Max;
    case Code::kInt8:
      return 127.0f;
    case Code::kInt4:
      return 7.0f;
  }
  return 0.0f;
}

std::size_t scale_bytes(ScaleCode code) {
  switch (code) {
    case ScaleCode::kFloat32:
      return 4;
    case ScaleCode::kBFloat16:
      return 2;
    case ScaleCode::kE4M3:
    case ScaleCode::kE8M0:
      return 1;
  }
  return 0;
}

std::string_view code_name(Code code) {
  switch (code) {
    case Code::kFloat32:
      return "fp32";
    case Code::kBFloat16:
      return "bf16";
    case Code::kE4M3:
      return "fp8";
    case Code::kE5M2:
      return "fp8e5m2";
    case Code::kE2M1:
      return "fp4";
    case Code::kInt8:
      return "int8";
    case Code::kInt4:
      return "int4";
  }
  return "";
}

std::string name(const WeightFormat& w) {
  if (!w.quantized()) return std::string(code_name(w.code));
  if (w == kNvfp4) return "nvfp4";
  if (w == kMxfp4) return "mxfp4";
  if (w == kMxfp8) return "mxfp8";
  std::string text = std::string(code_name(w.code)) + grain_name(w.granularity, w.group);
  if (w.zero_point) text += "-asym";
  if (w.scale != usual_scale(w.code)) text += w.scale == ScaleCode::kBFloat16 ? "-sbf16" : "-sf32";
  return text;
}

std::string name(const InputFormat& i) {
  if (!i.quantized()) return "none";
  InputFormat dynamic = i;
  dynamic.dynamic = true;
  std::string text = dynamic == kNvfp4Dynamic ? "nvfp4"
                     : dynamic == kMxfp4Input ? "mxfp4"
                     : dynamic == kMxfp8Input
                         ? "mxfp8"
                         : std::string(code_name(i.code)) + grain_name(i.granularity, i.group);
  if (!i.dynamic) text += "-static";
  if (i.zero_point) text += "-asym";
  return text;
}

std::string name(const LinearFormat& format) {
  for (const Named& named : kShortNames)
    if (named.format == format) return std::string(named.name);
  return name(format.weight) + "/" + name(format.input);
}

std::vector<std::string> format_names() {
  std::vector<std::string> names;
  for (const Named& named : kShortNames) names.emplace_back(named.name);
  return names;
}

Result<LinearFormat> parse_format(std::string_view text) {
  for (const Named& named : kShortNames)
    if (named.name == text) return named.format;
  const auto unknown = [&] {
    std::string names;
    for (const Named& named : kShortNames) names += (names.empty() ? "" : ", ") + std::string(named.name);
    return Status::invalid("unknown format \"" + std::string(text.substr(0, 80)) + "\"; known: " + names +
                           "; or <weight>/<input> such as int8-channel/int8-token");
  };
  const std::size_t slash = text.find('/');
  if (slash == std::string_view::npos) return unknown();
  const std::optional<WeightFormat> weight = parse_weight(text.substr(0, slash));
  const std::optional<InputFormat> input = parse_input(text.substr(slash + 1));
  if (!weight || !input) return unknown();
  const LinearFormat format{*weight, *input};
  if (Status status = validate(format); !status.ok())
    return status.with_context("format \"" + std::string(text) + "\"");
  return format;
}

Status validate(const LinearFormat& format) {
  SF_RETURN_IF_ERROR(validate_weight(format.weight));
  SF_RETURN_IF_ERROR(validate_input(format.input));
  if (!format.weight.quantized() && format.input.quantized())
    return Status::invalid("format: quantized inputs need quantized weights");
  return {};
}

}  // namespace servoflow::quant
