// config.json of a checkpoint directory: the sizes of the network, from an `architecture` block or from
// variant names.
#pragma once

#include <string>
#include <vector>

#include "core/json.h"
#include "weights/architecture.h"

namespace servoflow::weights {

enum class Layout {
  kOpenpi,     // openpi's torch directory: model.safetensors, config.json, assets/<id>/norm_stats.json
  kLerobot,    // lerobot's: the same tree with names prefixed "model.", processor files
  kServoflow,  // openpi's tensor names with a contract.json
};
// "openpi", "lerobot", "servoflow".
std::string layout_name(Layout layout);

struct ConfigReading {
  Architecture architecture;
  std::string sizes_from;           // "architecture block" or the variants' names
  std::vector<std::string> unused;  // keys that say nothing about the network
  std::vector<std::string>
      problems;  // "FILE: field: cause"; the architecture is complete and sound if there are none
};

// `file` is the name problems start with.
ConfigReading read_config(const Json& config, Layout layout, const std::string& file);

// Why this checkpoint is of a kind servoflow does not run (pi0, pi0-FAST, a memory variant, another policy),
// from what config.json says; empty if it does not say so.
std::string refused_by_config(const Json& config, const std::string& file);

}  // namespace servoflow::weights
