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
#include "toolkit/device_peaks.h"
#include "toolkit/gpu_watch.h"
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
  bool robot_views =
      false;             // a checkpoint's robot gets a picture of each camera it must have, not work.views
  std::string ceilings;  // file of a GPU's ceilings instead of measuring them (device_peaks.h)
  bool ragged = false;   // the requests of a batch differ in tokens and views
  bool batches = false;  // also every batch of 1 to work.batch, each request compared with itself alone
  bool soak = false;     // growth of memory over the repeats is a failure
};

struct StageBench {
  std::string name;
  Distribution ms;
  StageWork work;  // of one sample; zero for host stages
};

// The GPU's state around the timed runs; readings are empty where `problem` says why.
struct GpuBench {
  std::string problem;
  Json limits;
  GpuReading before, after;
  std::vector<GpuReading> during;
};

struct MemoryReading {
  std::uint64_t resident = 0;                // of this process on the host
  std::optional<std::uint64_t> device_used;  // of the whole GPU, by anyone
};

struct BatchBench {
  int size = 0;
  Distribution ms;
  bool equals_alone = false;  // every request has the bits it has alone
  double difference = 0;      // the largest of any normalised action
};

struct BenchReport {
  std::string model, layout, device, backend, precision, hardware;
  std::vector<ComponentPrecision> precisions;  // part by part
  std::uint64_t weight_bytes = 0;
  int threads = 0, repeat = 0, warmup = 0;
  WorkShape work;
  double ready_s = 0;
  int prepared = 0,
      recorded = 0;  // records made before ready; samples in which the device had to record first
  std::uint64_t peak_rss_bytes = 0, device_bytes = 0;
  Distribution end_to_end;
  std::optional<Distribution> device_ms;    // by the GPU's own clock, first copy in to last copy out
  std::vector<double> warmup_ms;            // end to end, the first call first
  std::vector<StageBench> stages;           // preprocess, vision, prefix, denoise, step, postprocess
  std::optional<Peaks> peaks;               // the CPU's
  std::optional<DevicePeaks> device_peaks;  // the GPU's
  std::optional<GpuBench> gpu;
  MemoryReading opened, settled,
      ended;  // before the first call, after a tenth of the repeats, after the last
  bool ragged = false, soak = false;
  std::uint64_t actions_hash = 0;  // of the first repeat's normalised actions, all requests
  // The noise starts anew every 50 repeats: what had been computed before, and how much came out different.
  int compared_repeats = 0, different_repeats = 0;
  std::vector<BatchBench> batches;
  std::vector<Component> components;
  Json machine, build;
};

Result<BenchReport> run_bench(const BenchOptions& options);

// check_failed when repeats or batches gave other bits, or when memory grew in a soak.
Status bench_outcome(const BenchReport& report);

std::string bench_text(const BenchReport& report);
// The documented schema: {work, precision, device, ready_s, peak_rss_bytes, device_bytes, end_to_end_ms,
// stages_ms, machine, build} and, beyond it, {model, backend, threads, hardware, warmup_ms, device_ms, rates,
// peaks, device_peaks, gpu, memory, actions, batches, components, records}.
Json bench_to_json(const BenchReport& report);

}  // namespace servoflow::toolkit
