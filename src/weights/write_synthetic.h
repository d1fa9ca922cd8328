// Writing a synthetic checkpoint to disk: a directory that every loader of the layout takes for a published
// one.
#pragma once

#include <cstdint>
#include <string>

#include "core/dtype.h"
#include "servoflow/policy.h"
#include "servoflow/status.h"
#include "weights/architecture.h"
#include "weights/config.h"

namespace servoflow::weights {

struct SynthOptions {
  std::string out;  // the directory to make; it must not exist, or be empty
  Layout layout = Layout::kOpenpi;
  Architecture architecture = pi05_architecture();
  DType dtype = DType::kBF16;  // or kF32
  std::uint64_t seed = 0;
  int state_width = 0;   // of the statistics; 0: 32
  int action_width = 0;  // 0: the architecture's action_dim
  std::string asset =
      "synthetic";  // openpi: the statistics' folder under assets/, such as "physical-intelligence/libero"
  std::string tokenizer;  // copied to tokenizer.model; may be empty
  int threads = 0;        // 0: one per usable core
};

// Streams: memory stays below 100 MB whatever the size. The directory appears under its name only when it is
// complete; a failure leaves nothing behind. `progress` gets bytes of weights, on the calling thread. Fails
// with invalid input for contradictory options or an existing OUT, with a runtime failure for a full disk.
Status write_synthetic(const SynthOptions& options, const ProgressFunction& progress = {});

}  // namespace servoflow::weights
