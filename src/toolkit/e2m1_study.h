// Numerics of E2M1, the 4-bit float, on a checkpoint's own weights: what its bias, its subnormal, its scales
// and the order of sums matter, and how it stands against other formats of as many bits.
#pragma once

#include <string>
#include <vector>

#include "core/json.h"
#include "weights/checkpoint.h"

namespace servoflow::toolkit {

struct StudyRow {
  std::string table, variant;
  double bits = 0;      // per weight, scales included; 0 where it does not apply
  double snr_db = 0;    // of weights, or of products against float64
  double worst_db = 0;  // of the layers
  std::string note;
};

struct StudyOptions {
  std::vector<std::string> layers = {"*"};  // globs
  int limit = 24;                           // layers at most, evenly spread
  int rows = 128;                           // of each
  std::uint64_t seed = 0;                   // of the inputs in products: normal, two of them
};

struct StudyReport {
  std::vector<std::string> layers;
  std::vector<StudyRow> rows;
};

Result<StudyReport> e2m1_study(const weights::Checkpoint& checkpoint, const StudyOptions& options);
std::string study_text(const StudyReport& report);
Json study_to_json(const StudyReport& report);

}  // namespace servoflow::toolkit
