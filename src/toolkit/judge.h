// Compares one recomputed stage with what a reference recorded, and says by how much it is inside the gate.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "contract/contract.h"
#include "core/json.h"
#include "core/shape.h"
#include "toolkit/case_file.h"

namespace servoflow::toolkit {

// One case, one stage.
struct Record {
  std::string case_name, stage, group;
  double max_abs = 0;    // largest |difference|
  double rms = 0;        // root mean square of the expectation
  double relative = 0;   // max_abs / rms
  double rms_error = 0;  // rms of the difference / rms
  double cosine = 1;
  Gates gates;          // none set: reported, not judged
  double headroom = 0;  // how many times the error would fit into the tightest gate; below 1 fails
  bool judged = false, pass = true;
  std::string note;  // the cause of a failure that numbers do not tell: a shape, a NaN, a token
};

// Headroom of a stage without any error; also its ceiling, so that it stays a number in JSON.
inline constexpr double kMaxHeadroom = 1e6;

struct Values {
  Shape shape;
  std::vector<double> data;
};

// Judges by the gates given; without gates only a shape or a value that is not finite fails.
Record judge_stage(const StageName& stage, const Values& expected, const Values& got, const Gates& gates);

// Robot actions: every column on its own scale. Allowed is share * |scale[column]| * normalized_rms + |value|
// * 2^-22. The last term is what float32 actions are rounded by; it matters for the column whose statistics
// are degenerate.
Record judge_actions(const Values& expected, const Values& got, const Gates& gates,
                     std::span<const double> scale, double normalized_rms);

// Token ids (padded with 0) and their mask: equal or not.
Record judge_exact(const StageName& stage, const Values& expected, const Values& got);

// Robot units per unit of the normalised action, for `width` columns; 1 where there are no statistics.
std::vector<double> action_scale(const contract::Normalization& norm, int width);

double root_mean_square(std::span<const double> values);

// {case, stage, max_abs, rms, relative, rms_error, cosine, tolerance, headroom, pass, gates, note}.
// `tolerance` is the first gate set of max, rms, cosine. Without a gate tolerance, headroom and pass are
// null, unless the stage failed.
Json record_to_json(const Record& record);

}  // namespace servoflow::toolkit
