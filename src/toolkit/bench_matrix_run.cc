// Measuring a matrix: turns, policies that come and go, warm-up, and a file that a killed run continues from.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <list>
#include <map>
#include <memory>

#include "core/file.h"
#include "core/status_macros.h"
#include "policy/neutral_contract.h"
#include "toolkit/bench.h"
#include "toolkit/bench_matrix.h"
#include "toolkit/bench_robots.h"
#include "toolkit/machine.h"
#include "toolkit/writers.h"
#include "weights/checkpoint.h"

namespace servoflow::toolkit {
namespace {

using Clock = std::chrono::steady_clock;

std::string state_path(const std::string& folder) {
  return (std::filesystem::path(folder) / "matrix.json").string();
}

Json spec_to_json(const MatrixSpec& s) {
  Json arms = Json::array();
  for (const MatrixArm& a : s.arms) arms.push_back(arm_text(a));
  return {{"model", s.model},           {"checkpoint", s.checkpoint},
          {"robot", s.robot},           {"device", s.device},
          {"rounds", s.rounds},         {"samples", s.samples},
          {"warmup_max", s.warmup_max}, {"open", s.open},
          {"arms", std::move(arms)}};
}

std::string hash_of(const BenchRobots& robots) {
  std::uint64_t hash = 0xcbf29ce484222325u;
  for (int r = 0; r < robots.size(); ++r)
    for (const std::byte byte : std::as_bytes(std::span(robots.chunk(r).normalized)))
      hash = (hash ^ static_cast<std::uint64_t>(byte)) * 0x100000001b3u;
  return fmt::format("{:016x}", hash);
}

// A policy in memory with the robots of the arms that use it.
struct Opened {
  std::string key;
  Policy policy;
  std::map<std::size_t, std::unique_ptr<BenchRobots>> robots;  // by arm
};

class Runner {
 public:
  Runner(const MatrixSpec& spec, const MatrixOptions& options) : spec_(spec), o_(options) {}

  Result<MatrixResult> run() {
    SF_RETURN_IF_ERROR(begin());
    total_ = static_cast<std::uint64_t>(spec_.arms.size()) *
             static_cast<std::uint64_t>(spec_.rounds * spec_.samples);
    for (const ArmResult& a : result_.arms)
      done_ += static_cast<std::uint64_t>(a.rounds.size()) * static_cast<std::uint64_t>(spec_.samples);
    for (int round = 0; round < spec_.rounds; ++round) {
      for (std::size_t i = 0; i < spec_.arms.size(); ++i) {
        // Forth and back, so that a drift over a round favours nobody.
        const std::size_t index = round % 2 == 0 ? i : spec_.arms.size() - 1 - i;
        ArmResult& arm = result_.arms[index];
        if (static_cast<int>(arm.rounds.size()) > round) continue;  // of an earlier run
        SF_RETURN_IF_ERROR(turn(index).with_context(arm_text(arm.arm)));
        SF_RETURN_IF_ERROR(save());
        if (o_.stop && o_.stop()) return std::move(result_);
      }
    }
    result_.protocol["machine_after"] = machine_json();
    SF_RETURN_IF_ERROR(save());
    return std::move(result_);
  }

 private:
  // A new result, or the one that is continued.
  Status begin() {
    result_.matrix = spec_to_json(spec_);
    result_.rounds_wanted = spec_.rounds;
    result_.protocol = protocol();
    for (const MatrixArm& a : spec_.arms) result_.arms.push_back({.arm = a});
    if (!spec_.checkpoint.empty()) {
      SF_ASSIGN_OR_RETURN(const weights::Checkpoint checkpoint, weights::open_checkpoint(spec_.checkpoint));
      vocab_ = checkpoint.architecture.vocab;
      max_tokens_ = checkpoint.architecture.max_tokens;
      openpi_ = checkpoint.layout == weights::Layout::kOpenpi;
      for (ArmResult& a : result_.arms) a.arm.work.horizon = checkpoint.architecture.horizon;
    } else {
      SF_ASSIGN_OR_RETURN(const weights::Architecture architecture,
                          policy::synthetic_architecture(spec_.model, spec_.arms[0].work.horizon));
      vocab_ = architecture.vocab;
      max_tokens_ = architecture.max_tokens;
    }
    for (const MatrixArm& a : spec_.arms)
      if (a.work.tokens > max_tokens_)
        return Status::invalid(
            fmt::format("tokens {}: the model takes at most {}", a.work.tokens, max_tokens_));
    if (o_.folder.empty()) return {};
    std::error_code problem;
    std::filesystem::create_directories(o_.folder, problem);
    if (problem) return Status::runtime(o_.folder + ": cannot be made: " + problem.message());
    const std::string path = state_path(o_.folder);
    if (!std::filesystem::exists(path)) return {};
    SF_ASSIGN_OR_RETURN(MatrixResult before, read_matrix_result(path));
    return resume(std::move(before), path);
  }

  Status resume(MatrixResult before, const std::string& path) {
    std::string differ;
    const auto compare = [&](const char* what, const Json& then, const Json& now) {
      if (then != now)
        differ +=
            fmt::format("{}{} was {}, is {}", differ.empty() ? "" : "; ", what, then.dump(), now.dump());
    };
    for (const char* key :
         {"model", "checkpoint", "robot", "device", "rounds", "samples", "warmup_max", "open", "arms"})
      compare(key, before.matrix.value(key, Json()), result_.matrix[key]);
    const Json &then = before.protocol, &now = result_.protocol;
    const auto field = [](const Json& json, const char* block, const char* key) {
      return json.is_object() && json.contains(block) && json[block].is_object()
                 ? json[block].value(key, Json())
                 : Json();
    };
    for (const char* key : {"cpu", "cores"})
      compare(key, field(then, "machine", key), field(now, "machine", key));
    for (const char* key : {"revision", "compiler", "flags", "type"})
      compare(key, field(then, "build", key), field(now, "build", key));
    if (before.arms.size() != result_.arms.size()) differ += differ.empty() ? "other arms" : "; other arms";
    if (!differ.empty())
      return Status::invalid(path + ": holds another measurement and would be mixed with this one: " +
                             differ + ". Choose another folder, or remove it");
    const Json parts = then.value("continued", Json::array());
    result_ = std::move(before);
    if (!result_.complete()) {
      result_.protocol["continued"] = parts.is_array() ? parts : Json::array();
      result_.protocol["continued"].push_back({{"machine", machine_json()}});
    }
    return {};
  }

  Json protocol() const {
    return {
        {"what",
         "latency from frames in host memory to robot actions in host memory; nothing else is inside the "
         "timed "
         "region; uploads, downloads and waiting for the device are"},
        {"clock", "std::chrono::steady_clock around the call; stages by the engine's own marks"},
        {"order", "every arm once in each round, forth and back; policies that do not fit are opened anew"},
        {"warm_up",
         fmt::format(
             "after a policy was opened until the medians of two windows of 3 agree to 5 %, at most {} "
             "calls; one call before every later turn; kept apart",
             spec_.warmup_max)},
        {"noise",
         "seeded, from its beginning in every turn, so that the actions of all turns have the same bits"},
        {"statistics",
         "quantiles interpolate linearly; 95 % intervals by 2000 bootstrap resamples of rounds and of "
         "samples within them"},
        {"machine", machine_json()},
        {"build", build_json()},
        {"gpu", Json::array()}};
  }

  std::string key_of(const MatrixArm& a) const {
    // A GPU shapes its work for the tokens to expect; a CPU does not.
    return fmt::format("{}|{}|{}|{}|{}", a.precision, a.threads, a.work.horizon, a.work.batch,
                       spec_.device == "cpu" ? 0 : a.work.tokens);
  }

  Result<Opened*> open(std::size_t index, bool& fresh) {
    const MatrixArm& arm = spec_.arms[index];
    const std::string key = key_of(arm);
    for (auto it = open_.begin(); it != open_.end(); ++it)
      if (it->key == key) {
        open_.splice(open_.begin(), open_, it);
        return &open_.front();
      }
    while (open_.size() >= static_cast<std::size_t>(spec_.open)) open_.pop_back();
    fresh = true;
    PolicyOptions options = o_.policy;
    options.device = spec_.device;
    options.precision = arm.precision;
    options.threads = arm.threads;
    options.robot = spec_.robot;
    options.max_batch = arm.work.batch;
    options.prompt_tokens = arm.work.tokens;
    options.prepare_steps.clear();
    for (const MatrixArm& other : spec_.arms)
      if (key_of(other) == key && options.prepare_steps.size() < 4 &&
          std::find(options.prepare_steps.begin(), options.prepare_steps.end(), other.work.steps) ==
              options.prepare_steps.end())
        options.prepare_steps.push_back(other.work.steps);
    if (options.robot.empty() && openpi_) options.robot = "none";
    Opened opened{.key = key};
    if (spec_.checkpoint.empty()) {
      SF_ASSIGN_OR_RETURN(opened.policy, Policy::open_synthetic(spec_.model, options, 0, arm.work.horizon));
    } else {
      SF_ASSIGN_OR_RETURN(opened.policy, Policy::open(spec_.checkpoint, options));
    }
    open_.push_front(std::move(opened));
    SF_RETURN_IF_ERROR(watch(open_.front().policy.info()));
    return &open_.front();
  }

  Status watch(const PolicyInfo& info) {
    if (info.hardware.empty() || watch_ != nullptr) return {};
    SF_ASSIGN_OR_RETURN(const ops::BackendChoice probe,
                        ops::make_backend({.device = info.devices[0].device, .precision = info.precision}));
    const std::optional<ops::DeviceState> state = probe.backend->device_state();
    watch_ = std::make_unique<GpuWatch>(state ? state->bus : "an unknown address");
    result_.protocol["gpu_limits"] = watch_->limits();
    result_.protocol["gpu_problem"] = watch_->problem().empty() ? Json() : Json(watch_->problem());
    return {};
  }

  Result<double> infer(BenchRobots& robots, const MatrixArm& arm) {
    const Clock::time_point begin = Clock::now();
    SF_RETURN_IF_ERROR(robots.infer(robots.size(), arm.work.steps));
    return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
  }

  Status turn(std::size_t index) {
    ArmResult& arm = result_.arms[index];
    bool fresh = false;
    SF_ASSIGN_OR_RETURN(Opened* const opened, open(index, fresh));
    const PolicyInfo& info = opened->policy.info();
    arm.backend = info.backend;
    arm.precision = info.precision;
    arm.hardware = info.hardware;
    arm.device_bytes = info.weight_bytes + info.workspace_bytes;
    if (fresh) arm.ready_s = info.ready_seconds;
    std::unique_ptr<BenchRobots>& robots = opened->robots[index];
    bool first = robots == nullptr;
    if (first) {
      BenchOptions options;
      options.work = arm.arm.work;
      SF_ASSIGN_OR_RETURN(BenchRobots made, BenchRobots::create(opened->policy, options, vocab_));
      robots = std::make_unique<BenchRobots>(std::move(made));
    }
    tell(arm.arm, "warm-up");
    std::vector<double> warm;
    for (int i = 0; i < (first ? spec_.warmup_max : 1); ++i) {
      SF_ASSIGN_OR_RETURN(const double ms, infer(*robots, arm.arm));
      warm.push_back(ms);
      if (first && is_steady(warm)) break;
    }
    if (first && !is_steady(warm)) arm.steady = false;
    arm.warmup_ms.insert(arm.warmup_ms.end(), warm.begin(), warm.end());

    robots->reset();
    MatrixRound round;
    for (int i = 0; i < spec_.samples; ++i) {
      SF_ASSIGN_OR_RETURN(const double ms, infer(*robots, arm.arm));
      keep(round, ms, *robots);
      if (i == 0) {
        const std::string hash = hash_of(*robots);
        arm.same_actions = arm.same_actions && (arm.actions.empty() || arm.actions == hash);
        if (arm.actions.empty()) arm.actions = hash;
      }
      ++done_;
      tell(arm.arm, "");
    }
    if (watch_ != nullptr) {
      Json reading = reading_to_json(watch_->read());
      reading["arm"] = index;
      result_.protocol["gpu"].push_back(std::move(reading));
    }
    arm.rounds.push_back(std::move(round));
    return {};
  }

  static void keep(MatrixRound& round, double ms, const BenchRobots& robots) {
    double before = 0, after = 0;
    for (int r = 0; r < robots.size(); ++r) {
      before += robots.chunk(r).times.preprocess;
      after += robots.chunk(r).times.postprocess;
    }
    const StageTimes& t = robots.chunk(0).times;  // the network ran once for all
    round.end_to_end.push_back(ms);
    round.preprocess.push_back(before);
    round.vision.push_back(t.vision);
    round.prefix.push_back(t.prefix);
    round.denoise.push_back(t.denoise);
    round.postprocess.push_back(after);
    if (t.device > 0) round.device.push_back(t.device);
  }

  void tell(const MatrixArm& arm, const std::string& doing) const {
    if (o_.running) o_.running(done_, total_, arm_text(arm) + (doing.empty() ? "" : ", " + doing));
  }

  Status save() const {
    if (o_.folder.empty()) return {};
    return write_file_atomically(state_path(o_.folder), json_text(matrix_to_json(result_, false)) + "\n");
  }

  const MatrixSpec& spec_;
  const MatrixOptions& o_;
  MatrixResult result_;
  std::list<Opened> open_;  // the last used first
  std::unique_ptr<GpuWatch> watch_;
  std::uint64_t done_ = 0, total_ = 0;
  int vocab_ = 0, max_tokens_ = 0;
  bool openpi_ = false;
};

}  // namespace

Result<MatrixResult> run_matrix(const MatrixSpec& spec, const MatrixOptions& options) {
  if (spec.arms.empty()) return Status::invalid("a matrix needs at least one arm");
  return Runner(spec, options).run();
}

}  // namespace servoflow::toolkit
