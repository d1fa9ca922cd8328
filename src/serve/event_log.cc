#include "serve/event_log.h"

#include <spdlog/async.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <chrono>
#include <cstdio>
#include <ctime>

namespace servoflow::serve {
namespace {

constexpr std::size_t kQueuedLines = 8192;

spdlog::level::level_enum spdlog_level(EventLog::Level level) {
  constexpr spdlog::level::level_enum kLevels[] = {spdlog::level::debug, spdlog::level::info,
                                                   spdlog::level::warn, spdlog::level::err};
  return kLevels[static_cast<int>(level)];
}

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

}  // namespace

EventLog::EventLog(const std::string& level) {
  auto pool = std::make_shared<spdlog::details::thread_pool>(kQueuedLines, 1);
  // The logger keeps only a weak reference to its threads; this sink's deleter holds them.
  auto sink = std::make_shared<spdlog::sinks::stderr_sink_mt>();
  auto logger = std::make_shared<spdlog::async_logger>("serve", std::move(sink), pool,
                                                       spdlog::async_overflow_policy::overrun_oldest);
  logger->set_pattern("%v");
  logger->set_level(spdlog::level::from_str(level == "error" ? "err" : level));
  logger_ = std::shared_ptr<spdlog::logger>(logger.get(), [logger, pool](spdlog::logger*) mutable {
    logger.reset();
    pool.reset();  // waits until all lines are out
  });
}

EventLog::~EventLog() = default;

void EventLog::flush() { logger_.reset(); }

bool EventLog::enabled(Level level) const { return logger_->should_log(spdlog_level(level)); }

void EventLog::write(Level level, const char* event, const Fields& fields) const {
  if (!enabled(level)) return;
  constexpr const char* kNames[] = {"debug", "info", "warn", "error"};
  Fields line = {{"time", now_text()}, {"level", kNames[static_cast<int>(level)]}, {"event", event}};
  line.update(fields);
  logger_->log(spdlog_level(level), "{}", line.dump(-1, ' ', false, Fields::error_handler_t::replace));
}

}  // namespace servoflow::serve
