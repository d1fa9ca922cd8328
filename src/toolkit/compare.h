// Two ways to run one policy, side by side on recorded cases: checkpoints, precisions or devices. Says layer
// by layer, step by step and action by action what the second changes, and judges it by gates that fail
// closed.
#pragma once

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "core/json.h"
#include "servoflow/policy.h"
#include "toolkit/case_file.h"
#include "toolkit/html_report.h"

namespace servoflow::toolkit {

// Sums over pairs of elements, a the original.
struct Difference {
  std::uint64_t count = 0, not_finite = 0;  // not finite pairs are in no sum
  double dot = 0, aa = 0, bb = 0, absolute = 0, squared = 0, largest = 0;
  void add(double a, double b);
  void add(const Difference& other);
  double cosine() const;    // 1 where both are all zero, 0 where one is
  double relative() const;  // ‖b - a‖ / ‖a‖
  double mae() const { return count > 0 ? absolute / static_cast<double>(count) : 0; }
  double mse() const { return count > 0 ? squared / static_cast<double>(count) : 0; }
};

struct CompareSide {
  std::string checkpoint, device = "auto", precision = "auto";
};

struct CompareOptions {
  CompareSide a, b;
  std::string cases;   // folder; empty: A's own cases
  std::string gates;   // "", "noise", "trained", or a file (compare_gates.h)
  bool layers = true;  // inputs of every linear layer; devices that show none are compared by stages alone
  std::string tokenizer, assets;
  int threads = 0;
  int limit = 0;  // cases at most; 0: all
  // Instead of recorded cases: this many observations of random pictures, tokens and noise. For random
  // weights, which no robot ever met.
  int random_cases = 0, random_views = 2, random_tokens = 48;
  std::uint64_t seed = 0;
  ProgressFunction loading;
  std::function<void(int done, int total, const std::string& next)> running;
};

// One intermediate tensor, over all cases. `name`: a stage's ("step3/v"), or that of the linear layers that
// read it, with its step.
struct ComparedTensor {
  std::string name, group;  // group: "vision", "k", "v", "velocity", "x" or "input"
  int step = -1;
  Difference total;
  double growth = 0;           // relative error / that of the tensor before it; 0 for the first
  int channels = 0, dead = 0;  // dead: zero in all rows of B, not so in A
  std::string worst_case;      // by cosine
  double worst_cosine = 1;
};

struct ComparedAction {
  int index = 0;
  std::string name, unit;     // of the robot's contract, where it has them
  std::string label() const;  // "x [m]"; "a0" for a column that nobody named
  Difference total;           // in robot units, or normalised where cases say no units
  std::string worst_case;
  int worst_row = -1;  // of the chunk
  double worst_a = 0, worst_b = 0;
};

struct GateResult {
  std::string metric;
  std::optional<double> least, most, value;
  bool pass = false;
  std::string why;  // where a bound comes from, or why there is no value
};

struct SideReport {
  std::string checkpoint, device, backend, precision;
  std::uint64_t weight_bytes = 0, workspace_bytes = 0;
  double milliseconds = 0;  // median of the watched runs: for orientation, not a benchmark
};

struct CompareReport {
  SideReport a, b;
  std::string cases;
  std::vector<std::string> case_names;
  std::vector<ComparedTensor> tensors;  // in the order of the pipeline
  std::vector<ComparedAction> actions;
  bool robot_units = false;
  Difference normalized;  // actions of the flow
  std::map<std::string, double> metrics;
  std::vector<GateResult> gates;
  std::vector<std::string> notes;
  bool layers = false;
};

Result<CompareReport> compare(const CompareOptions& options);
// check_failed when a gate failed, or a value is not finite; without gates only the latter.
Status compare_outcome(const CompareReport& report);
// The first tensor whose relative error exceeds `tolerance`, or null.
const ComparedTensor* first_beyond(const CompareReport& report, double tolerance);

std::string compare_text(const CompareReport& report);
Json compare_to_json(const CompareReport& report);
HtmlReport compare_html(const CompareReport& report);

}  // namespace servoflow::toolkit
