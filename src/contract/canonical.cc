#include "contract/canonical.h"

#include <openssl/sha.h>

#include <cmath>
#include <utility>

#include "contract/action_labels.h"
#include "contract/json_fields.h"
#include "contract/problems.h"
#include "contract/validate.h"
#include "core/status_macros.h"

namespace servoflow::contract {
namespace {

// Enumerations and their names in JSON.
template <typename E>
using Names = std::vector<std::pair<const char*, E>>;
const Names<Resize> kResize = {{"pillow", Resize::kPillow},
                               {"openpi_float", Resize::kOpenpiFloat},
                               {"lerobot_float", Resize::kLerobotFloat}};
const Names<NormKind> kKind = {
    {"identity", NormKind::kIdentity}, {"quantile", NormKind::kQuantile}, {"mean_std", NormKind::kMeanStd}};
const Names<NormStyle> kStyle = {{"openpi", NormStyle::kOpenpi}, {"lerobot", NormStyle::kLerobot}};
const Names<PromptMode> kMode = {{"plain", PromptMode::kPlain}, {"state", PromptMode::kState}};

template <typename E>
std::string name_of(const Names<E>& names, E value) {
  for (const auto& [name, known] : names) {
    if (known == value) return name;
  }
  return "";
}

template <typename E>
E read_name(JsonFields& fields, const std::string& key, const Names<E>& names) {
  const std::string text = fields.text(key);
  std::vector<std::string> choices;
  for (const auto& [name, value] : names) {
    if (text == name) return value;
    choices.emplace_back(name);
  }
  if (!text.empty())
    fields.problems().add(fields.field(key), "unknown value \"" + text + "\"; known: " + join(choices));
  return names[0].second;
}

// Dimensions read better, and hash the same everywhere, as integers.
Json number(double value) {
  if (value == std::floor(value) && std::abs(value) < 9e15) return static_cast<std::int64_t>(value);
  return value;
}

Json to_json(const std::vector<Transform>& transforms) {
  Json list = Json::array();
  for (const Transform& transform : transforms) {
    Json values = Json::array();
    for (const double value : transform.values) values.push_back(number(value));
    list.push_back({{"name", transform.name}, {"values", std::move(values)}, {"variant", transform.variant}});
  }
  return list;
}

Json to_json(const Normalization& norm) {
  const Statistics& s = norm.stats;
  return {{"kind", name_of(kKind, norm.kind)},
          {"style", name_of(kStyle, norm.style)},
          {"statistics", {{"mean", s.mean}, {"std", s.std}, {"q01", s.q01}, {"q99", s.q99}}}};
}

std::vector<Transform> read_transforms(JsonFields& fields) {
  std::vector<Transform> transforms;
  for (const Json* item : fields.elements("transforms")) {
    JsonFields entry(*item, fields.field("transforms") + "[" + std::to_string(transforms.size()) + "]",
                     fields.problems());
    Transform transform;
    transform.name = entry.text("name");
    transform.values = entry.numbers("values");
    transform.variant = entry.text("variant");
    entry.refuse_unknown();
    transforms.push_back(std::move(transform));
  }
  return transforms;
}

Normalization read_normalization(JsonFields& parent) {
  Normalization norm;
  const Json* json = parent.get("normalization", true);
  if (json == nullptr) return norm;
  JsonFields fields(*json, parent.field("normalization"), parent.problems());
  if (!fields.is_object()) return norm;
  norm.kind = read_name(fields, "kind", kKind);
  norm.style = read_name(fields, "style", kStyle);
  if (const Json* statistics = fields.get("statistics", true)) {
    JsonFields s(*statistics, fields.field("statistics"), parent.problems());
    norm.stats = {s.numbers("mean"), s.numbers("std"), s.numbers("q01"), s.numbers("q99")};
    s.refuse_unknown();
  }
  fields.refuse_unknown();
  return norm;
}

}  // namespace

Json contract_to_json(const Contract& contract) {
  Json cameras = Json::array(), parts = Json::array();
  for (const CameraSlot& camera : contract.cameras) {
    cameras.push_back({{"slot", camera.slot}, {"key", camera.key}, {"required", camera.required}});
  }
  for (const StatePart& part : contract.state_parts)
    parts.push_back({{"key", part.key}, {"width", part.width}});
  const Prompt& prompt = contract.prompt;
  Json actions = {{"width", contract.actions.width},
                  {"transforms", to_json(contract.actions.transforms)},
                  {"normalization", to_json(contract.action_norm)}};
  if (!contract.actions.names.empty()) actions["names"] = contract.actions.names;
  if (!contract.actions.units.empty()) actions["units"] = contract.actions.units;
  return {{"name", contract.name},
          {"asset", contract.asset},
          {"resize", name_of(kResize, contract.resize)},
          {"cameras", std::move(cameras)},
          {"ignored_images", contract.ignored_images},
          {"present_cameras_first", contract.present_cameras_first},
          {"state",
           {{"parts", std::move(parts)},
            {"transforms", to_json(contract.state_transforms)},
            {"normalization", to_json(contract.state_norm)}}},
          {"prompt",
           {{"key", prompt.key},
            {"mode", name_of(kMode, prompt.mode)},
            {"max_tokens", prompt.max_tokens},
            {"default", prompt.default_prompt ? Json(*prompt.default_prompt) : Json()},
            {"special_literals", prompt.special_literals}}},
          {"actions", std::move(actions)}};
}

Result<Contract> contract_from_json(const Json& json, const std::string& where) {
  Problems problems(where);
  Contract contract;
  JsonFields root(json, "", problems);
  contract.name = root.text("name");
  contract.asset = root.text("asset");
  contract.resize = read_name(root, "resize", kResize);
  contract.ignored_images = root.texts("ignored_images");
  contract.present_cameras_first = root.boolean("present_cameras_first");
  for (const Json* item : root.elements("cameras")) {
    JsonFields camera(*item, "cameras[" + std::to_string(contract.cameras.size()) + "]", problems);
    contract.cameras.push_back({camera.text("slot"), camera.text("key"), camera.boolean("required")});
    camera.refuse_unknown();
  }
  if (const Json* json_state = root.get("state", true)) {
    JsonFields state(*json_state, "state", problems);
    for (const Json* item : state.elements("parts")) {
      JsonFields part(*item, "state.parts[" + std::to_string(contract.state_parts.size()) + "]", problems);
      contract.state_parts.push_back({part.text("key"), part.integer("width", 1, kMaxWidth)});
      part.refuse_unknown();
    }
    contract.state_transforms = read_transforms(state);
    contract.state_norm = read_normalization(state);
    state.refuse_unknown();
  }
  if (const Json* json_prompt = root.get("prompt", true)) {
    JsonFields prompt(*json_prompt, "prompt", problems);
    contract.prompt.key = prompt.text("key");
    contract.prompt.mode = read_name(prompt, "mode", kMode);
    contract.prompt.max_tokens = prompt.integer("max_tokens", 1, kMaxTokens);
    const Json* text = prompt.get("default", true);
    if (text != nullptr && !text->is_null()) contract.prompt.default_prompt = prompt.text("default");
    contract.prompt.special_literals = prompt.boolean("special_literals");
    prompt.refuse_unknown();
  }
  if (const Json* json_actions = root.get("actions", true)) {
    JsonFields actions(*json_actions, "actions", problems);
    contract.actions.width = actions.integer("width", 0, kMaxWidth);
    contract.actions.transforms = read_transforms(actions);
    contract.action_norm = read_normalization(actions);
    read_action_labels(actions, contract.actions);
    actions.refuse_unknown();
  }
  root.refuse_unknown();
  SF_RETURN_IF_ERROR(problems.status());
  SF_RETURN_IF_ERROR(validated(contract, where));
  return contract;
}

std::string canonical_json(const Contract& contract) {
  // Json objects keep their keys sorted. Text that is not UTF-8 cannot come from a file; it must not throw
  // either.
  return contract_to_json(contract).dump(-1, ' ', false, Json::error_handler_t::replace);
}

std::string contract_hash(const Contract& contract) {
  // A robot refuses a policy of another hash. Names and units of actions change nothing that is computed, so
  // that adding or mending them must not stop a robot.
  Contract computed = contract;
  computed.actions.names.clear();
  computed.actions.units.clear();
  const std::string text = canonical_json(computed);
  unsigned char digest[SHA256_DIGEST_LENGTH];
  SHA256(reinterpret_cast<const unsigned char*>(text.data()), text.size(), digest);
  std::string hex;
  for (const unsigned char byte : digest) {
    hex += "0123456789abcdef"[byte >> 4];
    hex += "0123456789abcdef"[byte & 15];
  }
  return hex;
}

}  // namespace servoflow::contract
