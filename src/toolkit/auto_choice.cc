#include "toolkit/auto_choice.h"

#include <filesystem>

#include "core/status_macros.h"
#include "toolkit/machine_profile.h"

namespace servoflow::toolkit {
namespace {

// Whether the checkpoint says how its weights are quantized; what it says is the loader's to read.
bool is_quantized(const std::string& checkpoint) {
  namespace fs = std::filesystem;
  std::error_code error;
  if (checkpoint.empty()) return false;
  if (fs::exists(fs::path(checkpoint) / "hf_quant_config.json", error)) return true;
  const Result<Json> config = read_json_file((fs::path(checkpoint) / "config.json").string());
  return config.ok() && config->is_object() && config->contains("quantization_config");
}

}  // namespace

Result<AutoChoice> choose_auto(const AutoRequest& request) {
  AutoChoice out{.device = request.device, .precision = request.precision, .threads = request.threads};
  if (request.device != "auto" && request.precision != "auto" && request.threads != 0 &&
      request.profile.empty())
    return out;
  Result<std::optional<MachineProfile>> read = profile_for_auto(request.profile);
  if (!read.ok()) {
    if (!request.profile.empty()) return read.status().with_context("--profile");
    out.warning = "the machine's profile is not used: " + read.status().message();
    return out;
  }
  if (!read->has_value()) return out;
  const MachineProfile& profile = **read;
  const Choice& choice = profile.choice;
  if (out.device == "auto") out.device = choice.device;
  if (out.device == choice.device) {
    if (out.precision == "auto" && !is_quantized(request.checkpoint)) out.precision = choice.precision;
    if (out.threads == 0 && choice.device == "cpu") out.threads = choice.threads;
  }
  if (out.device == request.device && out.precision == request.precision && out.threads == request.threads)
    return out;
  const std::string path = request.profile.empty() ? default_profile_path() : request.profile;
  out.chosen = {{"profile", path},        {"made", profile.made},
                {"device", out.device},   {"precision", out.precision},
                {"threads", out.threads}, {"why", choice.why}};
  out.note = "auto: device " + out.device + ", precision " + out.precision +
             (out.threads > 0 ? ", " + std::to_string(out.threads) + " threads" : "") +
             ", by the profile of " + profile.made + " in " + path + ": " + choice.why;
  return out;
}

}  // namespace servoflow::toolkit
