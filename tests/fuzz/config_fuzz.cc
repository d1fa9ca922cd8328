// A checkpoint's config.json: problems that are named, or sizes that hold together.
#include "core/json.h"
#include "tests/fuzz/fuzz.h"
#include "weights/config.h"

using servoflow::fuzz::require;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  namespace weights = servoflow::weights;
  const auto json = servoflow::parse_json(servoflow::fuzz::as_text(data, size), "fuzz");
  if (!json.ok()) return 0;
  (void)weights::refused_by_config(*json, "config.json");
  for (const auto layout :
       {weights::Layout::kOpenpi, weights::Layout::kLerobot, weights::Layout::kServoflow}) {
    const weights::ConfigReading reading = weights::read_config(*json, layout, "config.json");
    for (const std::string& problem : reading.problems) require(!problem.empty());
    if (reading.problems.empty()) require(weights::check_architecture(reading.architecture).empty());
  }
  return 0;
}
