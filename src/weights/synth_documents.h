// The JSON that goes beside the weights of a synthetic checkpoint, written as the published layouts write
// theirs.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "weights/write_synthetic.h"

namespace servoflow::weights {

// Keys keep their order, as lerobot needs for its features.
using OrderedJson = nlohmann::ordered_json;

// Widths and names as in options, with defaults filled in.
OrderedJson openpi_config(const SynthOptions& options);
OrderedJson openpi_norm_stats(const SynthOptions& options);
OrderedJson lerobot_config(const SynthOptions& options);
OrderedJson lerobot_preprocessor(const SynthOptions& options, const std::string& state_file);
OrderedJson lerobot_postprocessor(const SynthOptions& options, const std::string& state_file);

}  // namespace servoflow::weights
