#include "stages/postprocess/postprocessor.h"

#include <cmath>
#include <string>

#include "contract/normalization.h"
#include "contract/problems.h"
#include "contract/transforms.h"
#include "contract/validate.h"
#include "core/status_macros.h"

namespace servoflow::stages {
namespace {

Status not_finite(const char* what, int step, int dimension, double value) {
  const char* shown = std::isnan(value) ? "NaN" : value > 0 ? "inf" : "-inf";
  return Status::runtime(std::string(what) + "[" + std::to_string(step) + ", " + std::to_string(dimension) +
                         "] is " + shown + "; no action of this chunk may be sent to a robot");
}

}  // namespace

Postprocessor::Postprocessor(const contract::Contract& contract, int model_dim, int width)
    : norm_(contract.action_norm),
      transforms_(contract.actions.transforms),
      model_dim_(model_dim),
      width_(width),
      state_width_(contract::state_width(contract)) {}

Result<std::unique_ptr<Postprocessor>> Postprocessor::create(const contract::Contract& contract,
                                                             int model_dim) {
  const std::string where = "robot " + contract.name;
  SF_RETURN_IF_ERROR(contract::validated(contract, where));
  if (model_dim < 1) return Status::invalid("model_dim must be positive");
  const int width = contract.actions.width == 0 ? model_dim : contract.actions.width;
  contract::Problems problems(where);
  if (width > model_dim) {
    problems.add("actions.width", "is " + std::to_string(width) + ", the model gives " +
                                      std::to_string(model_dim) + " columns");
  }
  // A contract of width 0 learns its columns only here.
  for (const contract::Transform& transform : contract.actions.transforms) {
    if (const auto cause = contract::transform_problem(transform, contract::Direction::kActions, width,
                                                       contract::state_width(contract))) {
      problems.add("actions.transforms", *cause);
    }
  }
  SF_RETURN_IF_ERROR(problems.status());
  return std::unique_ptr<Postprocessor>(new Postprocessor(contract, model_dim, width));
}

Status Postprocessor::run(std::span<const float> normalized, int horizon, const ModelInput& input,
                          std::vector<double>& actions, int& width) const {
  width = width_;
  actions.clear();
  const std::size_t rows = static_cast<std::size_t>(horizon < 0 ? 0 : horizon);
  if (normalized.size() != rows * static_cast<std::size_t>(model_dim_) || rows == 0) {
    return Status::invalid("normalized actions: " + std::to_string(normalized.size()) +
                           " numbers, expected " + std::to_string(horizon) + " x " +
                           std::to_string(model_dim_));
  }
  if (static_cast<int>(input.state.size()) != state_width_) {
    return Status::invalid("state: " + std::to_string(input.state.size()) + " numbers, expected " +
                           std::to_string(state_width_));
  }
  // All of the model's columns are judged, the ones that are cut off as well: a NaN there means a broken
  // inference.
  for (std::size_t i = 0; i < normalized.size(); ++i) {
    if (std::isfinite(normalized[i])) continue;
    return not_finite("normalized actions", static_cast<int>(i / model_dim_),
                      static_cast<int>(i % model_dim_), normalized[i]);
  }
  const std::size_t columns = static_cast<std::size_t>(width_);
  actions.resize(rows * columns);
  for (std::size_t row = 0; row < rows; ++row) {
    const std::span<double> out(actions.data() + row * columns, columns);
    contract::unnormalize(norm_, normalized.subspan(row * model_dim_, model_dim_), out);
    contract::transform_actions(transforms_, input.state, out);
    for (std::size_t i = 0; i < columns; ++i) {
      if (std::isfinite(out[i])) continue;
      const Status status = not_finite("actions", static_cast<int>(row), static_cast<int>(i), out[i]);
      actions.clear();
      return status;
    }
  }
  return Status::ok_status();
}

}  // namespace servoflow::stages
