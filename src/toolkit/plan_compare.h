// The planner beside figures that others published, and the original effort's table on Jetson Thor term by
// term.
#pragma once

#include <string>
#include <vector>

#include "toolkit/plan_model.h"

namespace servoflow::toolkit {

struct PublishedFigure {
  std::string device, engine, precision, source;
  double ms = 0;
  WorkShape work;
  Prediction prediction;  // of this engine there
};

struct ThorTerm {
  std::string name;
  double measured_ms = 0, weight_gb = 0, gflop = 0;
  double implied_gbs = 0, implied_tflops = 0;                 // if nothing else had taken time
  double at_datasheet_ms = 0, at_high_ms = 0, at_low_ms = 0;  // its bytes at the three bandwidths
  double arithmetic_ms = 0;                                   // its operations at the datasheet's rate
};

struct Published {
  std::vector<PublishedFigure> figures;
  std::string thor_source;
  std::vector<ThorTerm> thor;  // vision, prefix, denoise, denoise with the modulations in every step, other
};

// From profiles/published.toml, or another file of its form.
Result<Published> compare_published();
Result<Published> compare_published(std::string_view toml, const std::string& where);

Json published_to_json(const Published& published);

}  // namespace servoflow::toolkit
