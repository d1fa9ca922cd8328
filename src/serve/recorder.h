// Writes served requests as case files that `servoflow verify` recomputes.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "serve/event_log.h"
#include "serve/metrics.h"
#include "serve/policy_host.h"
#include "serve/request.h"

namespace servoflow::serve {

struct Recording {
  std::string trace;  // also the file's name
  std::shared_ptr<const Request> request;
  ActionChunk chunk;  // with its noise
  std::shared_ptr<SessionLease> lease;
};

// One thread writes; a disk that cannot keep up loses recordings (counted and logged), never holds up a
// robot.
class Recorder {
 public:
  // Makes the folder. At most `limit` files are written.
  static Result<std::unique_ptr<Recorder>> open(const std::string& folder, std::uint64_t limit,
                                                Metrics& metrics, const EventLog& log);
  ~Recorder();  // writes what waits
  Recorder(const Recorder&) = delete;
  Recorder& operator=(const Recorder&) = delete;
  void add(Recording recording);

 private:
  Recorder(std::string folder, std::uint64_t limit, Metrics& metrics, const EventLog& log);
  void run();
  void lose(const Recording& recording, const std::string& cause);

  const std::string folder_;
  const std::uint64_t limit_;
  Metrics& metrics_;
  const EventLog& log_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Recording> queue_;
  std::uint64_t accepted_ = 0;
  bool stopping_ = false, told_limit_ = false;
  std::thread thread_;
};

// The case file of one request (tests/golden/README.md, "A case file"): its frames as pixels, state, prompt
// and noise, and the actions that were sent, with gates for the precision that computed them.
Result<std::string> case_file(const Recording& recording);

}  // namespace servoflow::serve
