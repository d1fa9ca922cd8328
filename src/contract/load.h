// One robot's contract for one checkpoint directory.
#pragma once

#include <string>

#include "contract/contract.h"
#include "contract/statistics.h"

namespace servoflow::contract {

struct ContractRequest {
  std::string robot;  // built-in name, robot file (.toml) or whole contract (.json); empty: the checkpoint's
                      // own contract
  std::string
      assets;  // statistics folder under assets/ (openpi layout); empty: the robot's, else the only one there
  bool lerobot_layout = false;
};

// openpi layout: the robot's file and the directory's norm_stats.json; without a robot, the directory's
// contract.json. lerobot layout: the directory's processors, with the robot's request keys when one is given.
// The result is validated. The error lists every problem, or the built-in robots when the choice is missing.
Result<Contract> load_contract(const std::string& checkpoint_dir, const ContractRequest& request);

}  // namespace servoflow::contract
