// The contract inside a lerobot pi05 directory: config.json's features, the two processor pipelines and their
// statistics.
//
// Supported is what lerobot saves since it stopped padding the state before binning it (commit f0d2b37): the
// processors of older checkpoints look the same, so such a checkpoint runs here with the newer, unpadded
// prompt.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "contract/contract.h"

namespace servoflow::contract {

// Reads the statistics `feature`.{mean,std,q01,q99} out of a processor's state file (a plain file name).
// Absent ones are empty.
using StateReader =
    std::function<Result<Statistics>(const std::string& state_file, const std::string& feature)>;

// From the three files' contents; `where` (the directory) starts every line of the error, which lists all
// problems. Refused by name: unknown or missing processor steps, relative actions, memory variants, other
// normalization modes.
Result<Contract> contract_from_lerobot(std::string_view config_text, const Json& preprocessor,
                                       const Json& postprocessor, const StateReader& read_state,
                                       const std::string& where);

// From a directory.
Result<Contract> load_lerobot_contract(const std::string& directory);

// A robot file on a lerobot checkpoint: its request keys, default prompt and action transforms, with the
// checkpoint's own features, statistics and arithmetic. The robot's camera slots must be the checkpoint's
// features; nothing is guessed.
Result<Contract> combine_robot_with_lerobot(const std::string& robot, Contract lerobot);

}  // namespace servoflow::contract
