// What the planner knows about a device: rates of its datasheet, rates that were measured on it, and how much
// of those this engine was seen to reach. Each with its source; profiles/*.toml are compiled in, users add
// files of the same form, and a probe's machine profile can be one.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/json.h"
#include "servoflow/status.h"

namespace servoflow::toolkit {

// Dense products by precision ("fp32", "bf16", "fp8", "int8", "fp4") in 1e12 operations per second, memory in
// 1e9 bytes per second. 0 or absent: unknown, or the device has no such arithmetic.
struct DeviceRates {
  std::string source;
  double bandwidth_gbs = 0;
  double bandwidth_low_gbs = 0, bandwidth_high_gbs = 0;  // by working set, where it was measured so
  std::map<std::string, double> tflops;
};

// What this engine makes of the rates: fitted on the named result, not per row.
struct EngineFactors {
  std::string source;                       // a committed bench result
  std::string composition_source;           // of composition_us
  double vision = 0, prefix = 0, step = 0;  // share of the product rate, in (0, 1]
  double kernel_us = 0;  // of each of `kernels` per layer in vision and prefix, beside the work
  int kernels = 0;
  double phase_us = 0;  // of each of `phases` per layer and step, and for each request walked through
  int phases = 0;
  int loop_requests = 1;      // more at once take the composition of the loop,
  double composition_us = 0;  // which costs this per layer and step, however many there are
  double host_ms = 0;         // beside the three stages
};

struct DeviceProfile {
  std::string name, title, kind;  // "gpu" | "cpu"
  double memory_gb = 0, power_w = 0;
  DeviceRates datasheet;
  std::optional<DeviceRates> measured;
  std::optional<EngineFactors> engine;
  bool one_launch =
      true;            // the engine's denoise loop in one launch runs there (Hopper); else its composition
  std::string borrow;  // the profile whose measured shares and engine factors stand in for missing ones
};

// Everything that is wrong comes in one error, each line with file and field.
Result<DeviceProfile> parse_device_profile(std::string_view toml, const std::string& where);
Result<DeviceProfile> device_profile_from_json(const Json& json, const std::string& where);

// Names of the profiles compiled in, sorted.
std::vector<std::string> list_device_profiles();
// A built-in name, a .toml file, or a .json file: a machine profile that `servoflow probe` wrote.
Result<DeviceProfile> load_device_profile(const std::string& name_or_path);

// The rates a prediction uses. What was measured comes first; else the datasheet times the share of its
// datasheet that the lender was measured at. `sources` says which, in words.
struct UsedRates {
  double bandwidth_gbs = 0;
  std::map<std::string, double> tflops;
  EngineFactors engine;
  bool engine_borrowed = false, rates_borrowed = false;
  std::vector<std::string> sources;
};
Result<UsedRates> used_rates(const DeviceProfile& profile);

struct BuiltinProfile {
  std::string_view name, toml;
};
// Generated from profiles/*.toml.
const std::vector<BuiltinProfile>& builtin_profiles();
// profiles/published.toml: figures of others.
std::string_view builtin_published();

}  // namespace servoflow::toolkit
