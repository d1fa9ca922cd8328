// The last stage: the network's normalised actions become commands in the robot's own units.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "contract/contract.h"
#include "servoflow/status.h"
#include "stages/flow.h"

namespace servoflow::stages {

// Stateless after creation; one may serve many threads.
class Postprocessor {
 public:
  // `model_dim`: columns of the network's actions. Fails when the contract asks for more columns than that.
  static Result<std::unique_ptr<Postprocessor>> create(const contract::Contract& contract, int model_dim);

  // `normalized` is [horizon, model_dim]; `actions` becomes [horizon, width] in robot units, width() columns.
  // Columns without statistics stay as they are. `input` brings the state that deltas are added to. A number
  // that is not finite, going in or coming out, is a run-time error that names step and dimension; then
  // `actions` is left empty.
  Status run(std::span<const float> normalized, int horizon, const ModelInput& input,
             std::vector<double>& actions, int& width) const;

  int width() const { return width_; }

 private:
  Postprocessor(const contract::Contract& contract, int model_dim, int width);
  contract::Normalization norm_;
  std::vector<contract::Transform> transforms_;
  int model_dim_, width_, state_width_;
};

}  // namespace servoflow::stages
