// Makes a quantized checkpoint out of a float one: a directory that this engine and the public libraries
// read, with the plan and a report of what each layer lost.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "core/json.h"
#include "quant/checkpoint.h"
#include "quant/methods/histogram.h"
#include "quant/precision_plan.h"
#include "servoflow/policy.h"
#include "toolkit/calibration.h"
#include "toolkit/linears.h"

namespace servoflow::toolkit {

enum class Smoothing { kAuto, kNone, kSmoothQuant, kAwq };
enum class ScaleChoice { kAbsMax, kLeastSquares };
enum class Rounding { kNearest, kGptq };

struct QuantizeOptions {
  std::string checkpoint, out;
  std::string recipe;      // a name, or a plan file
  std::string statistics;  // of `servoflow calibrate`; empty: none
  quant::Convention layout = quant::Convention::kCompressedTensors;
  // Auto: SmoothQuant for layers with INT8 inputs where there are statistics, else none.
  Smoothing smoothing = Smoothing::kAuto;
  ScaleChoice scales = ScaleChoice::kAbsMax;
  Rounding rounding = Rounding::kNearest;
  bool correct_bias = false;
  quant::CalibratorOptions calibrator;  // of static input scales
  // Globs of the layers whose inputs the calibrator may clip; empty: of all. Layers that read the same input
  // have one scale for it, so that one of them stands for all. The others keep their whole range.
  std::vector<std::string> clip;
  ProgressFunction progress;  // parameters of all layers
};

// What one layer got. Errors are shares: ‖W' - W‖² / ‖W‖² of weights, and of outputs where there are
// statistics (all channels' correlations where a second moment is, else without correlations). Both are in
// the units of the checkpoint, folded multipliers taken out again, and `…_nearest` is what round-to-nearest
// leaves of the checkpoint's own weights, without multipliers.
struct LayerReport {
  std::string name, format;
  std::int64_t rows = 0, cols = 0;
  double bits = 0;  // per weight, scales included
  double weight_error = 0, weight_error_nearest = 0;
  std::optional<double> output_error, output_error_nearest;
  // Where multipliers were searched: what the search minimised, with the best ones and with none, mean over
  // the sites that share them. AWQ: the outputs' error of all layers that read these inputs, at most 256 rows
  // of each. SmoothQuant: that and what rounding the inputs to 8 bits leaves.
  std::optional<double> smoothing_error, smoothing_error_nearest;
  std::optional<float> input_scale;
  std::optional<float> input_clip;  // where the calibrator clips: the threshold, below the largest input
  std::vector<float>
      step_input_amax;  // where scales are static: the range of each step, which the one scale has to hold
  std::string method;   // what was done: "awq(0.35) least-squares gptq"
  // "nearest beats it": the method lost by its own metric, and what round-to-nearest gave was kept.
  std::string note;
};

struct QuantizeReport {
  std::string checkpoint, out, recipe, layout, weights, statistics;
  quant::CalibratorOptions calibrator;
  std::vector<std::string> clip;  // as asked for
  quant::PrecisionPlan plan;
  std::vector<LayerReport> layers;
  Json calibration;  // null, or {digest, precision, steps, cases}
  std::uint64_t bytes_before = 0, bytes_after = 0;
  std::vector<std::string> notes;
};

// OUT appears only when all of it is written. Fails for a checkpoint that is quantized already, statistics of
// other weights, recipes that need calibration without statistics, methods that need what the statistics
// lack, globs of `clip` that name nothing to clip, and plans that do not fit the network.
Result<QuantizeReport> quantize_checkpoint(const QuantizeOptions& options);

Json quantize_to_json(const QuantizeReport& report);
std::string quantize_text(const QuantizeReport& report);

// Names inside OUT.
inline constexpr char kPlanFile[] = "precision_plan.json";
inline constexpr char kReportFile[] = "quantization_report.json";

}  // namespace servoflow::toolkit
