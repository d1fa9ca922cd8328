// The named operations between a robot's own units and the units its policy was trained in. Contracts list
// them as data; this registry is the only place that knows what they do.
//
//   delta      values = dimensions. Actions only: the transformed state is added, since the policy predicts
//   offsets from it. joint_flip values = one factor for each leading dimension. State and actions are
//   multiplied by it. gripper    values = dimensions, variant = "aloha". State: the gripper's linear position
//   becomes the angle the policy
//              knows; actions: that angle becomes the robot's command. The two formulas are not inverses
//              (openpi's are not).
#pragma once

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "contract/contract.h"

namespace servoflow::contract {

enum class Direction {
  kState,    // robot -> policy
  kActions,  // policy -> robot
};

std::vector<std::string> transform_names();
std::vector<std::string> gripper_variants();
// The dimensions a gripper variant means when a contract does not list them.
std::vector<double> gripper_dimensions(const std::string& variant);

// Why the transform cannot be applied to vectors of `width` elements (0: not known yet) on a robot with
// `state_width` state numbers; nothing when it can.
std::optional<std::string> transform_problem(const Transform& transform, Direction direction, int width,
                                             int state_width);

// Apply transforms in order, in place, in float64. They must have passed transform_problem for these widths.
void transform_state(const std::vector<Transform>& transforms, std::span<double> state);
// One row of actions; `state` is the state after its own transforms, in robot units (not normalised).
void transform_actions(const std::vector<Transform>& transforms, std::span<const double> state,
                       std::span<double> actions);

}  // namespace servoflow::contract
