#include "serve/event_log.h"

#include <chrono>
#include <cstdio>
#include <ctime>
#include <utility>

namespace servoflow::serve {
namespace {

constexpr std::size_t kMaxLines = 8192;

std::string now_text() {
  const auto now = std::chrono::system_clock::now();
  const std::time_t seconds = std::chrono::system_clock::to_time_t(now);
  const auto millis =
      std::chrono::duration_cast<std::chrono::milliseconds>(now.time_since_epoch()).count() % 1000;
  std::tm utc{};
  ::gmtime_r(&seconds, &utc);
  char date[32], text[48];
  std::strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%S", &utc);
  std::snprintf(text, sizeof text, "%s.%03dZ", date, static_cast<int>(millis));
  return text;
}

EventLog::Level level_of(const std::string& name) {
  if (name == "trace" || name == "debug") return EventLog::Level::kDebug;
  if (name == "warn") return EventLog::Level::kWarn;
  if (name == "error") return EventLog::Level::kError;
  return name == "off" ? EventLog::Level::kOff : EventLog::Level::kInfo;
}

std::string line_of(EventLog::Level level, const char* event, const EventLog::Fields& fields) {
  constexpr const char* kNames[] = {"debug", "info", "warn", "error", "off"};
  EventLog::Fields line = {
      {"time", now_text()}, {"level", kNames[static_cast<int>(level)]}, {"event", event}};
  line.update(fields);
  return line.dump(-1, ' ', false, EventLog::Fields::error_handler_t::replace) + "\n";
}

}  // namespace

EventLog::EventLog(const std::string& level) : least_(level_of(level)), thread_([this] { run(); }) {}

EventLog::~EventLog() { close(); }

void EventLog::close() const {
  {
    const std::lock_guard guard(mutex_);
    closing_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void EventLog::write(Level level, const char* event, const Fields& fields) const {
  if (!enabled(level)) return;
  std::string line = line_of(level, event, fields);
  {
    const std::lock_guard guard(mutex_);
    if (closing_) return;
    if (lines_.size() >= kMaxLines) {
      ++dropped_;
      return;
    }
    lines_.push_back(std::move(line));
  }
  changed_.notify_all();
}

void EventLog::run() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return closing_ || !lines_.empty(); });
    if (lines_.empty()) return;
    std::deque<std::string> lines = std::exchange(lines_, {});
    const std::uint64_t dropped = std::exchange(dropped_, 0);
    lock.unlock();
    if (dropped > 0) lines.push_back(line_of(Level::kWarn, "log_dropped", {{"lines", dropped}}));
    for (const std::string& line : lines) std::fwrite(line.data(), 1, line.size(), stderr);
    std::fflush(stderr);
    lock.lock();
  }
}

}  // namespace servoflow::serve
