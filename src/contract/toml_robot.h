// Robot files (robots/*.toml): cameras, state, prompt and actions of one robot, without statistics.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "contract/contract.h"

namespace servoflow::contract {

// The image slots of the published pi0.5 models, in the order of the prefix.
std::vector<std::string> openpi_slots();

// Parses a robot file. `where` (its path) starts every line of the error, which lists all problems. `slots`
// are the model's image slots in order: cameras come out in that order, and slots the file does not mention
// stay masked. The result has openpi's normalization style and no statistics yet.
Result<Contract> parse_robot(std::string_view toml, const std::string& where,
                             const std::vector<std::string>& slots = openpi_slots());

// Names of the robots compiled in, sorted: "aloha", "droid", "libero", "metaworld", …
std::vector<std::string> list_builtin_robots();

// A built-in name, or the path of a robot file. Anything else is an error that lists the built-in names.
Result<Contract> load_robot(const std::string& name_or_path,
                            const std::vector<std::string>& slots = openpi_slots());

}  // namespace servoflow::contract
