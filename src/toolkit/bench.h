// How fast a policy is here: latency from frames in host memory to robot actions in host memory, per stage
// and end to end, with raw samples, next to the work that had to be done and to what the machine could do at
// most.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "core/json.h"
#include "servoflow/policy.h"
#include "toolkit/peaks.h"
#include "toolkit/statistics.h"
#include "toolkit/trace.h"
#include "toolkit/work.h"

namespace servoflow::toolkit {

struct BenchOptions {
  std::string checkpoint;             // a directory, or empty:
  std::string synthetic;              // "pi05", "tiny" or an architecture file
  std::string robot;                  // for checkpoints without a contract of their own
  std::optional<std::string> prompt;  // instead of token ids; then the tokens are counted
  WorkShape work;
  int repeat = 20, warmup = 3;
  bool peaks = true;        // measure the machine's ceilings too
  bool components = false;  // one more inference, traced, for the time per component
  PolicyOptions policy;
  std::function<void(int done, int total)> running;
  bool horizon_given = false;  // work.horizon was asked for: a checkpoint with another one is refused
};

struct StageBench {
  std::string name;
  Distribution ms;
  StageWork work;  // of one sample; zero for host stages
};

struct BenchReport {
  std::string model, layout, device, backend, precision, hardware;
  int threads = 0, repeat = 0, warmup = 0;
  WorkShape work;
  double ready_s = 0;
  std::uint64_t peak_rss_bytes = 0, device_bytes = 0;
  Distribution end_to_end;
  std::vector<double> warmup_ms;   // end to end, the first call first
  std::vector<StageBench> stages;  // preprocess, vision, prefix, denoise, step, postprocess
  std::optional<Peaks> peaks;
  std::vector<Component> components;
  Json machine, build;
};

Result<BenchReport> run_bench(const BenchOptions& options);

std::string bench_text(const BenchReport& report);
// The documented schema: {work, precision, device, ready_s, peak_rss_bytes, device_bytes, end_to_end_ms,
// stages_ms, machine, build} and, beyond it, {model, backend, threads, hardware, warmup_ms, rates, peaks,
// components}.
Json bench_to_json(const BenchReport& report);

}  // namespace servoflow::toolkit
