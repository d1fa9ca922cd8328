#include "contract/validate.h"

#include <cmath>
#include <set>

#include "contract/action_labels.h"
#include "contract/normalization.h"
#include "contract/problems.h"
#include "contract/transforms.h"

namespace servoflow::contract {
namespace {

void check_cameras(const Contract& contract, Problems& problems) {
  if (contract.cameras.empty()) problems.add("cameras", "the contract names no camera slot");
  if (contract.cameras.size() > kMaxCameras)
    problems.add("cameras", "more than " + std::to_string(kMaxCameras) + " slots");
  std::set<std::string> names;  // every name an image may come under
  for (const CameraSlot& camera : contract.cameras) {
    const std::string field = "cameras." + camera.slot;
    if (camera.slot.empty()) problems.add("cameras", "a slot has no name");
    if (camera.required && camera.key.empty())
      problems.add(field, "required, but no request key feeds it; give it a key");
    if (!names.insert(camera.slot).second)
      problems.add(field, "the name \"" + camera.slot + "\" is used twice");
    if (camera.key.empty() || camera.key == camera.slot) continue;  // lerobot: a slot is its own request key
    if (!names.insert(camera.key).second)
      problems.add(field, "the name \"" + camera.key + "\" is used twice");
  }
  for (const std::string& name : contract.ignored_images) {
    if (name.empty()) problems.add("ignored_images", "an empty name");
    if (!names.insert(name).second) problems.add("ignored_images", "the name \"" + name + "\" is used twice");
  }
}

void check_statistics(const Normalization& norm, const std::string& field, Problems& problems) {
  const Statistics& s = norm.stats;
  const auto need = [&](const std::vector<double>& values, const char* name) {
    if (values.empty()) problems.add(field + "." + name, "missing; this normalization needs it");
  };
  if (norm.kind == NormKind::kQuantile) {
    need(s.q01, "q01");
    need(s.q99, "q99");
  } else if (norm.kind == NormKind::kMeanStd) {
    need(s.mean, "mean");
    need(s.std, "std");
  }
  std::size_t width = 0;
  for (const auto& [name, values] :
       {std::pair{"mean", &s.mean}, {"std", &s.std}, {"q01", &s.q01}, {"q99", &s.q99}}) {
    if (values->empty()) continue;
    if (width == 0) width = values->size();
    if (values->size() != width) {
      problems.add(field + "." + name, "has " + std::to_string(values->size()) + " numbers, its neighbours " +
                                           std::to_string(width));
    }
    for (const double value : *values) {
      if (!std::isfinite(value)) {
        problems.add(field + "." + name, "holds a number that is not finite");
        break;
      }
    }
  }
  for (std::size_t i = 0; i < s.std.size(); ++i) {
    if (s.std[i] < 0) problems.add(field + ".std[" + std::to_string(i) + "]", "negative");
  }
  for (std::size_t i = 0; i < s.q01.size() && i < s.q99.size(); ++i) {
    if (s.q99[i] < s.q01[i]) problems.add(field + ".q99[" + std::to_string(i) + "]", "smaller than q01");
  }
}

}  // namespace

int state_width(const Contract& contract) {
  int width = 0;
  for (const StatePart& part : contract.state_parts) width += part.width;
  return width;
}

std::vector<std::string> validate(const Contract& contract) {
  Problems problems("contract");
  if (contract.name.empty()) problems.add("name", "empty");
  check_cameras(contract, problems);

  std::set<std::string> keys;
  bool sound_parts = true;
  for (const StatePart& part : contract.state_parts) {
    if (part.key.empty()) problems.add("state.parts", "a part has no key");
    if (!keys.insert(part.key).second)
      problems.add("state.parts", "the key \"" + part.key + "\" is used twice");
    if (part.width < 1 || part.width > kMaxWidth) {
      problems.add("state.parts",
                   "\"" + part.key + "\" must have 1 to " + std::to_string(kMaxWidth) + " numbers");
      sound_parts = false;
    }
  }
  if (contract.state_parts.size() > kMaxWidth) {
    problems.add("state.parts", "too many parts");
    sound_parts = false;
  }
  const int width = sound_parts ? state_width(contract) : 0;
  if (sound_parts && width > 0) {
    check_statistics(contract.state_norm, "state.statistics", problems);
    const int known = statistics_width(contract.state_norm);
    // Longer ones are cut, as openpi does; shorter ones would leave a joint at the wrong scale.
    if (contract.state_norm.kind != NormKind::kIdentity && known > 0 && known < width) {
      problems.add("state.statistics", "cover " + std::to_string(known) + " numbers, the state has " +
                                           std::to_string(width) +
                                           "; the robot and the statistics do not belong together");
    }
    for (const Transform& transform : contract.state_transforms) {
      if (const auto cause = transform_problem(transform, Direction::kState, width, width)) {
        problems.add("state.transforms", *cause);
      }
    }
  }
  if (width == 0 && sound_parts && !contract.state_transforms.empty()) {
    problems.add("state.transforms", "the contract has no state parts");
  }

  if (contract.prompt.max_tokens < 1 || contract.prompt.max_tokens > kMaxTokens) {
    problems.add("prompt.max_tokens", "must lie between 1 and " + std::to_string(kMaxTokens));
  }
  if (contract.prompt.mode == PromptMode::kState && width == 0 && sound_parts) {
    problems.add("prompt.state_in_prompt",
                 "the state is to be in the prompt, but the contract has no state parts");
  }

  const int columns = contract.actions.width;
  if (columns < 0 || columns > kMaxWidth) {
    problems.add("actions.width", "must lie between 0 and " + std::to_string(kMaxWidth));
  } else {
    for (const Transform& transform : contract.actions.transforms) {
      if (const auto cause = transform_problem(transform, Direction::kActions, columns, width)) {
        problems.add("actions.transforms", *cause);
      }
    }
    // openpi passes action dimensions without statistics unchanged; lerobot knows no such dimensions.
    const int known = statistics_width(contract.action_norm);
    if (contract.action_norm.style == NormStyle::kLerobot && known > 0 && columns > known) {
      problems.add("actions.width", "is " + std::to_string(columns) + ", but the statistics cover " +
                                        std::to_string(known) + " numbers");
    }
    check_action_labels(contract.actions, problems);
  }
  check_statistics(contract.action_norm, "actions.statistics", problems);

  std::vector<std::string> lines;
  for (const std::string& line : problems.lines())
    lines.push_back(line.substr(std::string("contract: ").size()));
  return lines;
}

Status validated(const Contract& contract, const std::string& where) {
  Problems problems(where);
  for (const std::string& line : validate(contract)) problems.add("", line);
  return problems.status();
}

}  // namespace servoflow::contract
