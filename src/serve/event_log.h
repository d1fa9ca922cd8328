// Structured logs: one JSON object a line on stderr, written by a thread of its own.
#pragma once

#include <memory>
#include <nlohmann/json.hpp>
#include <string>

namespace spdlog {
class logger;
}

namespace servoflow::serve {

class EventLog {
 public:
  using Fields = nlohmann::ordered_json;
  enum class Level { kDebug, kInfo, kWarn, kError };

  // `level`: trace | debug | info | warn | error | off. Lines that stderr does not take are dropped, oldest
  // first: a blocked terminal must not stop a robot.
  explicit EventLog(const std::string& level);
  ~EventLog();
  // {"time": "2025-01-31T12:00:00.123Z", "level": "info", "event": event, …fields}
  void write(Level level, const char* event, const Fields& fields = Fields::object()) const;
  bool enabled(Level level) const;
  // Waits until everything written is out.
  void flush();

 private:
  std::shared_ptr<spdlog::logger> logger_;
};

}  // namespace servoflow::serve
