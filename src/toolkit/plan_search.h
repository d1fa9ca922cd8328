// The smallest change of a plan that reaches a rate of inferences, in the order of what it risks; and
// students, smaller networks that would have to be trained.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "toolkit/plan_model.h"

namespace servoflow::toolkit {

// Risk is a rank, not a probability: a plan of less risk is always preferred, whatever its speed. The ranks
// follow what was published about closed loops (docs/planning.md): 8 bits lose nothing measurable; fewer flow
// steps are tolerated better than an old prefix; every second prefix costs little, every third more than half
// of the successes; a smaller network is a new training run.
struct StepRisk {
  int steps, risk;
};
struct ReuseRisk {
  int reuse, risk;
};
struct Student {
  int layers;    // of prefix and expert, of 18
  double width;  // of both, relative
  int risk;
};
std::span<const StepRisk> step_risks();
std::span<const ReuseRisk> reuse_risks();
std::span<const Student> students();

// `base` with fewer layers and narrower prefix and expert; heads, head_dim and vision stay. Widths are
// rounded to 64.
weights::Architecture student_of(const weights::Architecture& base, int layers, double width);

struct TargetOption {
  PlanCase plan;
  Prediction prediction;
  int risk = 0;
  std::vector<std::string> changes;  // in words; empty: none
};

struct TargetResult {
  double hz = 0;
  bool reached = false;
  TargetOption smallest;               // the least risk that reaches it, or the fastest there is
  std::vector<TargetOption> by_lever;  // each lever alone, as far as it must go or can; in order of risk
};

Result<TargetResult> find_target(const PlanCase& base, const DeviceProfile& device, const UsedRates& rates,
                                 double hz);

}  // namespace servoflow::toolkit
