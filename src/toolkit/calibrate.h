// Runs recorded cases and gathers the inputs of every linear layer over all denoise steps.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "servoflow/policy.h"
#include "toolkit/calibration.h"

namespace servoflow::toolkit {

struct CalibrateOptions {
  std::string cases;  // folder; empty: CHECKPOINT/cases
  std::string out;    // the statistics file; where it exists and fits, its cases are not run again
  std::string device = "cpu", precision = "fp32", tokenizer, assets;
  int threads = 0;
  int steps =
      0;  // denoise steps of every case: ranges per step belong to one schedule; 0: the checkpoint's default
  int limit = 0;  // cases at most, evenly spread over the folder; 0: all
  // Globs of linear layers whose sites keep second moments: 8 · K² bytes each, GPTQ needs them.
  std::vector<std::string> moments;
  double save_every_seconds = 60;  // so much work an interruption may cost
  ProgressFunction loading;
  std::function<void(int done, int total, const std::string& next)> running;
};

struct CalibrateReport {
  CalibrationStatistics statistics;
  int run = 0, skipped = 0;  // cases of this call; skipped ones were in the file already
};

// Fails for a statistics file of other weights, steps, device or moments (it is left alone), for cases that
// are not finite, and for a device that shows no inputs. What was done until an interruption is in the file.
Result<CalibrateReport> calibrate(const std::string& checkpoint, const CalibrateOptions& options);

}  // namespace servoflow::toolkit
