#include "toolkit/bench.h"

#include <algorithm>
#include <chrono>

#include "contract/canonical.h"
#include "contract/validate.h"
#include "core/status_macros.h"
#include "core/zones.h"
#include "policy/neutral_contract.h"
#include "toolkit/machine.h"
#include "weights/checkpoint.h"

namespace servoflow::toolkit {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kFrame = 224;  // side of the frames, whatever the model's own size is

// Frames, state and tokens of one robot, made up but the same in every run.
struct Robot {
  std::vector<std::string> slots;
  std::vector<std::vector<std::uint8_t>> frames;
  std::vector<double> state;
  std::vector<std::int32_t> tokens;
  Observation observation;
};

std::uint32_t next_random(std::uint32_t& state) {
  state = state * 1664525u + 1013904223u;  // an LCG is random enough for pixels
  return state >> 8;
}

Result<Robot> make_robot(const contract::Contract& contract, const BenchOptions& o, int vocab, int index) {
  Robot out;
  for (const contract::CameraSlot& c : contract.cameras)
    if (!c.key.empty()) out.slots.push_back(c.slot);
  const auto views = static_cast<std::size_t>(o.work.views);
  if (out.slots.size() < views)
    return Status::invalid("--views " + std::to_string(views) + ": robot " + contract.name + " has " +
                           std::to_string(out.slots.size()) + " cameras");
  out.slots.resize(views);
  auto random = static_cast<std::uint32_t>(index + 1);
  for (std::size_t i = 0; i < views; ++i) {
    std::vector<std::uint8_t>& frame = out.frames.emplace_back(static_cast<std::size_t>(kFrame) * kFrame * 3);
    for (std::uint8_t& value : frame) value = static_cast<std::uint8_t>(next_random(random));
  }
  out.state.resize(static_cast<std::size_t>(contract::state_width(contract)));
  if (!o.prompt)
    for (int i = 0; i < o.work.tokens; ++i)
      out.tokens.push_back(
          static_cast<std::int32_t>(next_random(random) % static_cast<std::uint32_t>(vocab)));
  return out;
}

// The observation borrows from the robot, which must have found its place in memory.
void connect(Robot& robot, const BenchOptions& o) {
  for (std::size_t i = 0; i < robot.slots.size(); ++i)
    robot.observation.images.push_back({robot.slots[i], ImageLayout::kHWC, kFrame, kFrame, robot.frames[i]});
  robot.observation.state = robot.state;
  robot.observation.tokens = robot.tokens;
  if (o.prompt) robot.observation.prompt = *o.prompt;
}

struct Samples {
  std::vector<double> end_to_end, preprocess, vision, prefix, denoise, step, postprocess;
};

class Bench {
 public:
  explicit Bench(const BenchOptions& o) : o_(o) {}

  Result<BenchReport> run() {
    SF_RETURN_IF_ERROR(open());
    SF_RETURN_IF_ERROR(make_robots());
    BenchReport report;
    for (int i = 0; i < o_.warmup + o_.repeat; ++i) {
      if (o_.running) o_.running(i, o_.warmup + o_.repeat);
      SF_ASSIGN_OR_RETURN(const double ms, infer());
      if (i < o_.warmup)
        report.warmup_ms.push_back(ms);
      else
        keep(ms);
    }
    // Before the probe takes memory of its own.
    report.peak_rss_bytes = peak_resident_bytes();
    SF_RETURN_IF_ERROR(fill(report));
    return report;
  }

 private:
  Status open() {
    PolicyOptions options = o_.policy;
    options.robot = o_.robot;
    options.max_batch = o_.work.batch;
    if (!o_.synthetic.empty()) {
      SF_ASSIGN_OR_RETURN(architecture_, policy::synthetic_architecture(o_.synthetic, o_.work.horizon));
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
      SF_ASSIGN_OR_RETURN(policy_, Policy::open(o_.checkpoint, options));
    }
    if (!o_.prompt && o_.work.tokens > policy_.info().max_tokens)
      return Status::invalid("--tokens " + std::to_string(o_.work.tokens) + ": the model takes at most " +
                             std::to_string(policy_.info().max_tokens));
    return {};
  }

  Status make_robots() {
    for (int i = 0; i < o_.work.batch; ++i) {
      SF_ASSIGN_OR_RETURN(Session session, policy_.new_session({.seed = static_cast<std::uint64_t>(i)}));
      SF_ASSIGN_OR_RETURN(const Json json, parse_json(session.contract_json(), "contract"));
      SF_ASSIGN_OR_RETURN(const contract::Contract contract, contract::contract_from_json(json, "contract"));
      SF_ASSIGN_OR_RETURN(Robot robot, make_robot(contract, o_, architecture_.vocab, i));
      robots_.push_back(std::move(robot));
      sessions_.push_back(std::move(session));
    }
    for (std::size_t i = 0; i < robots_.size(); ++i) {
      connect(robots_[i], o_);
      session_pointers_.push_back(&sessions_[i]);
      observations_.push_back(&robots_[i].observation);
    }
    chunks_.resize(robots_.size());
    return {};
  }

  Result<double> infer() {
    const InferOptions options{.steps = o_.work.steps};
    const Clock::time_point begin = Clock::now();
    if (sessions_.size() == 1)
      SF_RETURN_IF_ERROR(sessions_[0].infer_into(robots_[0].observation, options, chunks_[0]));
    else
      SF_RETURN_IF_ERROR(infer_batch(session_pointers_, observations_, options, chunks_));
    return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
  }

  void keep(double ms) {
    samples_.end_to_end.push_back(ms);
    double before = 0, after = 0;
    for (const ActionChunk& c : chunks_) {
      before += c.times.preprocess;
      after += c.times.postprocess;
    }
    const StageTimes& t = chunks_[0].times;  // the network ran once for all
    samples_.preprocess.push_back(before);
    samples_.vision.push_back(t.vision);
    samples_.prefix.push_back(t.prefix);
    samples_.denoise.push_back(t.denoise);
    samples_.step.insert(samples_.step.end(), t.steps.begin(), t.steps.end());
    samples_.postprocess.push_back(after);
  }

  Status fill(BenchReport& report) {
    const PolicyInfo& info = policy_.info();
    report.model = info.checkpoint;
    report.layout = info.layout;
    report.device = info.device;
    report.backend = info.backend;
    report.precision = info.precision;
    report.hardware = info.hardware;
    report.threads = info.threads;
    report.repeat = o_.repeat;
    report.warmup = o_.warmup;
    report.work = o_.work;
    report.work.horizon = info.horizon;
    report.work.tokens = chunks_[0].prefix_tokens - o_.work.views * architecture_.vision.tokens();
    report.ready_s = info.ready_seconds;
    report.device_bytes = info.weight_bytes + info.workspace_bytes;
    report.end_to_end = describe(std::move(samples_.end_to_end));
    const double size = info.precision == "fp32" ? 4 : 2;
    const Work work = count_work(architecture_, report.work, size, size);
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
    // The peaks are the CPU's: a GPU's rates stand without a share of them.
    if (o_.peaks && info.hardware.empty()) report.peaks = measure_peaks(info.threads);
    return {};
  }

  const BenchOptions& o_;
  weights::Architecture architecture_;
  Policy policy_;
  std::vector<Robot> robots_;
  std::vector<Session> sessions_;
  std::vector<Session*> session_pointers_;
  std::vector<const Observation*> observations_;
  std::vector<ActionChunk> chunks_;
  Samples samples_;
};

}  // namespace

Result<BenchReport> run_bench(const BenchOptions& options) { return Bench(options).run(); }

}  // namespace servoflow::toolkit
