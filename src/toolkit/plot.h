// An action chunk as a picture: one small plot per action dimension over the horizon, as a self-contained SVG
// file.
#pragma once

#include <string>
#include <vector>

#include "servoflow/action_chunk.h"

namespace servoflow::toolkit {

struct PlotOptions {
  std::string title, subtitle;
  std::vector<std::string> labels;  // per dimension; missing ones are "a<i>"
  std::string unit = "robot units";
};

std::string plot_actions_svg(const ActionChunk& chunk, const PlotOptions& options);

// Round numbers that cover [low, high] in 2 to 6 steps, in ascending order. Exposed for its test.
std::vector<double> axis_ticks(double low, double high);

}  // namespace servoflow::toolkit
