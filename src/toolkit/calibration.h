// What a network's linear layers get as inputs, gathered over recorded cases and every denoise step: the
// statistics file that calibration writes and that ranges, smoothing, GPTQ and static scales read.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "core/json.h"
#include "core/safetensors.h"
#include "quant/methods/histogram.h"
#include "quant/methods/moments.h"
#include "servoflow/status.h"

namespace servoflow::toolkit {

// Inputs of one site (toolkit/linears.h), named by its first linear layer.
struct SiteStatistics {
  int width = 0;
  // One entry per denoise step for the expert's layers, a single one for layers before the first step.
  // Magnitudes of all elements.
  std::vector<quant::Histogram> steps;
  quant::Histogram tokens;  // largest magnitude of each row
  quant::Histogram blocks;  // of each 16 neighbours along K
  std::uint64_t rows = 0;
  std::vector<float> channel_amax;                               // [width]
  std::vector<double> channel_abs, channel_sum, channel_square;  // sums over rows
  std::optional<quant::SecondMoment> moment;                     // where asked for

  void add(int step, std::span<const float> x);
  quant::Histogram all_steps() const;
};

struct CalibrationStatistics {
  std::string weights;  // toolkit/digest.h, of the checkpoint the inputs came from
  std::string checkpoint, device, backend, precision;
  int denoise_steps = 0;
  std::vector<std::string> moments;  // globs of sites that keep second moments
  struct Case {
    std::string name, digest;
    bool operator==(const Case&) const = default;
  };
  std::vector<Case> cases;                      // in the order they were run
  std::map<std::string, SiteStatistics> sites;  // those without rows are not stored

  // SHA-256 over everything above; what reports and quantized checkpoints name.
  std::string digest() const;
};

inline constexpr int kCalibrationVersion = 1;
// One safetensors file: tensors SITE/histogram U64 [steps, 2048], SITE/range F32 [steps, 2] (limit, amax),
// SITE/not_finite U64 [steps], SITE/tokens, SITE/blocks (histograms alike), SITE/channels F64 [4, K] (amax,
// Σ|x|, Σx, Σx²), SITE/rows U64 [1], SITE/moment F64 [K, K]; the rest is metadata. Written under a temporary
// name, then renamed.
Status write_calibration(const CalibrationStatistics& statistics, const std::string& path);
// Strict: version, digest, and all that calibration_from_file checks.
Result<CalibrationStatistics> read_calibration(const std::string& path);
// What a file holds, whether or not its digest agrees. Refuses tensors that are missing, misshapen or of no
// site, values that no inputs have (NaN, negative sums, beyond float32), and counts, largest magnitudes and
// lengths that contradict each other: what it returns was gathered from some inputs, as far as can be told.
Result<CalibrationStatistics> calibration_from_file(const SafetensorsFile& file);

}  // namespace servoflow::toolkit
