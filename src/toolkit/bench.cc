#include "toolkit/bench.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

#include "core/status_macros.h"
#include "core/zones.h"
#include "policy/neutral_contract.h"
#include "toolkit/bench_robots.h"
#include "toolkit/machine.h"
#include "weights/checkpoint.h"

namespace servoflow::toolkit {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kPeriod = 50;        // repeats after which the noise starts anew, and the actions with it
constexpr int kReadings = 8;       // of the GPU, spread over the repeats
constexpr int kBatchRepeats = 20;  // of every batch size, at most
constexpr std::uint64_t kHostSlack = std::uint64_t{8}
                                     << 20;  // samples, and what the system's allocator keeps

std::uint64_t fnv1a64(std::uint64_t hash, std::span<const float> values) {
  for (const std::byte byte : std::as_bytes(values))
    hash = (hash ^ static_cast<std::uint64_t>(byte)) * 0x100000001b3u;
  return hash;
}

struct Samples {
  std::vector<double> end_to_end, preprocess, vision, prefix, denoise, step, postprocess, device;
};

class Bench {
 public:
  explicit Bench(const BenchOptions& o) : o_(o) {}

  Result<BenchReport> run() {
    SF_RETURN_IF_ERROR(open());
    SF_ASSIGN_OR_RETURN(robots_, BenchRobots::create(policy_, o_, architecture_.vocab));
    BenchReport report;
    report.opened = memory();
    for (int i = 0; i < o_.warmup; ++i) {
      progress(i);
      SF_ASSIGN_OR_RETURN(const double ms, infer());
      report.warmup_ms.push_back(ms);
    }
    SF_RETURN_IF_ERROR(measure(report));
    // Before the probe takes memory of its own.
    report.peak_rss_bytes = peak_resident_bytes();
    if (o_.batches) SF_RETURN_IF_ERROR(measure_batches(report));
    SF_RETURN_IF_ERROR(fill(report));
    return report;
  }

 private:
  Status open() {
    PolicyOptions options = o_.policy;
    options.robot = o_.robot;
    options.max_batch = o_.work.batch;
    options.prepare_steps = {o_.work.steps};
    // Too many are refused below, with the option's name.
    const auto expect_tokens = [&] {
      if (!o_.prompt) options.prompt_tokens = std::min(o_.work.tokens, architecture_.max_tokens);
    };
    if (!o_.synthetic.empty()) {
      SF_ASSIGN_OR_RETURN(architecture_, policy::synthetic_architecture(o_.synthetic, o_.work.horizon));
      expect_tokens();
      SF_ASSIGN_OR_RETURN(policy_, Policy::open_synthetic(o_.synthetic, options, 0, o_.work.horizon));
    } else {
      SF_ASSIGN_OR_RETURN(const weights::Checkpoint checkpoint, weights::open_checkpoint(o_.checkpoint));
      architecture_ = checkpoint.architecture;
      if (o_.horizon_given && o_.work.horizon != architecture_.horizon)
        return Status::invalid("--horizon " + std::to_string(o_.work.horizon) + ": " + o_.checkpoint +
                               " has a horizon of " + std::to_string(architecture_.horizon) +
                               "; only --synthetic weights can have any");
      // Latency needs no robot: a checkpoint that names none is measured from frames to normalised actions.
      if (options.robot.empty() && checkpoint.layout == weights::Layout::kOpenpi) options.robot = "none";
      expect_tokens();
      SF_ASSIGN_OR_RETURN(policy_, Policy::open(o_.checkpoint, options));
    }
    const PolicyInfo& info = policy_.info();
    if (o_.robot_views && o_.synthetic.empty()) {
      SF_ASSIGN_OR_RETURN(const Session session, policy_.new_session({}));
      SF_ASSIGN_OR_RETURN(const int views, required_views(session));
      if (views > 0) o_.work.views = views;
    }
    if (!o_.prompt && o_.work.tokens > info.max_tokens)
      return Status::invalid("--tokens " + std::to_string(o_.work.tokens) + ": the model takes at most " +
                             std::to_string(info.max_tokens));
    if (info.hardware.empty()) {
      if (!o_.ceilings.empty())
        return Status::invalid("--ceilings: are a GPU's; " + info.device + " measures its own");
      return {};
    }
    if (!o_.ceilings.empty()) {
      SF_ASSIGN_OR_RETURN(ceilings_, read_device_peaks(o_.ceilings, info.precision));
    }
    // A second backend on the same (first) device, to look at it and to probe it; it holds next to nothing.
    SF_ASSIGN_OR_RETURN(ops::BackendChoice probe,
                        ops::make_backend({.device = info.devices[0].device, .precision = info.precision}));
    probe_ = std::move(probe.backend);
    const std::optional<ops::DeviceState> state = probe_->device_state();
    watch_ = std::make_unique<GpuWatch>(state ? state->bus : "an unknown address");
    return {};
  }

  void progress(int done) const {
    if (o_.running) o_.running(done, o_.warmup + o_.repeat);
  }

  Result<double> infer() {
    const Clock::time_point begin = Clock::now();
    SF_RETURN_IF_ERROR(robots_.infer(robots_.size(), o_.work.steps));
    return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
  }

  MemoryReading memory() const {
    MemoryReading out{resident_bytes(), {}};
    if (probe_ != nullptr)
      if (const auto state = probe_->device_state())
        out.device_used = state->memory_total - state->memory_free;
    return out;
  }

  // The timed runs. Readings and comparisons happen between them, not in them.
  Status measure(BenchReport& report) {
    GpuBench gpu;
    if (watch_ != nullptr) gpu.before = watch_->read();
    const int settled = o_.repeat / 10, every = std::max(1, o_.repeat / kReadings);
    std::vector<std::uint64_t> hashes;  // of one period
    for (int i = 0; i < o_.repeat; ++i) {
      progress(o_.warmup + i);
      const std::size_t turn = static_cast<std::size_t>(i % kPeriod);
      if (turn == 0) robots_.reset();
      SF_ASSIGN_OR_RETURN(const double ms, infer());
      keep(ms);
      std::uint64_t hash = 0xcbf29ce484222325u;
      for (int r = 0; r < robots_.size(); ++r) hash = fnv1a64(hash, robots_.chunk(r).normalized);
      if (turn == hashes.size()) hashes.push_back(hash);
      report.different_repeats += hash == hashes[turn] ? 0 : 1;
      if (watch_ != nullptr && i % every == every / 2) gpu.during.push_back(watch_->read());
      if (i == settled) report.settled = memory();
    }
    report.ended = memory();
    report.actions_hash = hashes[0];
    report.compared_repeats = std::max(0, o_.repeat - kPeriod);
    if (watch_ == nullptr) return {};
    gpu.after = watch_->read();
    gpu.problem = watch_->problem();
    gpu.limits = watch_->limits();
    report.gpu = std::move(gpu);
    return {};
  }

  void keep(double ms) {
    samples_.end_to_end.push_back(ms);
    double before = 0, after = 0;
    for (int r = 0; r < robots_.size(); ++r) {
      before += robots_.chunk(r).times.preprocess;
      after += robots_.chunk(r).times.postprocess;
    }
    const StageTimes& t = robots_.chunk(0).times;  // the network ran once for all
    recorded_ += t.recorded ? 1 : 0;
    samples_.preprocess.push_back(before);
    samples_.vision.push_back(t.vision);
    samples_.prefix.push_back(t.prefix);
    samples_.denoise.push_back(t.denoise);
    samples_.step.insert(samples_.step.end(), t.steps.begin(), t.steps.end());
    samples_.postprocess.push_back(after);
    if (t.device > 0) samples_.device.push_back(t.device);
  }

  Status measure_batches(BenchReport& report) {
    std::vector<std::vector<float>> alone;
    robots_.reset();
    for (int r = 0; r < robots_.size(); ++r) {
      SF_RETURN_IF_ERROR(robots_.infer_alone(r, o_.work.steps));
      alone.push_back(robots_.chunk(r).normalized);
    }
    for (int size = 1; size <= robots_.size(); ++size) {
      BatchBench batch{.size = size, .equals_alone = true};
      std::vector<double> samples;
      for (int i = 0; i <= std::min(o_.repeat, kBatchRepeats); ++i) {
        robots_.reset();
        const Clock::time_point begin = Clock::now();
        SF_RETURN_IF_ERROR(robots_.infer(size, o_.work.steps));
        const double ms = std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
        if (i > 0) samples.push_back(ms);  // the first one may record
        for (int r = 0; r < size; ++r) {
          const std::vector<float>&got = robots_.chunk(r).normalized,
                &want = alone[static_cast<std::size_t>(r)];
          batch.equals_alone = batch.equals_alone && got.size() == want.size() &&
                               std::memcmp(got.data(), want.data(), want.size() * sizeof(float)) == 0;
          for (std::size_t e = 0; e < std::min(got.size(), want.size()); ++e)
            batch.difference = std::max<double>(batch.difference, std::abs(got[e] - want[e]));
        }
      }
      batch.ms = describe(std::move(samples));
      report.batches.push_back(std::move(batch));
    }
    return {};
  }

  Status fill(BenchReport& report) {
    const PolicyInfo& info = policy_.info();
    report.model = info.checkpoint;
    report.layout = info.layout;
    report.device = info.device;
    report.backend = info.backend;
    report.precision = info.precision;
    report.precisions = info.components;
    report.weight_bytes = info.weight_bytes;
    report.hardware = info.hardware;
    report.threads = info.threads;
    report.repeat = o_.repeat;
    report.warmup = o_.warmup;
    report.ragged = o_.ragged;
    report.soak = o_.soak;
    report.work = o_.work;
    report.work.horizon = info.horizon;
    report.work.tokens = robots_.chunk(0).prefix_tokens - o_.work.views * architecture_.vision.tokens();
    report.ready_s = info.ready_seconds;
    report.prepared = info.devices[0].prepared;
    report.recorded = recorded_;
    report.device_bytes = info.weight_bytes + info.workspace_bytes;
    report.end_to_end = describe(std::move(samples_.end_to_end));
    if (!samples_.device.empty()) report.device_ms = describe(std::move(samples_.device));
    const double size = info.precision == "fp32" ? 4 : 2;
    // Matrices of 8 and 4 bits move as many bytes as they take.
    double weight_size = size, packed = 0, parameters = 0;
    for (const ComponentPrecision& c : info.components) {
      packed += static_cast<double>(c.weight_bytes);
      parameters += static_cast<double>(c.parameters);
    }
    if (info.precision != "fp32" && info.precision != "bf16" && parameters > 0)
      weight_size = packed / parameters;
    std::vector<WorkShape> shapes = robots_.shapes();
    for (WorkShape& shape : shapes) {
      shape.horizon = info.horizon;
      if (!o_.ragged) shape.tokens = report.work.tokens;
    }
    const Work work = count_batch(architecture_, shapes, weight_size, size);
    report.stages = {{"preprocess", describe(std::move(samples_.preprocess)), {}},
                     {"vision", describe(std::move(samples_.vision)), work.vision},
                     {"prefix", describe(std::move(samples_.prefix)), work.prefix},
                     {"denoise", describe(std::move(samples_.denoise)), work.denoise},
                     {"step", describe(std::move(samples_.step)), work.step},
                     {"postprocess", describe(std::move(samples_.postprocess)), {}}};
    report.machine = machine_json();
    report.build = build_json();
    if (o_.components) {
      zones::enable(true);
      const Result<double> traced = infer();
      zones::enable(false);
      SF_RETURN_IF_ERROR(traced.status());
      report.components = component_table(zones::collect());
    }
    if (ceilings_) {
      report.device_peaks = ceilings_;
    } else if (o_.peaks && probe_ != nullptr) {
      SF_ASSIGN_OR_RETURN(report.device_peaks, measure_device_peaks(*probe_));
    } else if (o_.peaks) {
      report.peaks = measure_peaks(info.threads);
    }
    return {};
  }

  BenchOptions o_;
  weights::Architecture architecture_;
  Policy policy_;
  BenchRobots robots_;
  std::unique_ptr<ops::Backend> probe_;
  std::unique_ptr<GpuWatch> watch_;
  std::optional<DevicePeaks> ceilings_;
  Samples samples_;
  int recorded_ = 0;
};

}  // namespace

Result<BenchReport> run_bench(const BenchOptions& options) { return Bench(options).run(); }

Status bench_outcome(const BenchReport& r) {
  std::string problems;
  const auto problem = [&](const std::string& text) { problems += (problems.empty() ? "" : "\n") + text; };
  if (r.different_repeats > 0)
    problem(std::to_string(r.different_repeats) + " of " + std::to_string(r.compared_repeats) +
            " repeats of the same work gave other actions than before");
  for (const BatchBench& b : r.batches)
    if (!b.equals_alone)
      problem("batch of " + std::to_string(b.size) + ": a request has other bits than alone, by at most " +
              std::to_string(b.difference));
  if (r.soak) {
    if (r.ended.resident > r.settled.resident + kHostSlack)
      problem("host memory grew by " + std::to_string(r.ended.resident - r.settled.resident) +
              " bytes over the repeats");
    if (r.ended.device_used && r.settled.device_used && *r.ended.device_used > *r.settled.device_used)
      problem("GPU memory grew by " + std::to_string(*r.ended.device_used - *r.settled.device_used) +
              " bytes over the repeats");
  }
  return problems.empty() ? Status() : Status::check_failed(problems);
}

}  // namespace servoflow::toolkit
