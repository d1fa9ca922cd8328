#include "contract/toml_robot.h"

#include <algorithm>

#include "contract/action_labels.h"
#include "contract/builtin_robots.h"
#include "contract/json_fields.h"
#include "contract/problems.h"
#include "contract/toml_json.h"
#include "contract/transforms.h"
#include "contract/validate.h"
#include "core/file.h"
#include "core/status_macros.h"

namespace servoflow::contract {
namespace {

constexpr std::size_t kMaxFileBytes = std::size_t{1} << 20;

// { delta = [0, 1] }, { joint_flip = [1, -1] }, { gripper = "aloha", dimensions = [6, 13] }
Transform read_transform(const Json& json, const std::string& path, Problems& problems) {
  JsonFields fields(json, path, problems);
  Transform transform;
  if (!fields.is_object()) return transform;
  const auto names = transform_names();
  std::vector<std::string> found;
  for (const std::string& name : names) {
    if (json.contains(name)) found.push_back(name);
  }
  if (found.size() != 1) {
    problems.add(path, (found.empty() ? "names no transform" : "names more than one transform") +
                           std::string("; each entry has exactly one of: ") + join(names));
    return transform;
  }
  transform.name = found[0];
  if (transform.name == "gripper") {
    transform.variant = fields.text("gripper");
    transform.values = fields.numbers("dimensions", false);
    if (!json.contains("dimensions")) transform.values = gripper_dimensions(transform.variant);
  } else {
    transform.values = fields.numbers(transform.name);
  }
  fields.refuse_unknown();
  return transform;
}

std::vector<Transform> read_transforms(JsonFields& fields) {
  std::vector<Transform> transforms;
  for (const Json* item : fields.elements("transforms", false)) {
    const std::string path = fields.field("transforms") + "[" + std::to_string(transforms.size()) + "]";
    transforms.push_back(read_transform(*item, path, fields.problems()));
  }
  return transforms;
}

std::vector<CameraSlot> read_cameras(const Json& json, const std::vector<std::string>& slots,
                                     Problems& problems) {
  std::vector<CameraSlot> cameras;
  JsonFields fields(json, "cameras", problems);
  for (const std::string& slot : slots) {
    CameraSlot camera{.slot = slot};
    if (const Json* entry = fields.get(slot, false)) {
      JsonFields camera_fields(*entry, fields.field(slot), problems);
      if (camera_fields.is_object()) {
        camera.key = camera_fields.text("key");
        camera.required = camera_fields.boolean("required", true);
        camera_fields.refuse_unknown();
      }
    }
    cameras.push_back(std::move(camera));
  }
  fields.refuse_unknown();  // the message lists the model's slots
  return cameras;
}

Contract read_robot(const Json& json, const std::vector<std::string>& slots, Problems& problems) {
  static const Json kEmpty = Json::object();
  Contract contract;
  JsonFields root(json, "", problems);
  const auto section = [&](const char* name) -> const Json& {
    const Json* value = root.get(name, true);
    return value != nullptr ? *value : kEmpty;
  };
  contract.name = root.text("name");
  contract.asset = root.text("asset", "");
  contract.ignored_images = root.texts("ignored_images", false);
  contract.cameras = read_cameras(section("cameras"), slots, problems);

  if (const Json* json_state = root.get("state", true)) {
    JsonFields state(*json_state, "state", problems);
    for (const Json* item : state.elements("parts")) {
      JsonFields part(*item, "state.parts[" + std::to_string(contract.state_parts.size()) + "]", problems);
      contract.state_parts.push_back({part.text("key"), part.integer("width", 1, kMaxWidth)});
      part.refuse_unknown();
    }
    contract.state_transforms = read_transforms(state);
    state.refuse_unknown();
  }
  if (const Json* json_prompt = root.get("prompt", true)) {
    JsonFields prompt(*json_prompt, "prompt", problems);
    contract.prompt.key = prompt.text("key", "prompt");
    contract.prompt.mode = prompt.boolean("state_in_prompt", true) ? PromptMode::kState : PromptMode::kPlain;
    contract.prompt.max_tokens = prompt.integer("max_tokens", 1, kMaxTokens, 200);
    if (json_prompt->contains("default")) contract.prompt.default_prompt = prompt.text("default");
    prompt.refuse_unknown();
  }
  if (const Json* json_actions = root.get("actions", true)) {
    JsonFields actions(*json_actions, "actions", problems);
    contract.actions.width = actions.integer("width", 0, kMaxWidth);
    contract.actions.transforms = read_transforms(actions);
    read_action_labels(actions, contract.actions);
    actions.refuse_unknown();
  }
  root.refuse_unknown();
  return contract;
}

// A robot file has no statistics of its own, so everything but them is judged here.
void check_without_statistics(Contract contract, Problems& problems) {
  contract.state_norm.kind = contract.action_norm.kind = NormKind::kIdentity;
  for (const std::string& line : validate(contract)) problems.add("", line);
}

}  // namespace

std::vector<std::string> openpi_slots() { return {"base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"}; }

Result<Contract> parse_robot(std::string_view toml, const std::string& where,
                             const std::vector<std::string>& slots) {
  if (toml.size() > kMaxFileBytes) return Status::invalid(where + ": larger than 1 MiB; not a robot file");
  Problems problems(where);
  SF_ASSIGN_OR_RETURN(const Json json, parse_toml(toml, where, problems));
  Contract contract = read_robot(json, slots, problems);
  // Contradictions between half-read fields would only repeat what was said already.
  if (problems.empty()) check_without_statistics(contract, problems);
  SF_RETURN_IF_ERROR(problems.status());
  return contract;
}

std::vector<std::string> list_builtin_robots() {
  std::vector<std::string> names;
  for (const BuiltinRobot& robot : builtin_robots()) names.emplace_back(robot.name);
  std::sort(names.begin(), names.end());
  return names;
}

Result<Contract> load_robot(const std::string& name_or_path, const std::vector<std::string>& slots) {
  for (const BuiltinRobot& robot : builtin_robots()) {
    if (robot.name == name_or_path) return parse_robot(robot.toml, "robot " + name_or_path, slots);
  }
  const bool is_path = name_or_path.find('/') != std::string::npos || name_or_path.ends_with(".toml");
  if (!is_path) {
    return Status::invalid("robot: unknown name \"" + name_or_path +
                           "\"; built in: " + join(list_builtin_robots()) +
                           "; or pass the path of a robot file (…/my_robot.toml)");
  }
  SF_ASSIGN_OR_RETURN(const std::string text, read_text_file(name_or_path, kMaxFileBytes));
  return parse_robot(text, name_or_path, slots);
}

}  // namespace servoflow::contract
