// A lerobot directory's three documents, here the members of one object: refused, or a contract with a hash.
#include "contract/canonical.h"
#include "contract/lerobot.h"
#include "core/json.h"
#include "tests/fuzz/fuzz.h"

using servoflow::fuzz::accepted;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  namespace contract = servoflow::contract;
  const auto all = servoflow::parse_json(servoflow::fuzz::as_text(data, size), "fuzz");
  if (!all.ok() || !all->is_object()) return 0;
  for (const char* part : {"config", "preprocessor", "postprocessor"})
    if (!all->contains(part)) return 0;
  const contract::StateReader eight_wide = [](const std::string&, const std::string&) {
    const std::vector<double> low(8, -1.0), high(8, 1.0), middle(8, 0.0);
    return servoflow::Result<contract::Statistics>({.mean = middle, .std = high, .q01 = low, .q99 = high});
  };
  const auto result = contract::contract_from_lerobot(all->at("config").dump(), all->at("preprocessor"),
                                                      all->at("postprocessor"), eight_wide, "fuzz");
  if (!accepted(result)) return 0;
  servoflow::fuzz::require(contract::contract_hash(*result).size() == 64);
  return 0;
}
