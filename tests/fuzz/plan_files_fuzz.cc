// The planner's and the benchmark's files: profiles, matrices, results of both. Refused with a reason, or
// usable.
#include "tests/fuzz/fuzz.h"
#include "toolkit/bench_matrix.h"
#include "toolkit/device_profile.h"
#include "toolkit/plan_fit.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace servoflow;
  const std::string_view text = fuzz::as_text(data, size);
  if (const auto spec = toolkit::parse_matrix(text, "fuzz"); fuzz::accepted(spec)) {
    fuzz::require(!spec->arms.empty() && !toolkit::arm_text(spec->arms.back()).empty());
  }
  if (const auto profile = toolkit::parse_device_profile(text, "fuzz"); fuzz::accepted(profile)) {
    if (const auto rates = toolkit::used_rates(*profile); fuzz::accepted(rates))
      fuzz::require(rates->bandwidth_gbs > 0 && !rates->tflops.empty());
  }
  const auto json = parse_json(text, "fuzz");
  if (!fuzz::accepted(json)) return 0;
  if (const auto result = toolkit::matrix_from_json(*json, "fuzz"); fuzz::accepted(result))
    fuzz::require(!result->arms.empty());
  if (const auto measured = toolkit::measured_from_json(*json, "fuzz"); fuzz::accepted(measured))
    fuzz::require(!measured->requests.empty() && measured->ms > 0);
  return 0;
}
