#include "core/thread_pool.h"

#include <sched.h>

#include <algorithm>

namespace servoflow {
namespace {

constexpr int kTaskBits = 20;
constexpr std::uint64_t kTaskMask = (std::uint64_t{1} << kTaskBits) - 1;
constexpr int kMaxTasks = 1 << 19;  // leaves room for every thread's last, vain claim
constexpr int kSpins = 4000;        // some 20-40 µs: longer than the gaps between the ops of one inference

int next_of(std::uint64_t ticket) { return static_cast<int>(ticket & kTaskMask); }
int tasks_of(std::uint64_t ticket) { return static_cast<int>((ticket >> kTaskBits) & kTaskMask); }

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

int usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

ThreadPool::ThreadPool(int threads) {
  const int total = std::clamp(threads > 0 ? threads : usable_cores(), 1, 1024);
  workers_.reserve(static_cast<std::size_t>(total - 1));
  for (int i = 1; i < total; ++i) workers_.emplace_back([this, i] { work(i); });
}

ThreadPool::~ThreadPool() {
  stop_.store(true, std::memory_order_release);
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

bool ThreadPool::run_one(int thread) {
  if (const std::uint64_t seen = ticket_.load(std::memory_order_acquire); next_of(seen) >= tasks_of(seen))
    return false;
  const std::uint64_t mine = ticket_.fetch_add(1, std::memory_order_acq_rel);
  const int task = next_of(mine), tasks = tasks_of(mine);
  if (task >= tasks) return false;
  call_(body_, task, thread);
  // Read nothing of the pool's job after this: the caller may already be setting up the next one.
  if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<std::uint32_t>(tasks))
    done_.notify_all();
  return true;
}

void ThreadPool::work(int thread) {
  while (true) {
    const std::uint32_t epoch = epoch_.load(std::memory_order_acquire);
    if (stop_.load(std::memory_order_acquire)) return;
    bool ran = false;
    for (int spin = 0; spin < kSpins && !ran; ++spin) {
      ran = run_one(thread);
      if (!ran) relax();
    }
    if (!ran) epoch_.wait(epoch, std::memory_order_acquire);
  }
}

void ThreadPool::run(int tasks, Call call, void* body) {
  if (workers_.empty() || tasks <= 1) {
    for (int task = 0; task < tasks; ++task) call(body, task, 0);
    return;
  }
  for (int first = 0; first < tasks; first += kMaxTasks) {
    struct Part {
      Call call;
      void* body;
      int first;
    } part{call, body, first};
    call_ = [](void* p, int task, int thread) {
      const Part& part = *static_cast<Part*>(p);
      part.call(part.body, part.first + task, thread);
    };
    body_ = &part;
    const std::uint32_t count = static_cast<std::uint32_t>(std::min(kMaxTasks, tasks - first));
    done_.store(0, std::memory_order_relaxed);
    const std::uint64_t epoch = (epoch_.load(std::memory_order_relaxed) + 1) & 0xffffff;
    ticket_.store((epoch << (2 * kTaskBits)) | (std::uint64_t{count} << kTaskBits),
                  std::memory_order_release);
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
    while (run_one(0)) {
    }
    for (int spin = 0; done_.load(std::memory_order_acquire) != count; ++spin) {
      if (spin < kSpins) {
        relax();
      } else if (const std::uint32_t now = done_.load(std::memory_order_acquire); now != count) {
        done_.wait(now, std::memory_order_acquire);
      }
    }
  }
}

}  // namespace servoflow
