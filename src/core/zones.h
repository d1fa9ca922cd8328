// Trace zones: named intervals of one inference. Off (the default) costs one relaxed load and a branch per
// zone.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace servoflow::zones {

struct Event {
  const char* name;                // a string literal, "stage/component": "prefix/mlp"
  int thread;                      // small number in order of first use
  std::uint64_t begin_ns, end_ns;  // steady clock
  double flops, bytes;             // work done inside, where the zone knows it; else 0
};

// Turning on clears what was recorded. Events beyond 1 << 20 are counted, not kept.
void enable(bool on);
// All events so far in order of their begin; recording goes on.
std::vector<Event> collect();
std::uint64_t dropped();

namespace internal {
extern std::atomic<bool> enabled;
void record(const char* name, std::uint64_t begin_ns, double flops, double bytes);
std::uint64_t now_ns();
}  // namespace internal

class Zone {
 public:
  explicit Zone(const char* name, double flops = 0, double bytes = 0)
      : name_(name),
        flops_(flops),
        bytes_(bytes),
        begin_(internal::enabled.load(std::memory_order_relaxed) ? internal::now_ns() : 0) {}
  ~Zone() {
    if (begin_ != 0) internal::record(name_, begin_, flops_, bytes_);
  }
  Zone(const Zone&) = delete;
  Zone& operator=(const Zone&) = delete;

 private:
  const char* name_;
  double flops_, bytes_;
  std::uint64_t begin_;
};

}  // namespace servoflow::zones
