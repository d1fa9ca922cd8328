// Everything there is to know about a checkpoint before running it: what it is, what it holds, what is wrong
// with it.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "contract/contract.h"
#include "core/json.h"
#include "servoflow/policy.h"
#include "toolkit/memory_plan.h"
#include "weights/checkpoint.h"
#include "weights/scan.h"

namespace servoflow::toolkit {

struct InspectOptions {
  std::string robot, assets, tokenizer;
  bool scan = false;  // read all weights and look for NaN and infinity
  ProgressFunction scanning;
};

struct InspectReport {
  weights::Inspection weights;
  std::optional<contract::Contract> contract;
  std::string contract_hash;
  std::vector<std::string> assets;  // statistics folders found (openpi layout)
  std::string tokenizer;            // the file that would be used; empty if there is none
  std::vector<MemoryPlan> memory;
  std::optional<std::vector<weights::NonFinite>> scan;  // absent: not asked for
  std::vector<std::string> notes;                       // missing, but not every command needs it
  std::vector<std::string> problems;                    // must be mended before the checkpoint runs
};

InspectReport inspect(const std::string& checkpoint, const InspectOptions& options);

// Invalid input when there are problems.
Status inspect_outcome(const InspectReport& report);

std::string inspect_text(const InspectReport& report);
Json inspect_to_json(const InspectReport& report);

}  // namespace servoflow::toolkit
