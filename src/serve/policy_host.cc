#include "serve/policy_host.h"

#include <algorithm>
#include <utility>

namespace servoflow::serve {

SessionLease::SessionLease(std::shared_ptr<PolicyHost> host, std::size_t index)
    : host_(std::move(host)), index_(index) {}
SessionLease::~SessionLease() { host_->give_back(index_); }
Session& SessionLease::session() { return host_->sessions_[index_]; }

Result<std::shared_ptr<PolicyHost>> PolicyHost::open(const HostOptions& options, std::uint64_t generation) {
  std::shared_ptr<PolicyHost> host(new PolicyHost);
  host->generation_ = generation;
  host->seed_ = options.seed;
  PolicyOptions policy_options = options.policy;
  policy_options.check_robot = true;
  Result<Policy> policy = Policy::open(options.checkpoint, policy_options);
  if (!policy.ok()) return policy.status();
  host->policy_ = *std::move(policy);
  for (int i = 0; i < options.sessions; ++i) {
    Result<Session> session = host->policy_->new_session({.seed = options.seed});
    if (!session.ok()) return session.status();
    host->sessions_.push_back(*std::move(session));
  }
  host->is_out_.assign(host->sessions_.size(), 0);
  Result<RequestSchema> schema = RequestSchema::from_contract(host->contract_json(), host->info());
  if (!schema.ok()) return schema.status();
  host->schema_ = std::make_shared<RequestSchema>(*std::move(schema));
  if (Status status = host->warm_up(); !status.ok())
    return status.with_context(options.checkpoint + ": first inference");
  return host;
}

// Gray pictures, a state of zeros and a short prompt, once on each device: what a GPU has to record is
// recorded by now (PolicyOptions::prepare_steps).
Status PolicyHost::warm_up() {
  constexpr int kSide = 224;
  const std::vector<std::uint8_t> pixels(std::size_t{3} * kSide * kSide, 128);
  const std::vector<double> state(static_cast<std::size_t>(schema_->state_width()), 0);
  Observation observation;
  for (const RequestSchema::Camera& camera : schema_->cameras)
    observation.images.push_back({camera.key, ImageLayout::kHWC, kSide, kSide, pixels});
  observation.state = state;
  if (!schema_->default_prompt) observation.prompt = "warm up";

  std::vector<char> is_warm(info().devices.size() + 1, 0);
  for (std::size_t i = 0; i < sessions_.size(); ++i) {
    if (std::exchange(is_warm[device_of(i)], 1) != 0) continue;
    if (Status status = sessions_[i].infer(observation).status(); !status.ok()) return status;
    sessions_[i].reset(seed_);
  }
  return {};
}

std::size_t PolicyHost::device_of(std::size_t session) const {
  const std::vector<DeviceInfo>& devices = info().devices;
  const auto same = [&](const DeviceInfo& d) { return d.device == sessions_[session].device().device; };
  return static_cast<std::size_t>(std::find_if(devices.begin(), devices.end(), same) - devices.begin());
}

std::shared_ptr<SessionLease> PolicyHost::lease() {
  std::size_t chosen = sessions_.size();
  {
    const std::lock_guard guard(mutex_);
    std::vector<int> out(info().devices.size() + 1, 0);
    for (std::size_t i = 0; i < sessions_.size(); ++i)
      if (is_out_[i] != 0) ++out[device_of(i)];
    for (std::size_t i = 0; i < sessions_.size(); ++i)
      if (is_out_[i] == 0 && (chosen == sessions_.size() || out[device_of(i)] < out[device_of(chosen)]))
        chosen = i;
    if (chosen == sessions_.size()) return nullptr;
    is_out_[chosen] = 1;
  }
  sessions_[chosen].reset(seed_);
  return std::make_shared<SessionLease>(shared_from_this(), chosen);
}

void PolicyHost::give_back(std::size_t index) {
  const std::lock_guard guard(mutex_);
  is_out_[index] = 0;
}

}  // namespace servoflow::serve
