// What `auto` becomes on a machine that was probed: chosen before a policy is opened, and always told.
#pragma once

#include <string>

#include "core/json.h"
#include "servoflow/status.h"

namespace servoflow::toolkit {

struct AutoRequest {
  std::string device = "auto", precision = "auto";
  int threads = 0;
  std::string profile;     // a file, "none", or empty: the default one where there is one
  std::string checkpoint;  // a directory; one that is quantized keeps --precision auto, its own formats
};

struct AutoChoice {
  std::string device = "auto", precision = "auto";
  int threads = 0;
  // {profile, made, device, precision, threads, why}; null where no profile had a say.
  Json chosen;
  std::string note;     // the same for people
  std::string warning;  // why a profile that lies at the default place was not read
};

// Fills in what the request leaves open. A profile that was named must be there and of this machine and
// build; the default one may be stale: it is then refused in `warning`, by what is different, and auto stays
// auto. Precision and threads are taken only where the profile's device runs. Only fp32 and bf16 are ever
// chosen.
Result<AutoChoice> choose_auto(const AutoRequest& request);

}  // namespace servoflow::toolkit
