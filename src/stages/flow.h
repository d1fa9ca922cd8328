// The few types that cross from one stage to the next. Stages include this file and never each other.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace servoflow::stages {

// One camera picture at model size, valid ones only.
struct CameraPicture {
  int slot = 0;               // index into the contract's cameras
  std::vector<float> pixels;  // [image, image, 3] in [-1, 1]
};

// What the network gets. Every vector keeps its capacity from one inference to the next.
struct ModelInput {
  std::vector<CameraPicture> pictures;  // in the order of the prefix; `picture_count` of them are valid
  int picture_count = 0;
  std::vector<std::int32_t> tokens;  // valid tokens only, no padding
  bool prompt_truncated = false;
  std::vector<double> state;  // after the contract's state transforms, robot units
  std::vector<double> state_normalized;
};

}  // namespace servoflow::stages
