// Policy and Session: one observation through the stages, in the order of the folder names.
#include "servoflow/policy.h"

#include <algorithm>
#include <chrono>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>

#include "contract/canonical.h"
#include "contract/load.h"
#include "core/status_macros.h"
#include "core/zones.h"
#include "policy/network.h"
#include "policy/neutral_contract.h"
#include "policy/noise.h"
#include "stages/denoise/denoise.h"
#include "stages/postprocess/postprocessor.h"
#include "stages/preprocess/preprocessor.h"
#include "weights/checkpoint.h"
#include "weights/synth.h"

namespace servoflow {
namespace {

using Clock = std::chrono::steady_clock;
double milliseconds_since(Clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
}

// Cameras a lerobot configuration declares; openpi's models have three slots.
int camera_slots(const weights::Checkpoint& checkpoint) {
  int cameras = 0;
  if (const auto features = checkpoint.config.find("input_features");
      features != checkpoint.config.end() && features->is_object())
    for (const Json& feature : *features)
      if (feature.is_object() && feature.value("type", Json()) == "VISUAL") ++cameras;
  return std::max(3, cameras);
}

constexpr std::size_t kMostPreparedSteps = 4;  // as many schedules as a network keeps

// One device with the weights on it.
struct Place {
  std::size_t index = 0;  // in PolicyInfo::devices
  std::unique_ptr<policy::Network> network;
  std::mutex turn;   // its sessions take turns
  int sessions = 0;  // that are alive
};

// The requests of one batch that run on one device.
struct Group {
  Place* place = nullptr;
  std::vector<policy::NetworkRequest> requests;
  StageTimes times;
  Status status;

  void run(int steps) {
    const std::lock_guard turn(place->turn);
    status = place->network->run(requests, steps, &times, nullptr);
  }
};

}  // namespace

struct Policy::Impl {
  PolicyOptions options;
  PolicyInfo info;
  weights::Architecture architecture;
  bool lerobot_layout = false, synthetic = false;
  std::string tokenizer, tokenizer_hint;
  std::vector<std::unique_ptr<Place>> places;  // one per device
  std::mutex tokenizer_opening;
  std::shared_ptr<const stages::Tokenizer> opened_tokenizer;  // one for all sessions, opened by the first
  std::mutex seating;                                         // guards Place::sessions

  Result<contract::Contract> contract_of(const std::string& robot) const {
    if (robot == "none" || (synthetic && robot.empty())) return policy::neutral_contract(architecture);
    if (synthetic)
      return Status::invalid(
          "--robot: synthetic weights have no statistics for a robot; write a checkpoint with `servoflow "
          "synth --robot`");
    return contract::load_contract(
        info.checkpoint, {.robot = robot, .assets = options.assets, .lerobot_layout = lerobot_layout});
  }

  // The one tokenizer; null where there is none.
  Result<std::shared_ptr<const stages::Tokenizer>> shared_tokenizer() {
    const std::lock_guard guard(tokenizer_opening);
    if (opened_tokenizer == nullptr && !tokenizer.empty()) {
      SF_ASSIGN_OR_RETURN(opened_tokenizer, stages::Tokenizer::open(tokenizer, architecture.vocab));
    }
    return opened_tokenizer;
  }

  Status open(std::shared_ptr<const weights::WeightSource> source, Clock::time_point begin) {
    if (!options.robot.empty() || options.check_robot)
      SF_RETURN_IF_ERROR(contract_of(options.robot).status());
    SF_RETURN_IF_ERROR(check_expectations());
    SF_ASSIGN_OR_RETURN(const std::vector<std::string> devices, ops::device_list(options.device));
    for (std::size_t i = 0; i < devices.size(); ++i) {
      // Of all devices together.
      const auto part_of_all = [&, i](const ProgressFunction& all) -> ProgressFunction {
        if (devices.size() == 1 || !all) return all;
        return [&all, i, count = devices.size()](std::uint64_t done, std::uint64_t total) {
          all(i * total + done, count * total);
        };
      };
      const policy::NetworkOptions network_options{.device = devices[i],
                                                   .precision = options.precision,
                                                   .threads = options.threads,
                                                   .max_batch = options.max_batch,
                                                   .max_pictures = info.camera_slots,
                                                   .prompt_tokens = options.prompt_tokens,
                                                   .progress = part_of_all(options.progress)};
      places.push_back(std::make_unique<Place>());
      places.back()->index = i;
      SF_ASSIGN_OR_RETURN(places.back()->network,
                          policy::Network::create(source, architecture, network_options));
      policy::Network& network = *places.back()->network;
      SF_RETURN_IF_ERROR(
          network.prepare(expected_passes(network.info().max_batch), part_of_all(options.preparing)));
      add_to_info(network);
    }
    info.horizon = architecture.horizon;
    info.model_action_dim = architecture.action_dim;
    info.image_size = architecture.vision.image;
    info.max_tokens = architecture.max_tokens;
    info.ready_seconds = milliseconds_since(begin) * 1e-3;
    return {};
  }

  // What can be known of them before any weight is read.
  Status check_expectations() const {
    if (options.prepare_steps.size() > kMostPreparedSteps)
      return Status::invalid("prepare_steps: " + std::to_string(options.prepare_steps.size()) +
                             " numbers of steps; at most " + std::to_string(kMostPreparedSteps) +
                             " are kept at once");
    for (const int steps : options.prepare_steps)
      if (steps < 1 || steps > stages::kMaxSteps)
        return Status::invalid("prepare_steps: " + std::to_string(steps) + " Euler steps; choose 1 to " +
                               std::to_string(stages::kMaxSteps));
    if (options.prompt_tokens < 0 || options.prompt_tokens > architecture.max_tokens)
      return Status::invalid("prompt_tokens: " + std::to_string(options.prompt_tokens) +
                             "; the model takes at most " + std::to_string(architecture.max_tokens));
    return {};
  }

  // The passes that sessions of this policy are to be expected to ask for.
  std::vector<policy::PassShape> expected_passes(int max_batch) const {
    int least = 1, most = info.camera_slots;
    // A policy whose checkpoint names no robot can be opened: its sessions name theirs.
    if (const Result<contract::Contract> c = contract_of(options.robot); c.ok()) {
      least = most = 0;
      for (const contract::CameraSlot& camera : c->cameras) {
        if (camera.key.empty()) continue;
        most += 1;
        least += camera.required ? 1 : 0;
      }
      most = std::min(most, info.camera_slots);
      least = std::clamp(least, std::min(1, most), most);
    }
    std::vector<int> steps = options.prepare_steps;
    if (steps.empty()) steps.push_back(architecture.default_steps);
    std::vector<policy::PassShape> out;
    for (const int n : steps)
      for (int requests = 1; requests <= max_batch; ++requests)
        for (int pictures = least; pictures <= most; ++pictures)
          out.push_back({.requests = requests, .pictures = pictures, .steps = n});
    return out;
  }

  void add_to_info(const policy::Network& network) {
    const policy::NetworkInfo& n = network.info();
    if (info.devices.empty()) {
      info.backend = n.backend;
      info.precision = n.precision;
      info.components = n.components;
      info.hardware = n.hardware;
      info.threads = n.threads;
      info.max_batch = n.max_batch;
      info.parameters = n.parameters;
    }
    info.device += (info.devices.empty() ? "" : ",") + n.device;
    info.weight_bytes += n.weight_bytes;
    info.workspace_bytes += n.workspace_bytes;
    info.devices.push_back(
        {n.device, n.backend, n.hardware, n.weight_bytes, n.workspace_bytes, network.recordings()});
  }

  // Takes a seat on the device with the fewest sessions, the first of equals.
  Place& seat() {
    const std::lock_guard guard(seating);
    Place& place = **std::min_element(places.begin(), places.end(),
                                      [](const auto& a, const auto& b) { return a->sessions < b->sessions; });
    ++place.sessions;
    return place;
  }
  void leave(Place& place) {
    const std::lock_guard guard(seating);
    --place.sessions;
  }
};

struct Session::Impl {
  std::shared_ptr<Policy::Impl> policy;
  Place* place = nullptr;  // of `policy`
  contract::Contract contract;
  std::string contract_json, contract_hash;
  std::unique_ptr<stages::Preprocessor> preprocessor;
  std::unique_ptr<stages::Postprocessor> postprocessor;
  std::uint64_t seed = 0, request = 0;
  stages::ModelInput input;
  std::vector<float> noise, actions;
  // The next request's noise, drawn while a device computes this one's.
  std::vector<float> next_noise;
  std::uint64_t next_request = 0;
  bool has_next = false;
  std::function<void()> draw_next = [this] {
    next_noise.resize(noise.size());
    next_request = request + 1;
    policy::fill_noise(seed, next_request, next_noise);
    has_next = true;
  };

  Status preprocess(const Observation& observation, std::span<const float> given_noise, StageTimes& times) {
    const zones::Zone zone("preprocess");
    const Clock::time_point begin = Clock::now();
    SF_RETURN_IF_ERROR(preprocessor->run(observation, input));
    if (given_noise.empty() && has_next && next_request == request) {
      std::swap(noise, next_noise);
      has_next = false;
    } else if (given_noise.empty()) {
      policy::fill_noise(seed, request, noise);
    } else if (given_noise.size() == noise.size()) {
      std::copy(given_noise.begin(), given_noise.end(), noise.begin());
    } else {
      return Status::invalid("noise: " + std::to_string(given_noise.size()) + " values; this policy needs " +
                             std::to_string(policy->architecture.horizon) + " x " +
                             std::to_string(policy->architecture.action_dim));
    }
    times.preprocess = milliseconds_since(begin);
    return {};
  }

  explicit Impl(std::shared_ptr<Policy::Impl> of) : policy(std::move(of)), place(&policy->seat()) {}
  ~Impl() { policy->leave(*place); }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  const DeviceInfo& device() const { return policy->info.devices[place->index]; }

  policy::NetworkRequest network_request(bool own_noise) {
    return {&input, noise, actions, own_noise ? &draw_next : nullptr};
  }

  Status postprocess(ActionChunk& chunk, bool keep_noise) {
    const zones::Zone zone("postprocess");
    const Clock::time_point begin = Clock::now();
    const weights::Architecture& a = policy->architecture;
    // First, because it refuses what is not finite: nothing of a bad chunk may be seen.
    chunk.normalized.clear();
    SF_RETURN_IF_ERROR(postprocessor->run(actions, a.horizon, input, chunk.actions, chunk.action_dim));
    chunk.normalized.assign(actions.begin(), actions.end());
    chunk.noise.assign(noise.begin(), keep_noise ? noise.end() : noise.begin());
    chunk.model_dim = a.action_dim;
    chunk.horizon = a.horizon;
    chunk.prefix_tokens = input.picture_count * a.vision.tokens() + static_cast<int>(input.tokens.size());
    chunk.prompt_truncated = input.prompt_truncated;
    chunk.request = request++;
    chunk.device = device().device;
    chunk.backend = device().backend;
    chunk.precision = policy->info.precision;
    chunk.contract_hash = contract_hash;
    chunk.times.postprocess = milliseconds_since(begin);
    return {};
  }
};

Result<CheckpointInfo> Policy::describe(const std::string& checkpoint, const std::string& robot,
                                        const std::string& assets) {
  SF_ASSIGN_OR_RETURN(const weights::Checkpoint opened, weights::open_checkpoint(checkpoint));
  Impl impl;
  impl.options.assets = assets;
  impl.architecture = opened.architecture;
  impl.lerobot_layout = opened.layout == weights::Layout::kLerobot;
  impl.info.checkpoint = checkpoint;
  SF_ASSIGN_OR_RETURN(const contract::Contract contract, impl.contract_of(robot));
  const weights::Architecture& a = opened.architecture;
  std::vector<ComponentPrecision> components;
  for (const weights::StoredPrecision& p : opened.precisions)
    components.push_back({.component = p.component,
                          .precision = p.precision,
                          .kernel = "",
                          .layers = p.layers,
                          .parameters = p.parameters,
                          .weight_bytes = p.bytes});
  return CheckpointInfo{.layout = weights::layout_name(opened.layout),
                        .horizon = a.horizon,
                        .model_action_dim = a.action_dim,
                        .image_size = a.vision.image,
                        .max_tokens = a.max_tokens,
                        .default_steps = a.default_steps,
                        .components = std::move(components),
                        .contract_json = contract::canonical_json(contract),
                        .contract_hash = contract::contract_hash(contract)};
}

Result<Policy> Policy::open(const std::string& checkpoint, const PolicyOptions& options) {
  const Clock::time_point begin = Clock::now();
  SF_ASSIGN_OR_RETURN(const weights::Checkpoint opened, weights::open_checkpoint(checkpoint));
  Policy policy;
  policy.impl_ = std::make_shared<Impl>();
  Impl& impl = *policy.impl_;
  impl.options = options;
  impl.architecture = opened.architecture;
  impl.lerobot_layout = opened.layout == weights::Layout::kLerobot;
  impl.info.checkpoint = checkpoint;
  impl.info.layout = weights::layout_name(opened.layout);
  impl.info.camera_slots = camera_slots(opened);
  // A missing tokenizer is an error of whoever sends a prompt; token ids work without. A named one must be
  // there.
  if (Result<std::string> found = weights::find_tokenizer(opened, options.tokenizer); found.ok()) {
    impl.tokenizer = *found;
  } else if (!options.tokenizer.empty()) {
    return found.status();
  } else {
    impl.tokenizer_hint = found.status().message();
  }
  SF_RETURN_IF_ERROR(impl.open(opened.source, begin));
  return policy;
}

Result<Policy> Policy::open_synthetic(const std::string& model, const PolicyOptions& options,
                                      std::uint64_t seed, int horizon) {
  const Clock::time_point begin = Clock::now();
  Policy policy;
  policy.impl_ = std::make_shared<Impl>();
  Impl& impl = *policy.impl_;
  SF_ASSIGN_OR_RETURN(impl.architecture, policy::synthetic_architecture(model, horizon));
  impl.options = options;
  impl.synthetic = true;
  impl.info.checkpoint = "synthetic " + model;
  impl.info.layout = "synthetic";
  impl.info.camera_slots = 3;
  impl.tokenizer = options.tokenizer;
  impl.tokenizer_hint = "synthetic weights have no tokenizer; send token ids or pass --tokenizer";
  SF_RETURN_IF_ERROR(
      impl.open(std::make_shared<weights::SyntheticSource>(impl.architecture, seed, DType::kBF16), begin));
  return policy;
}

const PolicyInfo& Policy::info() const { return impl_->info; }

Result<Session> Policy::new_session(const SessionOptions& options) const {
  Session session;
  session.impl_ = std::make_shared<Session::Impl>(impl_);
  Session::Impl& s = *session.impl_;
  s.seed = options.seed;
  SF_ASSIGN_OR_RETURN(s.contract,
                      impl_->contract_of(options.robot.empty() ? impl_->options.robot : options.robot));
  if (static_cast<int>(s.contract.cameras.size()) > impl_->info.camera_slots)
    return Status::invalid("robot " + s.contract.name + ": " + std::to_string(s.contract.cameras.size()) +
                           " cameras; the model has " + std::to_string(impl_->info.camera_slots) + " slots");
  const weights::Architecture& a = impl_->architecture;
  SF_ASSIGN_OR_RETURN(const std::shared_ptr<const stages::Tokenizer> tokenizer, impl_->shared_tokenizer());
  SF_ASSIGN_OR_RETURN(s.preprocessor, stages::Preprocessor::create(
                                          s.contract, {.image_size = a.vision.image,
                                                       .tokenizer = tokenizer,
                                                       .vocab = a.vocab,
                                                       .max_tokens = a.max_tokens,
                                                       .raw_frames = s.place->network->info().raw_frames,
                                                       .tokenizer_hint = impl_->tokenizer_hint}));
  SF_ASSIGN_OR_RETURN(s.postprocessor, stages::Postprocessor::create(s.contract, a.action_dim));
  s.contract_json = contract::canonical_json(s.contract);
  s.contract_hash = contract::contract_hash(s.contract);
  s.noise.resize(static_cast<std::size_t>(a.horizon) * static_cast<std::size_t>(a.action_dim));
  s.actions.resize(s.noise.size());
  return session;
}

Result<ActionChunk> Session::infer(const Observation& observation, const InferOptions& options) {
  ActionChunk chunk;
  SF_RETURN_IF_ERROR(infer_into(observation, options, chunk));
  return chunk;
}

Status Session::infer_into(const Observation& observation, const InferOptions& options, ActionChunk& chunk) {
  const Clock::time_point begin = Clock::now();
  Impl& s = *impl_;
  SF_RETURN_IF_ERROR(s.preprocess(observation, options.noise, chunk.times));
  {
    const std::lock_guard turn(s.place->turn);
    const policy::NetworkRequest request = s.network_request(options.noise.empty());
    const int steps = options.steps != 0 ? options.steps : s.policy->architecture.default_steps;
    SF_RETURN_IF_ERROR(s.place->network->run({&request, 1}, steps, &chunk.times, nullptr));
  }
  SF_RETURN_IF_ERROR(s.postprocess(chunk, options.keep_noise));
  chunk.times.total = milliseconds_since(begin);
  return {};
}

Status infer_batch(std::span<Session* const> sessions, std::span<const Observation* const> observations,
                   const InferOptions& options, std::span<ActionChunk> chunks) {
  const Clock::time_point begin = Clock::now();
  const std::size_t count = sessions.size();
  if (count == 0 || observations.size() != count || chunks.size() != count)
    return Status::invalid(
        "infer_batch: sessions, observations and chunks must be equally many, at least one");
  const std::shared_ptr<Policy::Impl>& policy = sessions[0]->impl_->policy;
  std::vector<Group> groups;  // in the order of their first sessions
  std::vector<std::size_t> group_of(count);
  for (std::size_t i = 0; i < count; ++i) {
    Session::Impl& s = *sessions[i]->impl_;
    if (s.policy != policy) return Status::invalid("infer_batch: all sessions must belong to one policy");
    for (std::size_t j = 0; j < i; ++j)
      if (sessions[j]->impl_ == sessions[i]->impl_)
        return Status::invalid("infer_batch: a session may stand in a batch once");
    if (!options.noise.empty() && options.noise.size() != count * s.noise.size())
      return Status::invalid("noise: expected [sessions, horizon, action_dim]");
    const auto noise =
        options.noise.empty() ? options.noise : options.noise.subspan(i * s.noise.size(), s.noise.size());
    SF_RETURN_IF_ERROR(
        s.preprocess(*observations[i], noise, chunks[i].times).with_context("request " + std::to_string(i)));
    const auto group =
        std::find_if(groups.begin(), groups.end(), [&](const Group& g) { return g.place == s.place; });
    group_of[i] = static_cast<std::size_t>(group - groups.begin());
    if (group == groups.end()) groups.emplace_back().place = s.place;
    groups[group_of[i]].requests.push_back(s.network_request(options.noise.empty()));
  }
  const int steps = options.steps != 0 ? options.steps : policy->architecture.default_steps;
  {
    std::vector<std::jthread> others;
    for (std::size_t g = 1; g < groups.size(); ++g) others.emplace_back([&, g] { groups[g].run(steps); });
    groups[0].run(steps);
  }
  for (const Group& group : groups) SF_RETURN_IF_ERROR(group.status);
  for (std::size_t i = 0; i < count; ++i) {
    StageTimes& times = groups[group_of[i]].times;
    times.preprocess = chunks[i].times.preprocess;
    chunks[i].times = times;
    SF_RETURN_IF_ERROR(sessions[i]
                           ->impl_->postprocess(chunks[i], options.keep_noise)
                           .with_context("request " + std::to_string(i)));
  }
  for (ActionChunk& chunk : chunks) chunk.times.total = milliseconds_since(begin);
  return {};
}

void Session::reset() { impl_->request = 0; }
void Session::reset(std::uint64_t seed) {
  impl_->has_next = impl_->has_next && impl_->seed == seed;
  impl_->seed = seed;
  impl_->request = 0;
}
const std::string& Session::contract_hash() const { return impl_->contract_hash; }
const std::string& Session::contract_json() const { return impl_->contract_json; }
const DeviceInfo& Session::device() const { return impl_->device(); }

}  // namespace servoflow
