// quantization_config of compressed-tensors, read and written.
#include <algorithm>
#include <map>
#include <optional>

#include "contract/json_fields.h"
#include "contract/problems.h"
#include "core/status_macros.h"
#include "quant/checkpoint.h"
#include "quant/config_writers.h"
#include "quant/layouts.h"
#include "quant/patterns.h"

namespace servoflow::quant {
namespace {

using contract::JsonFields;
using contract::Problems;

// QuantizationArgs: how one tensor is quantized.
struct Args {
  int bits = 0, group = 0, block = 0;
  bool is_float = false, symmetric = true;
  std::string strategy, dynamic, scale_type;  // dynamic: "false", "true", "local"
};

// Null counts as absent throughout: the library writes both.
const Json* value_of(JsonFields& fields, const std::string& key) {
  const Json* value = fields.get(key, false);
  return value == nullptr || value->is_null() ? nullptr : value;
}

Args read_args(const Json& json, const std::string& path, Problems& problems) {
  Args args;
  JsonFields fields(json, path, problems);
  if (!fields.is_object()) return args;
  args.bits = fields.integer("num_bits", 1, 16, 8);
  const std::string type = fields.text("type", "int");
  args.is_float = type == "float";
  if (type != "int" && type != "float") problems.add(fields.field("type"), "must be int or float");
  args.symmetric = fields.boolean("symmetric", true);
  if (value_of(fields, "group_size") != nullptr) args.group = fields.integer("group_size", -1, 65536);
  if (const Json* strategy = value_of(fields, "strategy")) {
    args.strategy = strategy->is_string() ? strategy->get<std::string>() : "";
    std::transform(args.strategy.begin(), args.strategy.end(), args.strategy.begin(),
                   [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  } else {  // the library infers it in this way
    args.strategy = args.group > 0 ? "group" : args.group == -1 ? "channel" : "tensor";
  }
  args.group = std::max(args.group, 0);
  if (const Json* block = value_of(fields, "block_structure")) {
    const bool pair = block->is_array() && block->size() == 2 && (*block)[0].is_number_integer() &&
                      (*block)[0] == (*block)[1] && (*block)[0].get<std::int64_t>() >= 1 &&
                      (*block)[0].get<std::int64_t>() <= 65536;
    if (pair) {
      args.block = (*block)[0].get<int>();
    } else {
      problems.add(fields.field("block_structure"), "must be two equal sizes such as [128, 128]");
    }
  }
  const Json* dynamic = value_of(fields, "dynamic");
  args.dynamic = dynamic == nullptr      ? "false"
                 : dynamic->is_string()  ? dynamic->get<std::string>()
                 : dynamic->is_boolean() ? (dynamic->get<bool>() ? "true" : "false")
                                         : "?";
  if (args.dynamic != "false" && args.dynamic != "true" && args.dynamic != "local")
    problems.add(fields.field("dynamic"), "must be true, false or \"local\"");
  if (const Json* order = value_of(fields, "actorder")) {
    // "group" makes files carry weight_g_idx, which read_linear looks for; "weight" changes no file.
    const bool known = order->is_boolean() || *order == "weight" || *order == "static" || *order == "group" ||
                       *order == "dynamic";
    if (!known) problems.add(fields.field("actorder"), "must be null, \"weight\" or \"group\"");
  }
  if (value_of(fields, "scale_dtype") != nullptr) args.scale_type = fields.text("scale_dtype", "");
  for (const char* inert : {"zp_dtype", "observer", "observer_kwargs"}) fields.get(inert, false);
  fields.refuse_unknown();
  return args;
}

std::optional<WeightFormat> weight_format(const Args& a) {
  WeightFormat w;
  w.zero_point = !a.symmetric;
  w.group = a.group;
  if (a.strategy == "tensor") {
    w.granularity = Granularity::kTensor;
  } else if (a.strategy == "channel") {
    w.granularity = Granularity::kChannel;
  } else if (a.strategy == "group" || a.strategy == "tensor_group") {
    w.granularity = Granularity::kGroup;
  } else if (a.strategy == "block") {
    w.granularity = Granularity::kBlock;
    w.group = a.block;
  } else {
    return std::nullopt;
  }
  if (a.is_float && a.bits == 4) {
    w.code = Code::kE2M1;
    w.global_scale = a.strategy == "tensor_group";
    w.scale = w.global_scale ? ScaleCode::kE4M3 : ScaleCode::kE8M0;
  } else if (a.is_float && a.bits == 8) {
    w.code = Code::kE4M3;
    // The library tells MXFP8 from FP8 in groups of 32 by the scales' type alone.
    if (a.strategy == "group" && a.group == 32 && a.scale_type == "torch.uint8") w.scale = ScaleCode::kE8M0;
  } else if (!a.is_float && a.bits == 8) {
    w.code = Code::kInt8;
  } else if (!a.is_float && a.bits == 4) {
    w.code = Code::kInt4;
    w.scale = ScaleCode::kBFloat16;
  } else {
    return std::nullopt;
  }
  if (a.strategy == "tensor_group" && !w.global_scale) return std::nullopt;
  return w;
}

std::optional<InputFormat> input_format(const Args& a) {
  InputFormat i;
  i.dynamic = a.dynamic == "true";
  i.zero_point = !a.symmetric;
  i.group = a.group;
  if (a.strategy == "tensor") {
    i.granularity = Granularity::kTensor;
  } else if (a.strategy == "token") {
    i.granularity = Granularity::kToken;
  } else if (a.strategy == "group" || a.strategy == "tensor_group") {
    i.granularity = Granularity::kGroup;
  } else {
    return std::nullopt;
  }
  if (a.dynamic == "local" && a.strategy != "tensor_group") return std::nullopt;
  if (a.is_float && a.bits == 4) {
    i.code = Code::kE2M1;
    const bool nvfp4 = a.strategy == "tensor_group";
    if (nvfp4 && a.dynamic == "false") return std::nullopt;  // static block scales exist in no file
    i.scale = nvfp4 ? ScaleCode::kE4M3 : ScaleCode::kE8M0;
  } else if (a.is_float && a.bits == 8) {
    i.code = Code::kE4M3;
    if (a.strategy == "group" && a.group == 32 && a.scale_type == "torch.uint8") i.scale = ScaleCode::kE8M0;
  } else if (!a.is_float && a.bits == 8) {
    i.code = Code::kInt8;
  } else {
    return std::nullopt;
  }
  return i;
}

std::string describe(const Args& a) {
  return std::string(a.is_float ? "float" : "int") + std::to_string(a.bits) + ", strategy " +
         a.strategy.substr(0, 20) + (a.group > 0 ? " " + std::to_string(a.group) : "") +
         (a.symmetric ? "" : ", asymmetric") + ", dynamic " + a.dynamic.substr(0, 20);
}

ConfigGroup read_group(const std::string& name, const Json& json, const std::string& top_layout,
                       Problems& problems) {
  ConfigGroup group;
  group.name = name;
  const std::string path = "config_groups." + name.substr(0, 80);
  JsonFields fields(json, path, problems);
  if (!fields.is_object()) return group;
  group.targets = fields.texts("targets");
  for (const std::string& target : group.targets)
    if (Result<NamePattern> pattern = NamePattern::compile(target, false); !pattern.ok())
      problems.add(fields.field("targets"), pattern.status().message());
  LinearFormat format;
  const Json* weights = value_of(fields, "weights");
  if (weights == nullptr) {
    problems.add(fields.field("weights"), "missing: groups that leave weights alone cannot be run");
  } else {
    const Args args = read_args(*weights, fields.field("weights"), problems);
    const std::optional<WeightFormat> read = weight_format(args);
    if (!read || args.dynamic != "false") {
      problems.add(fields.field("weights"), "no format that can be run: " + describe(args));
    } else {
      format.weight = *read;
    }
  }
  if (const Json* inputs = value_of(fields, "input_activations")) {
    const Args args = read_args(*inputs, fields.field("input_activations"), problems);
    const std::optional<InputFormat> read = input_format(args);
    if (!read) {
      problems.add(fields.field("input_activations"), "no format that can be run: " + describe(args));
    } else {
      format.input = *read;
    }
  }
  if (value_of(fields, "output_activations") != nullptr)
    problems.add(fields.field("output_activations"), "quantized outputs are not supported");
  if (Status status = validate(format); !status.ok()) problems.add(path, status.message());
  group.format = format;

  std::string layout = top_layout;
  if (value_of(fields, "format") != nullptr) layout = fields.text("format", "");
  const std::optional<std::string_view> usual = compressed_tensors_layout(format);
  if (layout.empty() || layout == "mixed-precision") layout = usual.value_or("");
  group.layout = layout;
  // The naive layouts differ by name only; int8 weights also come packed.
  const bool naive = layout == "naive-quantized" || layout == "float-quantized" || layout == "int-quantized";
  const bool naive_holds = format.weight.code == Code::kE4M3 || format.weight.code == Code::kInt8;
  const bool mx = format.weight.scale == ScaleCode::kE8M0;
  const bool holds = naive ? naive_holds && !mx
                     : layout == "pack-quantized"
                         ? format.weight.code == Code::kInt8 || format.weight.code == Code::kInt4
                     : layout == "nvfp4-pack-quantized" ? format.weight.global_scale
                     : layout == "mxfp4-pack-quantized"
                         ? mx && format.weight.code == Code::kE2M1
                         : layout == "mxfp8-quantized" && mx && format.weight.code == Code::kE4M3;
  if (!holds)
    problems.add(fields.field("format"),
                 layout.empty() ? "no layout holds " + quant::name(format)
                                : "\"" + layout.substr(0, 80) + "\" does not hold " + quant::name(format));
  fields.refuse_unknown();
  return group;
}

Json args_json(const WeightFormat& w) {
  const bool is_float = w.code == Code::kE4M3 || w.code == Code::kE2M1;
  Json json = {{"num_bits", code_bits(w.code)},
               {"type", is_float ? "float" : "int"},
               {"symmetric", !w.zero_point},
               {"dynamic", false},
               {"actorder", nullptr},
               {"observer", "memoryless_minmax"},
               {"observer_kwargs", Json::object()},
               {"group_size", nullptr},
               {"block_structure", nullptr},
               {"scale_dtype", nullptr},
               {"zp_dtype", nullptr}};
  switch (w.granularity) {
    case Granularity::kTensor:
      json["strategy"] = "tensor";
      break;
    case Granularity::kChannel:
      json["strategy"] = "channel";
      break;
    case Granularity::kBlock:
      json["strategy"] = "block";
      json["block_structure"] = {w.group, w.group};
      break;
    default:
      json["strategy"] = w.global_scale ? "tensor_group" : "group";
      json["group_size"] = w.group;
  }
  if (w.scale == ScaleCode::kE4M3) json["scale_dtype"] = "torch.float8_e4m3fn";
  if (w.scale == ScaleCode::kE8M0) json["scale_dtype"] = json["zp_dtype"] = "torch.uint8";
  if (w.zero_point) json["zp_dtype"] = "torch.int8";
  return json;
}

Json args_json(const InputFormat& i) {
  const bool nvfp4 = i.scale == ScaleCode::kE4M3;
  Json json = {{"num_bits", code_bits(i.code)},
               {"type", i.code == Code::kInt8 ? "int" : "float"},
               {"symmetric", !i.zero_point},
               {"dynamic", i.dynamic},
               {"actorder", nullptr},
               {"observer", i.dynamic ? Json() : Json("minmax")},
               {"observer_kwargs", Json::object()},
               {"group_size", nullptr},
               {"block_structure", nullptr},
               {"scale_dtype", nullptr},
               {"zp_dtype", nullptr}};
  if (i.granularity == Granularity::kGroup) {
    json["strategy"] = nvfp4 ? "tensor_group" : "group";
    json["group_size"] = i.group;
  } else {
    json["strategy"] = i.granularity == Granularity::kToken ? "token" : "tensor";
  }
  if (nvfp4) json["scale_dtype"] = "torch.float8_e4m3fn";
  if (nvfp4 && !i.dynamic) {
    json["dynamic"] = "local";
    json["observer"] = "static_minmax";
  }
  if (i.scale == ScaleCode::kE8M0) json["scale_dtype"] = json["zp_dtype"] = "torch.uint8";
  return json;
}

}  // namespace

Result<QuantConfig> parse_compressed_tensors(const Json& config, const std::string& where) {
  Problems problems(where);
  JsonFields fields(config, "", problems);
  QuantConfig parsed;
  parsed.convention = Convention::kCompressedTensors;
  if (!fields.is_object()) return problems.status();
  if (const std::string method = fields.text("quant_method", "compressed-tensors");
      method != "compressed-tensors")
    problems.add("quant_method", "must be compressed-tensors");
  const std::string layout = value_of(fields, "format") != nullptr ? fields.text("format", "") : "";
  constexpr std::string_view kLayouts[] = {"nvfp4-pack-quantized", "pack-quantized",  "float-quantized",
                                           "int-quantized",        "naive-quantized", "mxfp4-pack-quantized",
                                           "mxfp8-quantized",      "mixed-precision", ""};
  if (std::find(std::begin(kLayouts), std::end(kLayouts), layout) == std::end(kLayouts))
    problems.add(
        "format",
        "\"" + layout.substr(0, 80) +
            "\" cannot be read; known: nvfp4-pack-quantized, pack-quantized, float-quantized, "
            "int-quantized, naive-quantized, mxfp4-pack-quantized, mxfp8-quantized, mixed-precision");
  if (value_of(fields, "quantization_status") != nullptr)
    if (const std::string status = fields.text("quantization_status", ""); status != "compressed")
      problems.add("quantization_status",
                   "is \"" + status.substr(0, 80) +
                       "\"; only compressed checkpoints hold codes (save with save_compressed)");
  if (value_of(fields, "kv_cache_scheme") != nullptr)
    problems.add("kv_cache_scheme", "a quantized key-value cache is not supported");
  for (const char* key : {"sparsity_config", "transform_config"}) {
    const Json* value = value_of(fields, key);
    const bool inert = value == nullptr || value->empty() ||
                       (value->is_object() && value->value("format", Json()) == "dense");
    if (!inert) problems.add(key, "must be empty: sparse or rotated weights cannot be read");
  }
  if (value_of(fields, "ignore") != nullptr) parsed.ignore = fields.texts("ignore", false);
  for (const std::string& pattern : parsed.ignore)
    if (Result<NamePattern> compiled = NamePattern::compile(pattern, false); !compiled.ok())
      problems.add("ignore", compiled.status().message());
  if (const Json* groups = fields.get("config_groups", true)) {
    if (!groups->is_object()) {
      problems.add("config_groups", "must be an object, is " + json_kind(*groups));
    } else {
      for (const auto& [name, group] : groups->items())
        parsed.groups.push_back(read_group(name, group, layout, problems));
      if (groups->empty()) problems.add("config_groups", "is empty");
    }
  }
  SF_RETURN_IF_ERROR(problems.status());
  return parsed;
}

Result<Json> write_compressed_tensors_config(std::span<const Linear> linears,
                                             std::span<const LinearFormat> formats,
                                             const std::string& version) {
  Problems problems("compressed-tensors");
  std::vector<LinearFormat> kinds;
  std::map<std::size_t, std::vector<std::string>> members;
  std::vector<std::string> ignore;
  for (std::size_t i = 0; i < linears.size(); ++i) {
    if (!formats[i].quantized()) {
      ignore.push_back(linears[i].name);
      continue;
    }
    if (!compressed_tensors_layout(formats[i])) {
      problems.add(linears[i].name, "has no layout for " + name(formats[i]));
      continue;
    }
    const auto at = std::find(kinds.begin(), kinds.end(), formats[i]);
    const auto kind = static_cast<std::size_t>(at - kinds.begin());
    if (at == kinds.end()) kinds.push_back(formats[i]);
    members[kind].push_back(linears[i].name);
  }
  if (kinds.empty() && problems.empty())
    problems.add("", "no layer is quantized; there is nothing to describe");
  SF_RETURN_IF_ERROR(problems.status());

  Json groups = Json::object();
  std::string top;
  for (std::size_t kind = 0; kind < kinds.size(); ++kind) {
    const std::string layout(*compressed_tensors_layout(kinds[kind]));
    top = kind == 0 || top == layout ? layout : "mixed-precision";
    groups["group_" + std::to_string(kind)] = {
        {"targets", kinds.size() == 1 ? Json::array({"Linear"}) : Json(members[kind])},
        {"format", layout},
        {"weights", args_json(kinds[kind].weight)},
        {"input_activations", kinds[kind].input.quantized() ? args_json(kinds[kind].input) : Json()},
        {"output_activations", nullptr}};
  }
  return Json{{"version", version},
              {"quant_method", "compressed-tensors"},
              {"format", top},
              {"quantization_status", "compressed"},
              {"global_compression_ratio", nullptr},
              {"kv_cache_scheme", nullptr},
              {"ignore", ignore},
              {"sparsity_config", Json::object()},
              {"transform_config", Json::object()},
              {"config_groups", std::move(groups)}};
}

}  // namespace servoflow::quant
