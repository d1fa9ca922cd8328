// What a policy runs with when no robot is named: sizes by name, and a contract that changes nothing.
#pragma once

#include <string>

#include "contract/contract.h"
#include "weights/architecture.h"

namespace servoflow::policy {

// weights::named_architecture with `horizon` rows of actions, checked.
Result<weights::Architecture> synthetic_architecture(const std::string& model, int horizon);
// Three cameras by slot name, no state, token ids or a plain prompt, actions as the flow left them.
contract::Contract neutral_contract(const weights::Architecture& architecture);

}  // namespace servoflow::policy
