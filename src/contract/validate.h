// Contradictions inside a contract: things each file may say, but not together.
#pragma once

#include <string>
#include <vector>

#include "contract/contract.h"

namespace servoflow::contract {

// Limits that no published robot comes near; they keep hostile files from asking for gigabytes.
inline constexpr int kMaxWidth = 4096, kMaxTokens = 65536, kMaxCameras = 64;

// Numbers in all state parts together.
int state_width(const Contract& contract);

// "field: cause" for each contradiction; empty for a usable contract.
std::vector<std::string> validate(const Contract& contract);
// The same as one error; `where` (a path or the robot's name) starts every line.
Status validated(const Contract& contract, const std::string& where);

}  // namespace servoflow::contract
