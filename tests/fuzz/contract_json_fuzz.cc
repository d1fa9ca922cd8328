// A contract.json is either refused or comes back the same from its canonical form; norm_stats.json is
// refused or read.
#include "contract/canonical.h"
#include "contract/statistics.h"
#include "core/json.h"
#include "tests/fuzz/fuzz.h"

using servoflow::fuzz::accepted;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  namespace contract = servoflow::contract;
  const auto json = servoflow::parse_json(servoflow::fuzz::as_text(data, size), "fuzz");
  if (!json.ok()) return 0;
  (void)accepted(contract::parse_openpi_statistics(*json, "fuzz"));
  const auto first = contract::contract_from_json(*json, "fuzz");
  if (!accepted(first)) return 0;
  const auto second = contract::contract_from_json(contract::contract_to_json(*first), "fuzz");
  servoflow::fuzz::require(second.ok());
  servoflow::fuzz::require(contract::contract_hash(*first) == contract::contract_hash(*second));
  return 0;
}
