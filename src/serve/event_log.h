// Structured logs: one JSON object a line on stderr, written by a thread of its own.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>

namespace servoflow::serve {

class EventLog {
 public:
  using Fields = nlohmann::ordered_json;
  enum class Level { kDebug, kInfo, kWarn, kError, kOff };

  // `level`: trace | debug | info | warn | error | off. When stderr takes no more, lines are dropped and
  // counted in a line of their own: a blocked terminal must not stop a robot.
  explicit EventLog(const std::string& level);
  ~EventLog();  // writes what waits
  EventLog(const EventLog&) = delete;
  EventLog& operator=(const EventLog&) = delete;

  // {"time": "2025-01-31T12:00:00.123Z", "level": "info", "event": event, …fields}
  void write(Level level, const char* event, const Fields& fields = Fields::object()) const;
  bool enabled(Level level) const { return level >= least_; }
  // Writes what waits, and nothing from then on.
  void close() const;

 private:
  void run();

  Level least_;
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  mutable std::deque<std::string> lines_;
  mutable std::uint64_t dropped_ = 0;
  mutable bool closing_ = false;
  mutable std::thread thread_;
};

}  // namespace servoflow::serve
