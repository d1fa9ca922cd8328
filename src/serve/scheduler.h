// One thread that computes: requests of all connections, the most urgent first, together where they fit
// together.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "serve/metrics.h"
#include "serve/policy_host.h"
#include "serve/request.h"

namespace servoflow::serve {

using Clock = std::chrono::steady_clock;

inline double milliseconds(Clock::duration duration) {
  return std::chrono::duration<double, std::milli>(duration).count();
}

struct Answer {
  Status status;
  ActionChunk chunk;
  int batch = 0;  // requests that were computed together
  double queue_ms = 0, infer_ms = 0;
};

struct Job {
  std::uint64_t client = 0;  // the connection; its jobs are computed in their order, one at a time
  std::shared_ptr<SessionLease> lease;
  std::shared_ptr<const Request> request;
  Clock::time_point received, deadline;
  bool keep_noise = false;
  std::function<void(Answer)> done;  // called once, from the scheduler's thread
};

struct SchedulerOptions {
  int max_batch = 64;                        // per device, at most the policy's own
  std::chrono::microseconds max_wait{2000};  // how long the oldest request waits for company
  std::size_t capacity = 128;                // requests waiting
};

// Which requests go together: same policy, same number of steps, and all with given noise or none. Of each
// connection only its oldest request is eligible. The one with the earliest deadline leads, the others join
// in the order of their deadlines. While other connections have nothing waiting, the batch waits for them, at
// most `max_wait` from when its oldest member came; a robot that is alone never waits.
class Scheduler {
 public:
  Scheduler(const SchedulerOptions& options, Metrics& metrics);
  ~Scheduler();
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // False when the queue is full; `job` is untouched then.
  bool submit(Job& job);
  // Drops the waiting jobs of a connection that is gone; their `done` is not called.
  void forget(std::uint64_t client);
  // Fails what waits, not what is being computed.
  void fail_waiting();
  // Fails what waits, finishes what is being computed, and ends; nothing is accepted any more. Called once or
  // by the destructor.
  void stop();
  // How many connections there are that could still send something.
  void set_clients(int clients);
  // Requests waiting or being computed.
  std::size_t pending() const;

 private:
  using Batch = std::vector<Job>;
  void run();
  // The next batch, moved out of the queue; empty when stopping. Waits for work and for company.
  Batch next_batch();
  std::vector<std::list<Job>::iterator> choose();
  void compute(Batch& batch);

  const SchedulerOptions options_;
  Metrics& metrics_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::list<Job> queue_;  // in order of arrival
  std::size_t computing_ = 0;
  int clients_ = 0;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace servoflow::serve
