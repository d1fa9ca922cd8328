// Finding a config and asking it for a layer.
#include <optional>
#include <set>

#include "contract/problems.h"
#include "core/status_macros.h"
#include "quant/checkpoint.h"
#include "quant/patterns.h"

namespace servoflow::quant {
namespace {

constexpr std::string_view kClass = "Linear";

// The best way in which `pattern` names the layer: 0 exactly, 1 by an expression or glob, 2 by its class;
// none.
std::optional<int> match_rank(const std::string& pattern, const std::string& name, bool globs) {
  if (pattern == name || pattern == "model." + name) return 0;
  if (pattern == kClass) return 2;
  if (!pattern.starts_with("re:") && (!globs || pattern.find('*') == std::string::npos)) return std::nullopt;
  const Result<NamePattern> compiled = NamePattern::compile(pattern, globs);
  if (!compiled.ok()) return std::nullopt;  // refused when the config was parsed
  if (compiled->matches(name) || compiled->matches("model." + name)) return 1;
  return std::nullopt;
}

}  // namespace

const ConfigGroup* QuantConfig::group_of(const std::string& linear_name) const {
  const bool globs = convention == Convention::kModelOpt;
  for (const std::string& pattern : ignore)
    if (match_rank(pattern, linear_name, globs)) return nullptr;
  const ConfigGroup* best = nullptr;
  const std::string* best_pattern = nullptr;
  int best_rank = 3;
  for (const ConfigGroup& group : groups)
    for (const std::string& pattern : group.targets) {
      const std::optional<int> rank = match_rank(pattern, linear_name, globs);
      if (!rank || *rank > best_rank) continue;
      // Among equals the alphabetical order decides, as in compressed-tensors' match_targets.
      if (*rank == best_rank && pattern >= *best_pattern) continue;
      best = &group;
      best_pattern = &pattern;
      best_rank = *rank;
    }
  return best;
}

Result<std::optional<QuantConfig>> find_quant_config(const Json& config, const std::string& where) {
  if (!config.is_object()) return Status::invalid(where + ": must be an object, is " + json_kind(config));
  const Json* found = nullptr;
  std::string field;
  const auto look = [&](const Json& object, const char* key, const std::string& path) {
    if (found != nullptr || !object.is_object()) return;
    const auto it = object.find(key);
    if (it == object.end() || it->is_null()) return;
    found = &*it;
    field = path + key;
  };
  look(config, "quantization_config", "");
  if (const auto text = config.find("text_config"); text != config.end())
    look(*text, "quantization_config", "text_config.");
  look(config, "compression_config", "");
  if (found == nullptr) return std::optional<QuantConfig>();
  const std::string place = where + ": " + field;
  if (!found->is_object()) return Status::invalid(place + ": must be an object, is " + json_kind(*found));
  const auto method = found->find("quant_method");
  // compression_config predates the key.
  if (method == found->end() && found->contains("config_groups")) {
    SF_ASSIGN_OR_RETURN(QuantConfig parsed, parse_compressed_tensors(*found, place));
    return std::optional<QuantConfig>(std::move(parsed));
  }
  if (method == found->end() || !method->is_string())
    return Status::invalid(place + ".quant_method: must name the method: compressed-tensors or modelopt");
  const std::string& name = method->get_ref<const std::string&>();
  if (name == "compressed-tensors") {
    SF_ASSIGN_OR_RETURN(QuantConfig parsed, parse_compressed_tensors(*found, place));
    return std::optional<QuantConfig>(std::move(parsed));
  }
  if (name == "modelopt") {
    SF_ASSIGN_OR_RETURN(QuantConfig parsed, parse_modelopt(*found, place));
    return std::optional<QuantConfig>(std::move(parsed));
  }
  return Status::invalid(
      place + ".quant_method: \"" + name.substr(0, 80) +
      "\" cannot be read; known: compressed-tensors, modelopt. Convert the checkpoint, or quantize the "
      "original weights with `servoflow quantize`");
}

}  // namespace servoflow::quant
