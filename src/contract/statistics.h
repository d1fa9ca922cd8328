// norm_stats.json: the statistics openpi stores beside a checkpoint, under assets/<asset id>/.
#pragma once

#include <string>
#include <vector>

#include "contract/contract.h"

namespace servoflow::contract {

struct OpenpiStatistics {
  std::string asset, path;  // which folder under assets/, and the file itself
  Statistics state, actions;
};

// Reads the JSON {"norm_stats": {"state": {mean, std, q01, q99}, "actions": {…}}}. Arrays of one feature have
// one length and finite numbers; q01 and q99 may be null or absent (pi0). Unknown keys are errors. `where`
// starts every line.
Result<OpenpiStatistics> parse_openpi_statistics(const Json& json, const std::string& where);

// The asset ids under `checkpoint_dir`/assets that hold a norm_stats.json, sorted; nested ones as "a/b".
std::vector<std::string> list_assets(const std::string& checkpoint_dir);

// Chooses: `option` (what the user asked for) if not empty, else `robot_asset` if it is there, else the only
// one there. The error lists those found.
Result<std::string> choose_asset(const std::string& checkpoint_dir, const std::string& option,
                                 const std::string& robot_asset = "");

// choose_asset, then the file.
Result<OpenpiStatistics> load_openpi_statistics(const std::string& checkpoint_dir, const std::string& option,
                                                const std::string& robot_asset = "");

}  // namespace servoflow::contract
