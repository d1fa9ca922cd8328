// A checkpoint in service: the opened policy with a session ready for every robot that may connect.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "serve/request.h"
#include "servoflow/policy.h"

namespace servoflow::serve {

struct HostOptions {
  std::string checkpoint;
  PolicyOptions policy;    // its robot is the one that is served
  std::uint64_t seed = 0;  // that every session begins with
  int sessions = 1;        // that exist at once
};

class PolicyHost;

// A session on loan to one connection: returned, for the next robot, when the last owner lets go.
class SessionLease {
 public:
  SessionLease(std::shared_ptr<PolicyHost> host, std::size_t index);
  ~SessionLease();
  SessionLease(const SessionLease&) = delete;
  SessionLease& operator=(const SessionLease&) = delete;

  Session& session();
  const PolicyHost& host() const { return *host_; }
  std::optional<std::string> episode;  // the last `episode_id`; touched by the inference thread only

 private:
  std::shared_ptr<PolicyHost> host_;
  std::size_t index_;
};

class PolicyHost : public std::enable_shared_from_this<PolicyHost> {
 public:
  // Opens, makes all sessions and runs a first inference on each device. Everything that a robot could
  // stumble over later, a missing tokenizer say, is an error here.
  static Result<std::shared_ptr<PolicyHost>> open(const HostOptions& options, std::uint64_t generation);

  // A session begun anew with the host's seed, on the device with the fewest; null when all are out. Never
  // waits for a device or a file: files that change while this policy runs change nothing.
  std::shared_ptr<SessionLease> lease();

  std::uint64_t generation() const { return generation_; }  // 1 for the first one opened
  const PolicyInfo& info() const { return policy_->info(); }
  const std::shared_ptr<const RequestSchema>& schema() const { return schema_; }
  const std::string& contract_hash() const { return sessions_.front().contract_hash(); }
  const std::string& contract_json() const { return sessions_.front().contract_json(); }

 private:
  friend class SessionLease;
  PolicyHost() = default;
  Status warm_up();
  void give_back(std::size_t index);
  std::size_t device_of(std::size_t session) const;

  std::uint64_t generation_ = 0, seed_ = 0;
  std::optional<Policy> policy_;
  std::shared_ptr<const RequestSchema> schema_;
  std::vector<Session> sessions_;
  std::mutex mutex_;
  std::vector<char> is_out_;  // by session
};

}  // namespace servoflow::serve
