// A machine's profile: a refusal that says why, or one that is read back as it was.
#include "core/json.h"
#include "tests/fuzz/fuzz.h"
#include "toolkit/decision.h"
#include "toolkit/machine_profile.h"
#include "toolkit/probe.h"

using servoflow::fuzz::accepted;
using servoflow::fuzz::require;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  namespace toolkit = servoflow::toolkit;
  const auto json = servoflow::parse_json(servoflow::fuzz::as_text(data, size), "fuzz");
  if (!json.ok()) return 0;
  auto profile = toolkit::profile_from_json(*json, "machine.json");
  if (!accepted(profile)) return 0;
  const servoflow::Json written = toolkit::profile_to_json(*profile);
  const auto again = toolkit::profile_from_json(written, "machine.json");
  require(accepted(again) && toolkit::profile_to_json(*again) == written);
  require(!toolkit::probe_text(*profile).empty());
  // Whatever stands in it, the rules end.
  toolkit::decide(toolkit::builtin_rules(), *profile);
  require(profile->choice.precision == "fp32" || profile->choice.precision == "bf16");
  return 0;
}
