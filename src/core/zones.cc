#include "core/zones.h"

#include <algorithm>
#include <chrono>
#include <mutex>

namespace servoflow::zones {
namespace {
constexpr std::size_t kMaxEvents = std::size_t{1} << 20, kReadyEvents = std::size_t{1} << 13;
std::mutex mutex;
std::vector<Event> events;
std::uint64_t lost = 0;
std::atomic<int> threads{0};
}  // namespace

namespace internal {
std::atomic<bool> enabled{false};

std::uint64_t now_ns() {
  return static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(
                                        std::chrono::steady_clock::now().time_since_epoch())
                                        .count());
}

void record(const char* name, std::uint64_t begin_ns, double flops, double bytes) {
  thread_local const int thread = threads.fetch_add(1);
  const std::uint64_t end = now_ns();
  const std::lock_guard lock(mutex);
  if (events.size() < kMaxEvents) {
    events.push_back({name, thread, begin_ns, end, flops, bytes});
  } else {
    ++lost;
  }
}
}  // namespace internal

void enable(bool on) {
  const std::lock_guard lock(mutex);
  if (on) {
    // Memory for a few inferences is touched now, so that recording does not fault pages in.
    if (events.capacity() < kReadyEvents) events.resize(kReadyEvents);
    events.clear();
    lost = 0;
  }
  internal::enabled.store(on, std::memory_order_relaxed);
}

std::vector<Event> collect() {
  const std::lock_guard lock(mutex);
  std::vector<Event> out = events;
  std::stable_sort(out.begin(), out.end(),
                   [](const Event& a, const Event& b) { return a.begin_ns < b.begin_ns; });
  return out;
}

std::uint64_t dropped() {
  const std::lock_guard lock(mutex);
  return lost;
}

}  // namespace servoflow::zones
