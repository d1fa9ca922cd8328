// hf_quant_config.json of NVIDIA ModelOpt and its twin in config.json, read and written.
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

constexpr std::string_view kKnown =
    "FP8, FP8_PER_CHANNEL_PER_TOKEN, NVFP4, NVFP4_AWQ, W4A16_NVFP4, W4A8_NVFP4_FP8, W4A16_AWQ, W8A16, "
    "W8A8_SQ_PER_CHANNEL, MXFP8, MIXED_PRECISION";

const Json* value_of(JsonFields& fields, const std::string& key) {
  const Json* value = fields.get(key, false);
  return value == nullptr || value->is_null() ? nullptr : value;
}

// quant_algo and group_size of the whole model or of one layer.
std::optional<ConfigGroup> read_algorithm(JsonFields& fields, const std::string& algorithm) {
  ConfigGroup group;
  group.name = group.layout = algorithm;
  const int size = value_of(fields, "group_size") != nullptr ? fields.integer("group_size", 0, 65536) : 0;
  // These two say what the algorithm implies or the tensors show.
  if (fields.boolean("has_zero_point", false))
    fields.problems().add(fields.field("has_zero_point"), "zero points are not part of any known layout");
  fields.boolean("pre_quant_scale", false);
  const std::optional<LinearFormat> format = modelopt_format(algorithm, 0);
  if (!format) {
    fields.problems().add(fields.field("quant_algo"), "\"" + algorithm.substr(0, 80) +
                                                          "\" cannot be read; known: " + std::string(kKnown));
    return std::nullopt;
  }
  const bool grouped = format->weight.granularity == Granularity::kGroup;
  // FP8 and INT8 exports carry a group size of 0, or of an unrelated default.
  const std::optional<LinearFormat> sized = grouped ? modelopt_format(algorithm, size) : format;
  if (!sized) {
    fields.problems().add(fields.field("group_size"),
                          algorithm + " has groups of " + std::to_string(format->weight.group));
    return std::nullopt;
  }
  group.format = *sized;
  return group;
}

void read_layers(const Json& layers, const std::string& path, QuantConfig& parsed, Problems& problems) {
  if (!layers.is_object()) {
    problems.add(path, "must be an object, is " + json_kind(layers));
    return;
  }
  std::map<std::string, ConfigGroup> groups;
  for (const auto& [name, layer] : layers.items()) {
    JsonFields fields(layer, path + "." + name.substr(0, 200), problems);
    if (!fields.is_object()) continue;
    const std::optional<ConfigGroup> group = read_algorithm(fields, fields.text("quant_algo"));
    fields.refuse_unknown();
    if (!group) continue;
    const std::string key = group->layout + "/" + quant::name(group->format);
    ConfigGroup& all = groups.try_emplace(key, *group).first->second;
    all.targets.push_back(name);
  }
  for (auto& [key, group] : groups) parsed.groups.push_back(std::move(group));
}

}  // namespace

Result<QuantConfig> parse_modelopt(const Json& document, const std::string& where) {
  Problems problems(where);
  QuantConfig parsed;
  parsed.convention = Convention::kModelOpt;
  JsonFields root(document, "", problems);
  if (!root.is_object()) return problems.status();
  // hf_quant_config.json nests what config.json has at its top, under other names.
  const Json* nested = value_of(root, "quantization");
  JsonFields fields(nested != nullptr ? *nested : document, nested != nullptr ? "quantization" : "",
                    problems);
  const char* excluded = nested != nullptr ? "exclude_modules" : "ignore";
  const char* cache = nested != nullptr ? "kv_cache_quant_algo" : "kv_cache_scheme";
  const std::string algorithm = fields.text("quant_algo");
  if (value_of(fields, cache) != nullptr)
    problems.add(fields.field(cache), "a quantized key-value cache is not supported; export without it");
  if (value_of(fields, excluded) != nullptr) parsed.ignore = fields.texts(excluded, false);
  for (const std::string& pattern : parsed.ignore)
    if (pattern.empty() || pattern.starts_with("re:"))
      problems.add(fields.field(excluded),
                   "\"" + pattern.substr(0, 80) + "\" is neither a name nor one with *");
  if (algorithm == "MIXED_PRECISION") {
    if (const Json* layers = fields.get("quantized_layers", true))
      read_layers(*layers, fields.field("quantized_layers"), parsed, problems);
    if (problems.empty() && parsed.groups.empty())
      problems.add(fields.field("quantized_layers"), "is empty: no layer is quantized");
  } else if (!algorithm.empty()) {
    // config.json has the group size inside its groups.
    Json flat = {{"quant_algo", algorithm}};
    for (const char* key : {"group_size", "has_zero_point", "pre_quant_scale"})
      if (const Json* value = value_of(fields, key)) flat[key] = *value;
    if (nested == nullptr && fields.is_object() && document.contains("config_groups")) {
      const Json::json_pointer pointer("/config_groups/group_0/weights/group_size");
      if (document.contains(pointer)) flat["group_size"] = document.at(pointer);
    }
    JsonFields flat_fields(flat, nested != nullptr ? "quantization" : "", problems);
    if (std::optional<ConfigGroup> group = read_algorithm(flat_fields, algorithm)) {
      group->targets = {"Linear"};
      parsed.groups.push_back(std::move(*group));
    }
  }
  SF_RETURN_IF_ERROR(problems.status());
  return parsed;
}

Result<Json> write_modelopt_config(std::span<const Linear> linears, std::span<const LinearFormat> formats,
                                   const std::string& version,
                                   const std::set<std::string>& pre_quant_scaled) {
  Problems problems("modelopt");
  Json layers = Json::object();
  std::vector<std::string> excluded;
  std::set<std::string> kinds;
  Json one;
  for (std::size_t i = 0; i < linears.size(); ++i) {
    if (!formats[i].quantized()) {
      excluded.push_back(linears[i].name);
      continue;
    }
    const bool scaled = pre_quant_scaled.count(linears[i].name) != 0;
    const std::optional<std::string_view> algorithm = modelopt_algorithm(formats[i], scaled);
    if (!algorithm) {
      problems.add(linears[i].name, "has no algorithm for " + name(formats[i]) +
                                        (scaled ? " with pre_quant_scale" : "") +
                                        "; write compressed-tensors");
      continue;
    }
    Json layer = {{"quant_algo", *algorithm}};
    if (formats[i].weight.granularity == Granularity::kGroup) layer["group_size"] = formats[i].weight.group;
    if (scaled) layer.update({{"has_zero_point", false}, {"pre_quant_scale", true}});
    kinds.insert(layer.dump());
    one = layer;
    layers[linears[i].name] = std::move(layer);
  }
  if (layers.empty() && problems.empty())
    problems.add("", "no layer is quantized; there is nothing to describe");
  SF_RETURN_IF_ERROR(problems.status());

  Json quantization;
  if (kinds.size() == 1) {
    quantization = std::move(one);
    quantization["exclude_modules"] = excluded;
  } else {
    quantization = {{"quant_algo", "MIXED_PRECISION"}, {"quantized_layers", std::move(layers)}};
    quantization["exclude_modules"] = excluded;
  }
  quantization["kv_cache_quant_algo"] = nullptr;
  return Json{{"producer", {{"name", "servoflow"}, {"version", version}}},
              {"quantization", std::move(quantization)}};
}

Json modelopt_config_json(const Json& document) {
  // Whoever calls this has the document from write_config.
  const Json& quantization = document.at("quantization");
  Json json = {{"quant_method", "modelopt"},
               {"quant_algo", quantization.at("quant_algo")},
               {"ignore", quantization.at("exclude_modules")},
               {"producer", document.at("producer")}};
  if (quantization.contains("quantized_layers"))
    json["quantized_layers"] = quantization.at("quantized_layers");
  if (quantization.contains("group_size")) {
    json["config_groups"]["group_0"] = {{"targets", Json::array({"Linear"})},
                                        {"weights", {{"group_size", quantization.at("group_size")}}}};
  }
  return json;
}

Result<Json> write_config(std::span<const Linear> linears, std::span<const LinearFormat> formats,
                          Convention convention, const std::string& producer_version,
                          const std::set<std::string>& pre_quant_scaled) {
  if (linears.size() != formats.size())
    return Status::invalid(std::to_string(formats.size()) + " formats were given for " +
                           std::to_string(linears.size()) + " layers");
  if (convention == Convention::kModelOpt)
    return write_modelopt_config(linears, formats, producer_version, pre_quant_scaled);
  if (!pre_quant_scaled.empty())
    return Status::invalid("compressed-tensors has no place for pre_quant_scale (layer " +
                           *pre_quant_scaled.begin() + "); fold it into the layer before, or write modelopt");
  return write_compressed_tensors_config(linears, formats, producer_version);
}

}  // namespace servoflow::quant
