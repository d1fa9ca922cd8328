#include "contract/toml_robot.h"

// toml++ asserts on some malformed headers ("[%") that it then reports as errors anyway; with NDEBUG it would
// even assume that they do not occur. Neither may happen with a user's file.
#ifdef NDEBUG
#undef NDEBUG
#endif
#define TOML_ASSERT(expression) static_cast<void>(0)
#define TOML_EXCEPTIONS 0
#define TOML_HEADER_ONLY 1
#define TOML_ENABLE_FORMATTERS 0
#include <toml++/toml.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <sstream>

#include "contract/builtin_robots.h"
#include "contract/json_fields.h"
#include "contract/problems.h"
#include "contract/transforms.h"
#include "contract/validate.h"
#include "core/file.h"
#include "core/status_macros.h"

namespace servoflow::contract {
namespace {

constexpr std::size_t kMaxFileBytes = std::size_t{1} << 20;

// The code point that starts at text[i] and its length in bytes; length 0 if this is not UTF-8.
struct CodePoint {
  char32_t value = 0;
  std::size_t length = 0;
};

CodePoint code_point(std::string_view text, std::size_t i) {
  const auto lead = static_cast<unsigned char>(text[i]);
  const std::size_t length = lead < 0xC2 ? 0 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF5 ? 4 : 0;
  if (length == 0 || i + length > text.size()) return {};
  char32_t value = lead & (0x7Fu >> length);
  for (std::size_t k = 1; k < length; ++k) {
    const auto next = static_cast<unsigned char>(text[i + k]);
    if ((next & 0xC0) != 0x80) return {};
    value = value << 6 | (next & 0x3Fu);
  }
  constexpr std::array<char32_t, 5> kSmallest = {0, 0, 0x80, 0x800, 0x10000};
  const bool is_surrogate = value >= 0xD800 && value < 0xE000;
  if (value < kSmallest[length] || is_surrogate || value > 0x10FFFF) return {};
  return {value, length};
}

// The same TOML in ASCII: characters beyond it become escapes in strings and vanish from comments. toml++ 3.3
// cannot be given any other character: its search for white space runs into undefined behaviour on some of
// them, also while it words an error. `problem` is empty or says what has no ASCII form, with its line.
std::string to_ascii(std::string_view toml, std::string& problem) {
  std::string ascii;
  ascii.reserve(toml.size());
  int line = 1;
  char quote = 0;  // of the string we are in, '#' in a comment
  const auto refuse = [&](const char* why) {
    problem = "line " + std::to_string(line) + ": " + why;
    return std::string();
  };
  for (std::size_t i = 0; i < toml.size(); ++i) {
    const char c = toml[i];
    if (static_cast<unsigned char>(c) < 0x80) {
      ascii += c;
      if (c == '\n') {
        ++line;
        quote = 0;  // a string that is cut short is the parser's to refuse
      } else if (quote == 0 && (c == '"' || c == '\'' || c == '#')) {
        if (c != '#' && toml.substr(i, 3) == std::string(3, c)) {
          return refuse("multi-line strings have no place in a robot file");
        }
        quote = c;
      } else if (quote == '"' && c == '\\' && i + 1 < toml.size() && toml[i + 1] != '\n') {
        if (static_cast<unsigned char>(toml[i + 1]) >= 0x80) return refuse("not valid TOML: unknown escape");
        ascii += toml[++i];
      } else if (quote == c && c != '#') {
        quote = 0;
      }
      continue;
    }
    if (quote == '#') continue;
    if (quote == 0) return refuse("not valid TOML: only ASCII may stand outside of strings and comments");
    if (quote == '\'') return refuse("characters beyond ASCII need a string in double quotes");
    const CodePoint point = code_point(toml, i);
    if (point.length == 0) return refuse("not valid TOML: a string is not UTF-8");
    std::array<char, 11> escape{};
    std::snprintf(escape.data(), escape.size(), "\\U%08X", static_cast<unsigned>(point.value));
    ascii += escape.data();
    i += point.length - 1;
  }
  return ascii;
}

// TOML as JSON, so that one strict reader serves both. Dates and non-finite numbers have no place in a robot
// file.
Json to_json(const toml::node& node, const std::string& path, Problems& problems) {
  if (const toml::table* table = node.as_table()) {
    Json object = Json::object();
    for (const auto& [key, value] : *table) {
      const std::string name(key.str());
      object[name] = to_json(value, path.empty() ? name : path + "." + name, problems);
    }
    return object;
  }
  if (const toml::array* array = node.as_array()) {
    Json list = Json::array();
    for (const toml::node& value : *array) {
      list.push_back(to_json(value, path + "[" + std::to_string(list.size()) + "]", problems));
    }
    return list;
  }
  if (const auto* text = node.as_string()) return text->get();
  if (const auto* integer = node.as_integer()) return integer->get();
  if (const auto* flag = node.as_boolean()) return flag->get();
  if (const auto* number = node.as_floating_point(); number != nullptr && std::isfinite(number->get())) {
    return number->get();
  }
  problems.add(path,
               node.is_floating_point() ? "must be a finite number" : "dates and times have no meaning here");
  return nullptr;
}

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
  std::string problem;
  const std::string ascii = to_ascii(toml, problem);
  if (!problem.empty()) return Status::invalid(where + ": " + problem);
  const toml::parse_result parsed = toml::parse(ascii, where);
  if (!parsed) {
    const toml::parse_error& error = parsed.error();
    return Status::invalid(where + ": line " + std::to_string(error.source().begin.line) +
                           ": not valid TOML: " + std::string(error.description()));
  }
  Problems problems(where);
  const Json json = to_json(parsed.table(), "", problems);
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
