// The few types that cross from one stage to the next. Stages include this file and never each other.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "ops/ops.h"

namespace servoflow::stages {

// One axis of a resampling: `table` as ops::Frame describes it. Empty until it is built.
struct AxisTable {
  int in = 0, out = 0, taps = 0;
  std::vector<std::int32_t> table;
};

// A frame as the robot sent it, for a network that makes the picture itself.
struct RawFrame {
  std::span<const std::uint8_t> bytes;  // borrowed until the inference ends
  ops::Frame frame;                     // all but its offsets
  AxisTable columns, rows;
};

// One camera picture, valid ones only: at model size, or the frame it comes from.
struct CameraPicture {
  int slot = 0;               // index into the contract's cameras
  std::vector<float> pixels;  // [image, image, 3] in [-1, 1]
  bool is_raw = false;        // `raw` holds the picture, `pixels` holds nothing of it
  RawFrame raw;
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
