// The protocol with one robot, apart from how bytes travel.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "serve/context.h"

namespace servoflow::serve {

// How a link reaches its client. Everything but post() is called from the connection's own sequence of
// handlers.
class Transport : public std::enable_shared_from_this<Transport> {
 public:
  virtual ~Transport() = default;
  virtual void send(std::string message) = 0;  // a binary frame, behind those sent before
  // Behind all sent before: a text frame with the reason (none if empty), then a close frame.
  virtual void close(std::string text, std::uint16_t code, std::string reason) = 0;
  // Runs it in the connection's sequence; from any thread.
  virtual void post(std::function<void()> work) = 0;
};

// Close codes of RFC 6455 and the IANA registry.
enum : std::uint16_t {
  kGoingAway = 1001,
  kMessageTooBig = 1009,
  kInternalError = 1011,
  kTryAgainLater = 1013
};

class RobotLink {
 public:
  RobotLink(Context& context, Transport& transport, std::string peer);
  ~RobotLink();
  RobotLink(const RobotLink&) = delete;
  RobotLink& operator=(const RobotLink&) = delete;

  // The server speaks first: the policy's metadata.
  void on_open();
  void on_message(std::vector<std::uint8_t> message, bool is_text);
  // The last message given to send() has left.
  void on_sent();
  // The connection is gone; no further call.
  void on_closed(std::optional<Cause> cause, const std::string& detail);
  // Answers what is in flight, then closes.
  void drain();

  std::uint64_t id() const { return id_; }

 private:
  void refuse(Cause cause, const std::string& reason, std::uint16_t code, const std::string& trace);
  void close_when_idle();
  void on_answer(std::shared_ptr<Answer> answer, const std::shared_ptr<const Request>& request,
                 const std::shared_ptr<SessionLease>& lease, Clock::time_point received, double decode_ms,
                 const std::string& trace);
  std::string encode(const Answer& answer, const SessionLease& lease, double decode_ms,
                     const std::string& trace, bool late) const;

  Context& context_;
  Transport& transport_;
  const std::uint64_t id_;
  const std::string peer_;
  std::shared_ptr<SessionLease> lease_;
  RateLimit rate_;
  std::uint64_t requests_ = 0, replies_ = 0;
  int outstanding_ = 0;
  struct Refusal {
    std::string text, reason;
    std::uint16_t code;
  };
  std::optional<Refusal> refusal_;  // sent when nothing is in flight; further messages are not read then
  bool closing_ = false, closed_ = false;
  Clock::time_point turn_begin_, sent_begin_;
  std::optional<double> previous_total_ms_;
  std::deque<Clock::time_point> sending_;  // when each unsent reply was handed over
};

}  // namespace servoflow::serve
