#include "contract/lerobot.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <optional>
#include <set>

#include "contract/action_labels.h"
#include "contract/json_fields.h"
#include "contract/lerobot_steps.h"
#include "contract/problems.h"
#include "contract/toml_robot.h"
#include "contract/validate.h"
#include "core/file.h"
#include "core/safetensors.h"
#include "core/status_macros.h"

namespace servoflow::contract {
namespace {

namespace fs = std::filesystem;

constexpr char kConfig[] = "config.json", kPre[] = "policy_preprocessor.json",
               kPost[] = "policy_postprocessor.json";
constexpr char kState[] = "observation.state", kAction[] = "action",
               kEmptyCamera[] = "observation.images.empty_camera_";
constexpr std::size_t kMaxJsonBytes = std::size_t{16} << 20;

struct Features {
  std::vector<std::string> cameras;  // in the model's order
  int state_width = 0, action_width = 0;
  int max_tokens = 200;
  std::map<std::string, std::string> modes;  // "STATE" -> "QUANTILES"
  ColumnNames action_names;
};

// The keys of an object in the file's own order, which decides the order of the cameras; Json itself sorts
// them.
std::vector<std::string> ordered_keys(std::string_view text, const char* object) {
  std::vector<std::string> keys;
  const auto json = nlohmann::ordered_json::parse(text, nullptr, false);
  if (!json.is_object() || !json.contains(object) || !json[object].is_object()) return keys;
  for (const auto& [key, value] : json[object].items()) keys.push_back(key);
  return keys;
}

// {"type": "STATE", "shape": [8]} -> 8
int vector_width(JsonFields& features, const char* name, int fallback) {
  const Json* json = features.get(name, false);
  if (json == nullptr) return fallback;  // lerobot adds the feature with the padded width
  JsonFields feature(*json, features.field(name), features.problems());
  feature.text("type");
  const std::vector<double> shape = feature.numbers("shape");
  if (shape.size() == 1 && shape[0] >= 1 && shape[0] <= kMaxWidth && shape[0] == static_cast<int>(shape[0])) {
    return static_cast<int>(shape[0]);
  }
  if (feature.is_object()) {
    features.problems().add(feature.field("shape"),
                            "must be one number between 1 and " + std::to_string(kMaxWidth));
  }
  return fallback;
}

void refuse_if(JsonFields& config, const char* key, bool unsupported, const std::string& why) {
  if (unsupported) config.problems().add(config.field(key), why);
}

Features read_config(std::string_view text, const Json& json, Problems& problems) {
  Features out;
  JsonFields config(json, kConfig, problems);
  if (!config.is_object()) return out;
  const std::string type = config.text("type");
  if (!type.empty())
    refuse_if(config, "type", type != "pi05", "is \"" + type + "\"; only pi05 policies are supported");
  refuse_if(config, "n_obs_steps", config.integer("n_obs_steps", 1, 1000, 1) != 1,
            "only one observation step is supported");
  refuse_if(config, "use_relative_actions", config.boolean("use_relative_actions", false),
            "relative actions are not supported; use a checkpoint trained on absolute ones");
  for (const char* key : {"use_visual_memory", "use_proprioceptive_memory"}) {
    refuse_if(config, key, config.boolean(key, false), "memory variants of pi05 are not supported");
  }
  out.max_tokens = config.integer("tokenizer_max_length", 1, kMaxTokens, 200);
  const int state_fallback = config.integer("max_state_dim", 1, kMaxWidth, 32);
  const int action_fallback = config.integer("max_action_dim", 1, kMaxWidth, 32);
  if (const std::vector<double> side = config.numbers("image_resolution", false);
      !side.empty() && (side.size() != 2 || side[0] != side[1])) {
    problems.add(config.field("image_resolution"), "must be two equal numbers");
  }

  if (const Json* inputs = config.get("input_features", true)) {
    JsonFields features(*inputs, config.field("input_features"), problems);
    out.state_width = vector_width(features, kState, state_fallback);
    for (const std::string& name : ordered_keys(text, "input_features")) {
      if (name == kState) continue;
      const Json* feature = features.get(name, false);
      if (feature == nullptr) continue;
      JsonFields fields(*feature, features.field(name), problems);
      const std::string kind = fields.text("type");
      if (kind == "VISUAL") {
        out.cameras.push_back(name);
      } else if (fields.is_object() && !kind.empty()) {
        problems.add(features.field(name),
                     "is of type " + kind + "; pi05 reads images and " + kState + " only");
      }
    }
  }
  // lerobot appends the configured empty cameras where the features do not list them already.
  const int empty_cameras = config.integer("empty_cameras", 0, kMaxCameras, 0);
  for (int i = 0; i < empty_cameras; ++i) {
    const std::string name = kEmptyCamera + std::to_string(i);
    if (std::find(out.cameras.begin(), out.cameras.end(), name) == out.cameras.end())
      out.cameras.push_back(name);
  }
  if (const Json* outputs = config.get("output_features", true)) {
    JsonFields features(*outputs, config.field("output_features"), problems);
    out.action_width = vector_width(features, kAction, action_fallback);
    features.refuse_unknown();
    if (const Json* action = features.get(kAction, false); action != nullptr && action->is_object()) {
      JsonFields columns(*action, features.field(kAction), problems);
      read_column_names(columns, "names", out.action_names);
    }
  }
  read_column_names(config, "action_feature_names", out.action_names);
  if (const Json* modes = config.get("normalization_mapping", false)) {
    out.modes = read_norm_map(*modes, config.field("normalization_mapping"), problems);
  }
  return out;
}

Statistics statistics_of(const NormalizerStep& step, const char* feature, const char* file,
                         const StateReader& read_state, Problems& problems) {
  if (step.state_file.empty()) {
    problems.add(std::string(file) + ": " + step.name,
                 std::string("names no state_file, so there are no statistics for ") + feature +
                     "; save the processors with the dataset's statistics");
    return {};
  }
  auto statistics = read_state(step.state_file, feature);
  if (!statistics.ok()) {
    problems.add(std::string(file) + ": " + step.name, statistics.status().message());
    return {};
  }
  return std::move(*statistics);
}

Normalization normalization_of(const NormalizerStep& step, const char* type, const char* feature,
                               const char* file, const Features& features, const StateReader& read_state,
                               Problems& problems) {
  Normalization norm{.kind = NormKind::kIdentity, .style = NormStyle::kLerobot, .stats = {}};
  const auto mode = step.modes.find(type);
  const auto configured = features.modes.find(type);
  const std::string name = mode == step.modes.end() ? "IDENTITY" : mode->second;
  if (configured != features.modes.end() && configured->second != name) {
    problems.add(std::string(file) + ": " + step.name, std::string("normalizes ") + type + " by " + name +
                                                           ", but config.json's normalization_mapping says " +
                                                           configured->second + "; make them agree");
  }
  if (name == "IDENTITY") return norm;
  norm.kind = name == "QUANTILES" ? NormKind::kQuantile : NormKind::kMeanStd;
  Statistics all = statistics_of(step, feature, file, read_state, problems);
  const bool quantile = norm.kind == NormKind::kQuantile;
  const std::pair<const char*, const std::vector<double>*> needed[] = {
      {quantile ? "q01" : "mean", quantile ? &all.q01 : &all.mean},
      {quantile ? "q99" : "std", quantile ? &all.q99 : &all.std}};
  const std::size_t width = std::string(feature) == kState ? features.state_width : features.action_width;
  for (const auto& [statistic, values] : needed) {
    if (step.state_file.empty() || !problems.empty()) break;
    const std::string tensor = std::string(feature) + "." + statistic;
    if (values->empty()) {
      problems.add(step.state_file,
                   "no statistics: the tensor " + tensor + " is missing, and " + name + " needs it");
    } else if (values->size() != width) {
      problems.add(step.state_file, tensor + " has " + std::to_string(values->size()) +
                                        " numbers, config.json's feature has " + std::to_string(width));
    }
  }
  norm.stats = std::move(all);
  return norm;
}

std::vector<CameraSlot> cameras_of(const Features& features,
                                   const std::map<std::string, std::string>& rename_map,
                                   std::vector<std::string>& ignored, Problems& problems) {
  std::vector<CameraSlot> cameras;
  for (const std::string& name : features.cameras) {
    // Any camera may be missing (it is then masked); the placeholders for cameras that do not exist always
    // are.
    cameras.push_back({.slot = name, .key = name.starts_with(kEmptyCamera) ? "" : name, .required = false});
  }
  std::set<std::string> renamed;
  for (const auto& [from, to] : rename_map) {
    if (to == kState) continue;
    const auto camera = std::find_if(cameras.begin(), cameras.end(),
                                     [&to = to](const CameraSlot& c) { return c.slot == to; });
    if (camera == cameras.end()) {
      ignored.push_back(from);  // lerobot carries it along under a name that the policy never reads
    } else if (!renamed.insert(to).second) {
      problems.add(std::string(kPre) + ": rename_map", "two names become " + to);
    } else {
      camera->key = from;
    }
  }
  return cameras;
}

// The one list of names, one for each column, that all places agree on which have such a list; empty where
// none has, or where they differ: names stop no policy. Others are usual (lerobot writes list(names), of a
// dict its keys: ["motors"]) and name no column.
std::vector<std::string> action_names_of(const Features& features, const PreprocessorSteps& pre,
                                         const NormalizerStep& post) {
  const std::vector<std::string>* first = nullptr;
  for (const auto* place : {&features.action_names, &pre.normalizer.action_names, &post.action_names}) {
    for (const std::vector<std::string>& names : *place) {
      Problems unfit("");
      check_labels(names, features.action_width, true, "", unfit);
      if (!unfit.empty()) continue;
      if (first != nullptr && names != *first) return {};
      first = &names;
    }
  }
  return first == nullptr ? std::vector<std::string>() : *first;
}

Result<Statistics> read_state_tensors(const std::string& directory, const std::string& state_file,
                                      const std::string& feature) {
  const fs::path path(state_file);
  if (path != path.filename() || state_file == "..") {
    return Status::invalid("state_file \"" + state_file + "\" must be a file name in the same directory");
  }
  SF_ASSIGN_OR_RETURN(const SafetensorsFile file,
                      SafetensorsFile::open((fs::path(directory) / path).string()));
  Statistics out;
  for (const auto& [name, values] :
       {std::pair{".mean", &out.mean}, {".std", &out.std}, {".q01", &out.q01}, {".q99", &out.q99}}) {
    const SafeTensor* tensor = file.find(feature + name);
    if (tensor == nullptr) continue;
    if (tensor->shape.rank() != 1 || tensor->shape[0] > kMaxWidth) {
      return Status::invalid(file.path() + ": " + feature + name + ": must be a vector of at most " +
                             std::to_string(kMaxWidth) + " numbers, is " + tensor->shape.to_string());
    }
    SF_ASSIGN_OR_RETURN(*values, to_doubles(*tensor));
  }
  return out;
}

}  // namespace

Result<Contract> contract_from_lerobot(std::string_view config_text, const Json& preprocessor,
                                       const Json& postprocessor, const StateReader& read_state,
                                       const std::string& where) {
  SF_ASSIGN_OR_RETURN(const Json config, parse_json(config_text, where + "/" + kConfig));
  Problems problems(where);
  const Features features = read_config(config_text, config, problems);
  const PreprocessorSteps pre = read_preprocessor(preprocessor, kPre, problems);
  const NormalizerStep post = read_postprocessor(postprocessor, kPost, problems);
  SF_RETURN_IF_ERROR(problems.status());

  Contract contract;
  contract.name = "lerobot";
  contract.resize = Resize::kLerobotFloat;
  contract.present_cameras_first = true;
  contract.cameras = cameras_of(features, pre.rename_map, contract.ignored_images, problems);
  std::string state_key = kState;
  for (const auto& [from, to] : pre.rename_map) {
    if (to == kState) state_key = from;
  }
  contract.state_parts = {{state_key, features.state_width}};
  contract.state_norm =
      normalization_of(pre.normalizer, "STATE", kState, kPre, features, read_state, problems);
  contract.action_norm = normalization_of(post, "ACTION", kAction, kPost, features, read_state, problems);
  contract.prompt = {.key = pre.task_key,
                     .mode = PromptMode::kState,
                     .max_tokens = pre.max_tokens,
                     .default_prompt = std::nullopt,
                     .special_literals = true};
  if (pre.max_tokens != features.max_tokens) {
    problems.add(std::string(kPre) + ": tokenizer_processor.max_length",
                 "is " + std::to_string(pre.max_tokens) + ", config.json's tokenizer_max_length is " +
                     std::to_string(features.max_tokens) + "; make them agree");
  }
  contract.actions.width = features.action_width;
  contract.actions.names = action_names_of(features, pre, post);
  if (problems.empty()) {
    for (const std::string& line : validate(contract)) problems.add("", line);
  }
  SF_RETURN_IF_ERROR(problems.status());
  return contract;
}

Result<Contract> load_lerobot_contract(const std::string& directory) {
  const fs::path base(directory);
  for (const char* name : {kConfig, kPre, kPost}) {
    std::error_code ignored;
    if (fs::exists(base / name, ignored)) continue;
    return Status::invalid(directory + ": " + name + ": missing; a lerobot checkpoint needs it" +
                           (name == kConfig
                                ? ""
                                : " (statistics and prompt format are looked for there). Copy the processor "
                                  "files that were saved with the checkpoint here"));
  }
  SF_ASSIGN_OR_RETURN(const std::string config, read_text_file((base / kConfig).string(), kMaxJsonBytes));
  SF_ASSIGN_OR_RETURN(const Json pre, read_json_file((base / kPre).string(), kMaxJsonBytes));
  SF_ASSIGN_OR_RETURN(const Json post, read_json_file((base / kPost).string(), kMaxJsonBytes));
  const StateReader reader = [&](const std::string& state_file, const std::string& feature) {
    return read_state_tensors(directory, state_file, feature);
  };
  return contract_from_lerobot(config, pre, post, reader, directory);
}

Result<Contract> combine_robot_with_lerobot(const std::string& robot, Contract lerobot) {
  std::vector<std::string> slots;
  for (const CameraSlot& camera : lerobot.cameras) slots.push_back(camera.slot);
  auto loaded = load_robot(robot, slots);
  if (!loaded.ok()) {
    return loaded.status().with_context(
        "a robot file for a lerobot checkpoint names the checkpoint's own camera features as "
        "slots (\"" +
        join(slots, "none") + "\"); leave --robot out to use the checkpoint's own contract");
  }
  Contract contract = std::move(*loaded);
  const std::string where = "robot " + contract.name;
  if (contract.prompt.mode != lerobot.prompt.mode) {
    return Status::invalid(
        where +
        ": prompt.state_in_prompt: must be true; this lerobot checkpoint has the state in its prompt");
  }
  if (state_width(contract) != state_width(lerobot)) {
    return Status::invalid(where + ": state.parts: have " + std::to_string(state_width(contract)) +
                           " numbers, the checkpoint's observation.state has " +
                           std::to_string(state_width(lerobot)));
  }
  contract.resize = lerobot.resize;
  contract.present_cameras_first = lerobot.present_cameras_first;
  contract.state_norm = std::move(lerobot.state_norm);
  contract.action_norm = std::move(lerobot.action_norm);
  contract.prompt.max_tokens = lerobot.prompt.max_tokens;
  contract.prompt.special_literals = lerobot.prompt.special_literals;
  if (contract.actions.width == 0) contract.actions.width = lerobot.actions.width;
  if (contract.actions.names.empty() && contract.actions.width == lerobot.actions.width)
    contract.actions.names = std::move(lerobot.actions.names);
  SF_RETURN_IF_ERROR(validated(contract, where));
  return contract;
}

}  // namespace servoflow::contract
