#include "policy/neutral_contract.h"

#include "core/status_macros.h"

namespace servoflow::policy {

Result<weights::Architecture> synthetic_architecture(const std::string& model, int horizon) {
  SF_ASSIGN_OR_RETURN(weights::Architecture a, weights::named_architecture(model));
  a.horizon = horizon;
  if (const std::vector<std::string> problems = weights::check_architecture(a); !problems.empty()) {
    std::string list;
    for (const std::string& problem : problems) list += (list.empty() ? "" : "; ") + problem;
    return Status::invalid(model + ": architecture: " + list);
  }
  return a;
}

contract::Contract neutral_contract(const weights::Architecture& architecture) {
  contract::Contract c;
  c.name = "none";
  for (const char* slot : {"base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"})
    c.cameras.push_back({slot, slot, false});
  c.state_norm.kind = contract::NormKind::kIdentity;
  c.action_norm.kind = contract::NormKind::kIdentity;
  c.prompt.mode = contract::PromptMode::kPlain;
  c.prompt.max_tokens = architecture.max_tokens;
  return c;
}

}  // namespace servoflow::policy
