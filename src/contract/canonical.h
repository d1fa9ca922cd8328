// A contract as JSON: what `inspect` prints, what a servoflow checkpoint's contract.json holds, and what is
// hashed (all but the labels of actions).
#pragma once

#include <string>

#include "contract/contract.h"
#include "core/json.h"

namespace servoflow::contract {

Json contract_to_json(const Contract& contract);
// Strict inverse: every field present and typed (actions.names and actions.units may be left out), no unknown
// keys, the result validated. `where` starts every error line.
Result<Contract> contract_from_json(const Json& json, const std::string& where);

// Sorted keys, no spaces, UTF-8.
std::string canonical_json(const Contract& contract);
// SHA-256 of the canonical JSON without actions.names and actions.units, 64 hexadecimal digits.
std::string contract_hash(const Contract& contract);

}  // namespace servoflow::contract
