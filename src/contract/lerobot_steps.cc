#include "contract/lerobot_steps.h"

#include <algorithm>
#include <set>
#include <utility>
#include <vector>

#include "contract/json_fields.h"
#include "contract/validate.h"

namespace servoflow::contract {
namespace {

// One step as saved: its configuration and the state file beside it.
struct Step {
  std::string name, path;
  const Json* config = nullptr;
  std::string state_file;
};

const Json& empty_object() {
  static const Json kEmpty = Json::object();
  return kEmpty;
}

// The pipeline's steps. Each known step comes at most once and in lerobot's order; `required` ones must be
// there.
std::map<std::string, Step> read_steps(const Json& json, const std::string& path,
                                       const std::vector<std::string>& order,
                                       const std::set<std::string>& required, Problems& problems) {
  std::map<std::string, Step> steps;
  JsonFields root(json, path, problems);
  if (!root.is_object()) return steps;
  root.text("name", "");
  std::size_t position = 0, last = 0;
  for (const Json* item : root.elements("steps")) {
    Step step;
    step.path = path + ": steps[" + std::to_string(position++) + "]";
    JsonFields fields(*item, step.path, problems);
    if (!fields.is_object()) continue;
    step.name = fields.text("registry_name", "");
    if (step.name.empty()) {
      problems.add(step.path, "names no registered step (registry_name); custom classes are not supported");
      continue;
    }
    const auto known = std::find(order.begin(), order.end(), step.name);
    if (known == order.end()) {
      problems.add(step.path, "unknown step \"" + step.name + "\"; known here: " + join(order));
      continue;
    }
    step.path = path + ": " + step.name;
    step.config = fields.get("config", false);
    if (step.config == nullptr) step.config = &empty_object();
    step.state_file = fields.text("state_file", "");
    fields.get("artifacts", false);  // where a copy of the tokenizer lies; ours is found by its own rules
    fields.refuse_unknown();
    const std::size_t rank = static_cast<std::size_t>(known - order.begin());
    if (steps.count(step.name) != 0) {
      problems.add(step.path, "comes twice");
    } else if (rank < last) {
      problems.add(step.path, "out of order; expected: " + join(order));
    }
    last = std::max(last, rank);
    steps.emplace(step.name, std::move(step));
  }
  root.refuse_unknown();
  for (const std::string& name : required) {
    if (steps.count(name) == 0) {
      problems.add(
          path, "the step " + name + " is missing" +
                    (name == "pi05_prepare_state_tokenizer_processor_step"
                         ? "; pipelines without the state in the prompt (memory variants) are not supported"
                         : ""));
    }
  }
  return steps;
}

void refuse_unless(Problems& problems, bool supported, const std::string& field, const std::string& cause) {
  if (!supported) problems.add(field, cause);
}

void check_no_settings(const std::map<std::string, Step>& steps, const char* name, Problems& problems) {
  const auto step = steps.find(name);
  if (step == steps.end()) return;
  JsonFields fields(*step->second.config, step->second.path, problems);
  fields.refuse_unknown();
}

// Device placement is ours to decide; a cast of the observation is not.
void check_device(const std::map<std::string, Step>& steps, Problems& problems) {
  const auto step = steps.find("device_processor");
  if (step == steps.end()) return;
  JsonFields fields(*step->second.config, step->second.path, problems);
  fields.text("device", "");
  const Json* type = fields.get("float_dtype", false);
  refuse_unless(problems, type == nullptr || type->is_null() || *type == "float32",
                fields.field("float_dtype"), "casting observations is not supported; only null or float32");
  fields.refuse_unknown();
}

void check_relative(const std::map<std::string, Step>& steps, const char* name, ColumnNames& action_names,
                    Problems& problems) {
  const auto step = steps.find(name);
  if (step == steps.end()) return;
  JsonFields fields(*step->second.config, step->second.path, problems);
  refuse_unless(problems, !fields.boolean("enabled", false), fields.field("enabled"),
                "relative actions are not supported; use a checkpoint trained on absolute ones");
  fields.get("exclude_joints", false);
  read_column_names(fields, "action_names", action_names);
  fields.refuse_unknown();
}

NormalizerStep read_normalizer(const std::map<std::string, Step>& steps, const char* name,
                               const char* feature, Problems& problems) {
  NormalizerStep out;
  out.name = name;
  const auto step = steps.find(name);
  if (step == steps.end()) return out;
  out.state_file = step->second.state_file;
  JsonFields fields(*step->second.config, step->second.path, problems);
  if (!fields.is_object()) return out;
  if (const Json* epsilon = fields.get("eps", false)) {
    refuse_unless(problems, epsilon->is_number() && epsilon->get<double>() == 1e-8, fields.field("eps"),
                  "must be 1e-8, the value lerobot trains with");
  }
  if (const Json* keys = fields.get("normalize_observation_keys", false);
      keys != nullptr && !keys->is_null()) {
    refuse_unless(
        problems, keys->is_array() && std::find(keys->begin(), keys->end(), Json(feature)) != keys->end(),
        fields.field("normalize_observation_keys"), std::string("leaves out ") + feature + "; not supported");
  }
  if (const Json* modes = fields.get("norm_map", true))
    out.modes = read_norm_map(*modes, fields.field("norm_map"), problems);
  if (const Json* features = fields.get("features", true)) {
    JsonFields list(*features, fields.field("features"), problems);
    // lerobot normalizes a feature only when the step lists it: an absent one would silently stay raw.
    refuse_unless(problems, !list.is_object() || features->contains(feature), fields.field("features"),
                  std::string("does not list ") + feature);
    if (const Json* action = list.get("action", false); action != nullptr && action->is_object()) {
      JsonFields columns(*action, list.field("action"), problems);
      read_column_names(columns, "names", out.action_names);
    }
  }
  fields.refuse_unknown();
  return out;
}

void read_tokenizer(const std::map<std::string, Step>& steps, PreprocessorSteps& out, Problems& problems) {
  const auto step = steps.find("tokenizer_processor");
  if (step == steps.end()) return;
  JsonFields fields(*step->second.config, step->second.path, problems);
  if (!fields.is_object()) return;
  out.max_tokens = fields.integer("max_length", 1, kMaxTokens);
  out.task_key = fields.text("task_key", "task");
  fields.text("tokenizer_name", "");
  refuse_unless(problems, fields.text("padding_side", "right") == "right", fields.field("padding_side"),
                "must be \"right\"");
  refuse_unless(problems, fields.text("padding", "max_length") == "max_length", fields.field("padding"),
                "must be \"max_length\"");
  refuse_unless(problems, fields.boolean("truncation", true), fields.field("truncation"), "must be true");
  fields.refuse_unknown();
}

}  // namespace

void read_column_names(JsonFields& fields, const std::string& key, ColumnNames& out) {
  const Json* value = fields.get(key, false);
  if (value == nullptr) return;
  if (value->is_object() && value->size() == 1) value = &*value->begin();
  if (!value->is_array()) return;
  std::vector<std::string> names;
  for (const Json& name : *value) {
    if (!name.is_string()) return;
    names.push_back(name.get<std::string>());
  }
  out.push_back(std::move(names));
}

std::map<std::string, std::string> read_norm_map(const Json& json, const std::string& path,
                                                 Problems& problems) {
  std::map<std::string, std::string> modes;
  JsonFields fields(json, path, problems);
  if (!fields.is_object()) return modes;
  for (const char* type : {"VISUAL", "STATE", "ACTION", "ENV", "LANGUAGE", "REWARD"}) {
    const std::string mode = fields.text(type, "");
    if (mode.empty()) continue;
    modes[type] = mode;
    const bool used = std::string(type) == "STATE" || std::string(type) == "ACTION";
    if (used && mode != "IDENTITY" && mode != "QUANTILES" && mode != "MEAN_STD") {
      problems.add(fields.field(type),
                   "normalization \"" + mode + "\" is not supported; known: IDENTITY, QUANTILES, MEAN_STD");
    }
    if (std::string(type) == "VISUAL" && mode != "IDENTITY") {
      problems.add(fields.field(type),
                   "normalizing images by " + mode + " is not supported; pi05 uses IDENTITY");
    }
  }
  fields.refuse_unknown();
  return modes;
}

PreprocessorSteps read_preprocessor(const Json& json, const std::string& path, Problems& problems) {
  const auto steps = read_steps(
      json, path,
      {"rename_observations_processor", "to_batch_processor", "relative_actions_processor",
       "normalizer_processor", "pi05_prepare_state_tokenizer_processor_step", "tokenizer_processor",
       "device_processor"},
      {"normalizer_processor", "pi05_prepare_state_tokenizer_processor_step", "tokenizer_processor"},
      problems);
  PreprocessorSteps out;
  if (const auto step = steps.find("rename_observations_processor"); step != steps.end()) {
    JsonFields fields(*step->second.config, step->second.path, problems);
    if (const Json* map = fields.get("rename_map", false); map != nullptr && !map->is_null()) {
      JsonFields renames(*map, fields.field("rename_map"), problems);
      if (renames.is_object()) {
        for (const auto& [from, to] : map->items()) out.rename_map[from] = renames.text(from);
      }
    }
    fields.refuse_unknown();
  }
  check_no_settings(steps, "to_batch_processor", problems);
  check_no_settings(steps, "pi05_prepare_state_tokenizer_processor_step", problems);
  ColumnNames action_names;
  check_relative(steps, "relative_actions_processor", action_names, problems);
  check_device(steps, problems);
  out.normalizer = read_normalizer(steps, "normalizer_processor", "observation.state", problems);
  out.normalizer.action_names.insert(out.normalizer.action_names.begin(), action_names.begin(),
                                     action_names.end());
  read_tokenizer(steps, out, problems);
  return out;
}

NormalizerStep read_postprocessor(const Json& json, const std::string& path, Problems& problems) {
  const auto steps =
      read_steps(json, path, {"unnormalizer_processor", "absolute_actions_processor", "device_processor"},
                 {"unnormalizer_processor"}, problems);
  NormalizerStep out = read_normalizer(steps, "unnormalizer_processor", "action", problems);
  check_relative(steps, "absolute_actions_processor", out.action_names, problems);
  check_device(steps, problems);
  return out;
}

}  // namespace servoflow::contract
