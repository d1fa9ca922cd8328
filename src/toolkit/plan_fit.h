// Engine factors from committed bench results, and how well they predict the other results.
//
// Of a GPU three numbers are fitted on one result of a single request (share of the product rate in vision
// and in prefix, and the time of a phase of the denoise loop; a step's products get the prefix's share), and
// one on a result of the loop's composition. Of a CPU three shares are fitted on one result. Nothing else is:
// every other row is a prediction.
#pragma once

#include <string>
#include <vector>

#include "toolkit/plan_model.h"

namespace servoflow::toolkit {

// A result of `servoflow bench` as far as the planner needs it.
struct MeasuredCase {
  std::string file, precision, backend, hardware;
  std::vector<WorkShape> requests;
  double ms = 0, vision_ms = 0, prefix_ms = 0, denoise_ms = 0;  // medians
  double device_bytes = 0;
  double bandwidth_gbs = 0;  // ceilings measured in the same run; 0: none
  std::map<std::string, double> tflops;
  double single_in_composition_ms = 0;  // of `batches`, one request; 0: not there
  std::string left_out;                 // why it cannot be compared; empty: it can
};
// An error for what is no bench result; `left_out` for one of another network or without what it takes.
Result<MeasuredCase> read_measured(const std::string& path);
Result<MeasuredCase> measured_from_json(const Json& json, const std::string& where);

// `composition` may be null. `given` holds what is not fitted: kernel_us, kernels, phases, loop_requests.
Result<EngineFactors> fit_engine(const DeviceProfile& device, const MeasuredCase& single,
                                 const MeasuredCase* composition, const EngineFactors& given);
// The [engine] block of a profile.
std::string engine_toml(const EngineFactors& engine);

struct AccuracyRow {
  std::string device, file, precision, work;
  bool fitted = false;     // the factors come from this file
  bool same_work = false;  // another run of what was fitted: agrees by construction and does not count
  std::string left_out;
  double measured_ms = 0, predicted_ms = 0, floor_ms = 0;
  double stage_measured[3] = {}, stage_predicted[3] = {};  // vision, prefix, denoise
  double measured_gb = 0, predicted_gb = 0;                // memory of the policy
  double error() const { return measured_ms > 0 ? predicted_ms / measured_ms - 1 : 0; }
};

struct Accuracy {
  std::vector<AccuracyRow> rows;
  // Mean absolute percentage errors over the rows that were predicted, in the precision that the factors were
  // fitted in: end to end, and over their stages.
  double mape = 0, stage_mape = 0;
  int predicted = 0;
};

// Every bench result in `folder` whose device has a profile with factors of its own.
Result<Accuracy> check_accuracy(const std::string& folder);

Json accuracy_to_json(const Accuracy& accuracy);

}  // namespace servoflow::toolkit
