#include "serve/metrics.h"

#include <unistd.h>

#include <cstdio>
#include <fstream>

namespace servoflow::serve {
namespace {

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.9g", value);
  return text;
}

std::uint64_t resident_bytes() {
  std::ifstream statm("/proc/self/statm");
  std::uint64_t size = 0, resident = 0;
  statm >> size >> resident;
  return resident * static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
}

// 0.1 ms to 30 s: what one look at a policy takes, from a tiny one to the published one on two cores.
std::vector<double> latency_bounds() {
  return {0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05,
          0.075,  0.1,    0.15,   0.2,   0.3,   0.5,   1,    2,     5,    10,   30};
}

}  // namespace

std::string_view cause_name(Cause cause) {
  constexpr std::string_view kNames[] = {"bad_request",  "inference",    "queue_full", "rate",
                                         "outstanding",  "message_size", "shutdown",   "connections",
                                         "unauthorized", "slow_client",  "timeout",    "protocol"};
  static_assert(std::size(kNames) == static_cast<std::size_t>(Cause::kCount));
  return kNames[static_cast<std::size_t>(cause)];
}

std::string_view stage_name(Stage stage) {
  constexpr std::string_view kNames[] = {"decode",  "queue",       "preprocess", "vision", "prefix",
                                         "denoise", "postprocess", "infer",      "send",   "total"};
  static_assert(std::size(kNames) == static_cast<std::size_t>(Stage::kCount));
  return kNames[static_cast<std::size_t>(stage)];
}

void Histogram::observe(double value) {
  std::size_t bucket = 0;
  while (bucket < bounds_.size() && value > bounds_[bucket]) ++bucket;
  counts_[bucket].fetch_add(1, std::memory_order_relaxed);
  sum_.fetch_add(value, std::memory_order_relaxed);
}

std::uint64_t Histogram::count() const {
  std::uint64_t total = 0;
  for (const auto& bucket : counts_) total += bucket.load(std::memory_order_relaxed);
  return total;
}

void Histogram::write(std::string& out, std::string_view name, const std::string& labels) const {
  const std::string base(name);
  const std::string prefix = labels.empty() ? "" : labels + ",";
  const std::string braces = labels.empty() ? "" : "{" + labels + "}";
  std::uint64_t below = 0;
  for (std::size_t i = 0; i < counts_.size(); ++i) {
    below += counts_[i].load(std::memory_order_relaxed);
    out += base + "_bucket{" + prefix + "le=\"" + (i < bounds_.size() ? number(bounds_[i]) : "+Inf") +
           "\"} " + std::to_string(below) + "\n";
  }
  out += base + "_sum" + braces + " " + number(sum_.load(std::memory_order_relaxed)) + "\n";
  out += base + "_count" + braces + " " + std::to_string(below) + "\n";
}

Metrics::Metrics() : batch_size({1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64}) {
  for (std::size_t i = 0; i < static_cast<std::size_t>(Stage::kCount); ++i)
    stages.emplace_back(latency_bounds());
}

std::string escape_label(std::string_view value) {
  std::string out;
  for (const char c : value) {
    if (c == '\\' || c == '"') out += '\\';
    if (c == '\n') {
      out += "\\n";
    } else {
      out += c;
    }
  }
  return out;
}

std::string Metrics::text(const std::string& info) const {
  std::string out;
  const auto head = [&](const std::string& name, const char* type, const char* help) {
    out += "# HELP " + name + " " + help + "\n# TYPE " + name + " " + type + "\n";
  };
  const auto one = [&](const std::string& name, const char* type, const char* help, auto value) {
    head(name, type, help);
    out += name + " " + std::to_string(value) + "\n";
  };
  head("servoflow_info", "gauge", "What is served.");
  out += "servoflow_info{" + info + "} 1\n";
  one("servoflow_connections", "gauge", "Robots connected now.", connections.load());
  one("servoflow_connections_total", "counter", "Robots that ever connected.", connections_opened.load());
  one("servoflow_requests_total", "counter", "Messages received.", requests.load());
  one("servoflow_replies_total", "counter", "Action chunks sent.", replies.load());
  head("servoflow_errors_total", "counter", "Refused requests and connections, by cause.");
  for (std::size_t i = 0; i < errors.size(); ++i)
    out += "servoflow_errors_total{cause=\"" + std::string(cause_name(static_cast<Cause>(i))) + "\"} " +
           std::to_string(errors[i].load()) + "\n";
  one("servoflow_queue_length", "gauge", "Requests waiting for the device.", queue_length.load());
  one("servoflow_deadlines_missed_total", "counter", "Requests answered after their deadline_ms.",
      deadlines_missed.load());
  head("servoflow_batch_size", "histogram", "Requests computed together.");
  batch_size.write(out, "servoflow_batch_size", "");
  head("servoflow_stage_seconds", "histogram", "Time per stage of a request.");
  for (std::size_t i = 0; i < stages.size(); ++i)
    stages[i].write(out, "servoflow_stage_seconds",
                    "stage=\"" + std::string(stage_name(static_cast<Stage>(i))) + "\"");
  one("servoflow_checkpoint_generation", "gauge", "1 for the checkpoint opened first, one more per reload.",
      generation.load());
  one("servoflow_reloads_total", "counter", "Checkpoints reloaded.", reloads.load());
  one("servoflow_failed_reloads_total", "counter", "Reloads refused; the old checkpoint goes on.",
      failed_reloads.load());
  one("servoflow_recorded_total", "counter", "Requests written by --record.", recorded.load());
  one("servoflow_not_recorded_total", "counter", "Requests that --record could not write.",
      not_recorded.load());
  one("servoflow_weight_bytes", "gauge", "Weights on the devices.", weight_bytes.load());
  one("servoflow_workspace_bytes", "gauge", "Working memory on the devices.", workspace_bytes.load());
  one("process_resident_memory_bytes", "gauge", "Resident memory of the process.", resident_bytes());
  return out;
}

}  // namespace servoflow::serve
