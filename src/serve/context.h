// What all connections of a server share.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "serve/access.h"
#include "serve/event_log.h"
#include "serve/metrics.h"
#include "serve/policy_host.h"
#include "serve/recorder.h"
#include "serve/scheduler.h"
#include "serve/server.h"

namespace servoflow::serve {

struct Context {
  Context(const ServeOptions& serve_options, KeyRing key_ring)
      : options(serve_options),
        keys(std::move(key_ring)),
        log(options.log_level),
        scheduler(
            {.max_wait = std::chrono::microseconds(static_cast<std::int64_t>(options.max_wait_ms * 1000)),
             .capacity = static_cast<std::size_t>(options.queue)},
            metrics) {
    limits.max_bytes = options.max_message_bytes;
  }

  const ServeOptions options;
  const KeyRing keys;
  WireLimits limits;
  Metrics metrics;
  EventLog log;
  std::unique_ptr<Recorder> recorder;  // null without --record
  std::string trace_prefix;            // of this process, random
  std::string metadata_json;           // the user's, checked
  std::atomic<bool> draining = false;
  std::atomic<int> robots = 0;  // connections that got through the handshake
  std::atomic<std::uint64_t> next_client = 1;

  std::shared_ptr<PolicyHost> host() const {
    const std::lock_guard guard(host_mutex_);
    return host_;
  }
  void set_host(std::shared_ptr<PolicyHost> host) {
    metrics.generation = host->generation();
    metrics.weight_bytes = host->info().weight_bytes;
    metrics.workspace_bytes = host->info().workspace_bytes;
    const std::lock_guard guard(host_mutex_);
    host_.swap(host);
  }

 private:
  mutable std::mutex host_mutex_;
  std::shared_ptr<PolicyHost> host_;

 public:
  Scheduler scheduler;  // last: it ends first
};

}  // namespace servoflow::serve
