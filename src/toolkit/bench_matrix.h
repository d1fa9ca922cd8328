// Many benchmarks as one: every combination of precision, threads, views, tokens, horizon, steps and batch,
// measured in turns, so that what changes over the minutes (clocks, neighbours) falls on all of them alike.
//
// A matrix is a TOML file:
//
//   model = "pi05"              # or checkpoint = "directory" (and robot = "libero")
//   device = "cpu"              # default "auto"
//   precision = ["fp32", "bf16"]
//   threads = [1, 2]            # 0: one per core
//   views = [2]                 # and tokens, horizon, steps, batch: lists; horizon belongs to synthetic
//   weights alone rounds = 5                  # turns; every arm is measured once in each samples = 20 # in a
//   turn warmup_max = 50             # at most, until times are steady; again whenever a policy is opened
//   open = 1                    # policies held at once; with fewer than the matrix needs each turn opens
//   them anew
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "core/json.h"
#include "servoflow/policy.h"
#include "toolkit/bootstrap.h"
#include "toolkit/work.h"

namespace servoflow::toolkit {

struct MatrixArm {
  std::string precision = "auto";
  int threads = 0;
  WorkShape work;
};
// "bf16, 2 threads, 2 views, 200 tokens, horizon 50, 10 steps, batch 1"
std::string arm_text(const MatrixArm& arm);

struct MatrixSpec {
  std::string model, checkpoint, robot, device = "auto";
  std::vector<MatrixArm> arms;
  int rounds = 5, samples = 20, warmup_max = 50, open = 1;
};

// All problems in one error, each with file and field.
Result<MatrixSpec> parse_matrix(std::string_view toml, const std::string& where);
Result<MatrixSpec> read_matrix(const std::string& path);

// One turn of an arm, samples in order; milliseconds.
struct MatrixRound {
  std::vector<double> end_to_end, preprocess, vision, prefix, denoise, postprocess, device;
};

struct ArmResult {
  MatrixArm arm;
  std::string backend, precision, hardware;  // what ran
  double ready_s = 0;
  std::uint64_t device_bytes = 0;
  std::vector<double> warmup_ms;  // of all turns
  bool steady = true;             // false: a warm-up ended at warmup_max while times still fell
  std::vector<MatrixRound> rounds;
  std::string actions;  // hash of the first sample's actions of a turn: the same in every one
  bool same_actions = true;

  Rounds end_to_end() const;
};

struct MatrixResult {
  Json matrix;    // the specification
  Json protocol;  // how, where and with which build it was measured
  std::vector<ArmResult> arms;
  int rounds_wanted = 0;
  bool complete() const;
};

struct MatrixOptions {
  // The state is read from and written to FOLDER/matrix.json after every turn of an arm; empty: nowhere.
  std::string folder;
  PolicyOptions policy;  // tokenizer, assets and progress functions
  // Samples done of all, and what is being measured.
  std::function<void(std::uint64_t done, std::uint64_t total, const std::string& doing)> running;
  std::function<bool()> stop;  // asked after every turn of an arm: true ends the run with what there is
};

// Continues what FOLDER/matrix.json holds; a file of another matrix, build or machine is an error that names
// the difference.
Result<MatrixResult> run_matrix(const MatrixSpec& spec, const MatrixOptions& options);

// With a summary (p50, p95, p99 and their intervals) beside the samples of each arm, unless that would take
// too long.
Json matrix_to_json(const MatrixResult& result, bool summary = true);
// Strict about what is read; `where` starts every line of the error.
Result<MatrixResult> matrix_from_json(const Json& json, const std::string& where);
Result<MatrixResult> read_matrix_result(const std::string& path);

}  // namespace servoflow::toolkit
