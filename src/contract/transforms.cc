#include "contract/transforms.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "contract/problems.h"

namespace servoflow::contract {
namespace {

// ALOHA's gripper linkage (openpi aloha_policy): a horn turns an arm that slides the finger.
constexpr double kHornRadius = 0.022, kArmLength = 0.036;  // metres
constexpr double kOpenMetres = 0.058, kClosedMetres = 0.01844;
// Angle limits: of the policy's training data, and of the robot's own gripper.
constexpr double kPolicyClosed = 0.5476, kPolicyOpen = 1.6296;
constexpr double kRobotClosed = -0.6213, kRobotOpen = 1.4910;

double gripper_to_policy(double position) {
  const double metres = position * (kOpenMetres - kClosedMetres) + kClosedMetres;
  const double sine =
      (kHornRadius * kHornRadius + metres * metres - kArmLength * kArmLength) / (2 * kHornRadius * metres);
  return (std::asin(std::clamp(sine, -1.0, 1.0)) - kPolicyClosed) / (kPolicyOpen - kPolicyClosed);
}

// openpi adds only the lower limit of the policy's range; multiplying by the range as well would be the true
// inverse.
double gripper_to_robot(double value) {
  return (value + kPolicyClosed - kRobotClosed) / (kRobotOpen - kRobotClosed);
}

std::optional<std::string> dimension_problem(const Transform& transform, int width, const char* what) {
  if (transform.values.empty()) return transform.name + " lists no dimensions";
  std::set<double> seen;
  for (const double value : transform.values) {
    if (!(value >= 0) || value != std::floor(value) || value > 1e6) {
      return transform.name + " dimensions must be whole numbers from 0 on";
    }
    const std::string dimension = std::to_string(static_cast<long>(value));
    if (width > 0 && value >= width) {
      return transform.name + " dimension " + dimension + " lies beyond the " + what + ", which has " +
             std::to_string(width) + " numbers (0 to " + std::to_string(width - 1) + ")";
    }
    if (!seen.insert(value).second) return transform.name + " lists dimension " + dimension + " twice";
  }
  return std::nullopt;
}

}  // namespace

std::vector<std::string> transform_names() { return {"delta", "joint_flip", "gripper"}; }
std::vector<std::string> gripper_variants() { return {"aloha"}; }
std::vector<double> gripper_dimensions(const std::string&) { return {6, 13}; }

std::optional<std::string> transform_problem(const Transform& transform, Direction direction, int width,
                                             int state_width) {
  const char* what = direction == Direction::kState ? "state" : "action";
  if (transform.name != "gripper" && !transform.variant.empty()) return transform.name + " takes no variant";
  if (transform.name == "delta") {
    if (direction == Direction::kState) return std::string("delta applies to actions, not to the state");
    if (auto problem = dimension_problem(transform, width, what)) return problem;
    if (state_width == 0) return std::string("delta needs a state, and the contract has no state parts");
    return dimension_problem(transform, state_width, "state");
  }
  if (transform.name == "joint_flip") {
    if (transform.values.empty()) return std::string("joint_flip lists no factors");
    for (const double factor : transform.values) {
      if (!std::isfinite(factor) || factor == 0)
        return std::string("joint_flip factors must be finite and not 0");
    }
    if (width > 0 && transform.values.size() > static_cast<std::size_t>(width)) {
      return "joint_flip has " + std::to_string(transform.values.size()) + " factors, the " + what + " has " +
             std::to_string(width) + " numbers";
    }
    return std::nullopt;
  }
  if (transform.name == "gripper") {
    const auto variants = gripper_variants();
    if (std::find(variants.begin(), variants.end(), transform.variant) == variants.end()) {
      return "unknown gripper \"" + transform.variant + "\"; known: " + join(variants);
    }
    return dimension_problem(transform, width, what);
  }
  return "unknown transform \"" + transform.name + "\"; known: " + join(transform_names());
}

void transform_state(const std::vector<Transform>& transforms, std::span<double> state) {
  for (const Transform& transform : transforms) {
    if (transform.name == "joint_flip") {
      for (std::size_t i = 0; i < transform.values.size(); ++i) state[i] *= transform.values[i];
    } else if (transform.name == "gripper") {
      for (const double i : transform.values) {
        double& value = state[static_cast<std::size_t>(i)];
        value = gripper_to_policy(value);
      }
    }
  }
}

void transform_actions(const std::vector<Transform>& transforms, std::span<const double> state,
                       std::span<double> actions) {
  for (const Transform& transform : transforms) {
    if (transform.name == "delta") {
      for (const double i : transform.values)
        actions[static_cast<std::size_t>(i)] += state[static_cast<std::size_t>(i)];
    } else if (transform.name == "joint_flip") {
      for (std::size_t i = 0; i < transform.values.size(); ++i) actions[i] *= transform.values[i];
    } else if (transform.name == "gripper") {
      for (const double i : transform.values) {
        double& value = actions[static_cast<std::size_t>(i)];
        value = gripper_to_robot(value);
      }
    }
  }
}

}  // namespace servoflow::contract
