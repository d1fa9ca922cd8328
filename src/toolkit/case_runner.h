// Runs recorded cases on an opened checkpoint: what verification, calibration and comparison share.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "contract/contract.h"
#include "policy/network.h"
#include "stages/flow.h"
#include "toolkit/case_file.h"
#include "toolkit/judge.h"
#include "weights/checkpoint.h"

namespace servoflow::toolkit {

// Sees a case's stages by their recorded names: those of the network, and what lies before it
// ("image/<slot>", "state_normalized", "tokens", "token_mask").
class CaseTap : public policy::StageTap {
 public:
  // The network numbers pictures; recorded names carry the slot.
  virtual void name_pictures(std::vector<std::string> slots) { slots_ = std::move(slots); }
  virtual void add(const std::string& /*name*/, const Values& /*got*/) {}

 protected:
  std::string recorded_name(std::string_view stage) const;

 private:
  std::vector<std::string> slots_;
};

template <typename T>
Values values_of(std::span<const T> data, const Shape& shape) {
  return {shape, std::vector<double>(data.begin(), data.end())};
}

struct CaseRunnerOptions {
  std::string device = "auto", precision = "fp32";
  std::string tokenizer, assets;
  int threads = 0;
  ProgressFunction loading;
  // Weights to run instead of the checkpoint's own: the same tensors, changed.
  std::shared_ptr<const weights::WeightSource> source = {};
};

// One inference of a case.
struct CaseOutcome {
  std::vector<float> normalized;  // [horizon, action_dim], every column of the flow
  // In robot units, [horizon, width], where the case says how to make them (entry "frames"); else width is 0.
  std::vector<double> actions;
  int width = 0;
  std::vector<double> scale;    // robot units per unit of the normalised action, `width` of them
  contract::Contract contract;  // with the case's cameras and prompt, where width is not 0
};

class CaseRunner {
 public:
  // Checks all cases against the checkpoint before any weight is read; one network then serves all of them.
  static Result<std::unique_ptr<CaseRunner>> open(weights::Checkpoint checkpoint,
                                                  std::span<const CaseFile> cases,
                                                  const CaseRunnerOptions& options);
  // The case with its own noise, and its own steps unless `steps` says otherwise. `tap` may be null.
  Result<CaseOutcome> run(const CaseFile& c, CaseTap* tap, int steps = 0);

  policy::Network& network() { return *network_; }
  const policy::NetworkInfo& info() const { return network_->info(); }
  const weights::Checkpoint& checkpoint() const { return checkpoint_; }
  // openpi records every column of the flow, lerobot only the robot's.
  Values normalized_actions(const CaseFile& c, const std::vector<float>& all) const;

 private:
  CaseRunner(const CaseRunnerOptions& options, weights::Checkpoint checkpoint)
      : options_(options), checkpoint_(std::move(checkpoint)) {}
  Status check(std::span<const CaseFile> cases) const;
  Status open_network(std::span<const CaseFile> cases);
  Result<contract::Contract> contract_for(const CaseFile& c) const;
  Status preprocess(const CaseFile& c, const contract::Contract& contract, stages::ModelInput& input,
                    CaseTap* tap) const;

  const CaseRunnerOptions options_;
  weights::Checkpoint checkpoint_;
  std::string tokenizer_;
  std::unique_ptr<policy::Network> network_;
};

}  // namespace servoflow::toolkit
