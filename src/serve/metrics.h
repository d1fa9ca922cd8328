// What a running server counts, in Prometheus' text form.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <string>
#include <string_view>
#include <vector>

namespace servoflow::serve {

// Why a request or a connection was refused or ended. One counter each.
enum class Cause {
  kBadRequest,    // a message that does not decode; its reason named the field
  kInference,     // the engine refused or failed
  kQueueFull,     // backpressure
  kRate,          // more requests a second than a connection may send
  kOutstanding,   // more unanswered requests than a connection may have
  kMessageSize,   // a frame or message beyond the limit
  kShutdown,      // the server is going
  kConnections,   // the connection cap
  kUnauthorized,  // no key, or a wrong one
  kSlowClient,    // a reply was not taken in time
  kTimeout,       // nothing was heard for too long
  kProtocol,      // no valid HTTP or websocket
  kCount
};
std::string_view cause_name(Cause cause);

// Where a request's time goes. The engine's stages are those of the batch that it ran in.
enum class Stage {
  kDecode,
  kQueue,
  kPreprocess,
  kVision,
  kPrefix,
  kDenoise,
  kPostprocess,
  kInfer,
  kSend,
  kTotal,
  kCount
};
std::string_view stage_name(Stage stage);

// Counts values into fixed buckets. Thread-safe, never blocks.
class Histogram {
 public:
  explicit Histogram(std::vector<double> bounds) : bounds_(std::move(bounds)), counts_(bounds_.size() + 1) {}
  void observe(double value);
  std::uint64_t count() const;
  // Appends `name`_bucket, _sum and _count lines; `labels` is empty or `stage="queue"`.
  void write(std::string& out, std::string_view name, const std::string& labels) const;

 private:
  std::vector<double> bounds_;  // upper ends, rising; one more bucket takes the rest
  std::vector<std::atomic<std::uint64_t>> counts_;
  std::atomic<double> sum_ = 0;
};

struct Metrics {
  Metrics();

  std::atomic<std::uint64_t> requests = 0, replies = 0, connections_opened = 0, deadlines_missed = 0;
  std::atomic<std::uint64_t> reloads = 0, failed_reloads = 0, recorded = 0, not_recorded = 0;
  std::atomic<std::int64_t> connections = 0, queue_length = 0;
  std::atomic<std::uint64_t> generation = 0, weight_bytes = 0, workspace_bytes = 0;
  std::array<std::atomic<std::uint64_t>, static_cast<std::size_t>(Cause::kCount)> errors{};
  std::deque<Histogram> stages;  // seconds, by Stage
  Histogram batch_size;

  void fail(Cause cause) { ++errors[static_cast<std::size_t>(cause)]; }
  void observe_ms(Stage stage, double milliseconds) {
    stages[static_cast<std::size_t>(stage)].observe(milliseconds * 1e-3);
  }
  // The page of /metrics. `info` holds the labels of servoflow_info, escaped already.
  std::string text(const std::string& info) const;
};

// A label's value with backslashes, quotes and line ends escaped.
std::string escape_label(std::string_view value);

}  // namespace servoflow::serve
