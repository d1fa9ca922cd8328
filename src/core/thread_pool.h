// The one pool of worker threads. Tasks are handed out one by one, so that a thread that lost its core slows
// nothing but the task it holds; waiting spins briefly and then sleeps, so that a shared core is given back.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <type_traits>
#include <vector>

namespace servoflow {

// Cores this process may run on (its affinity mask), at least 1.
int usable_cores();

class ThreadPool {
 public:
  // `threads` in total, the calling thread included; 0 = usable_cores().
  explicit ThreadPool(int threads = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Runs body(task, thread) for every task in [0, tasks) and returns when all are done; thread is in [0,
  // threads()) and no two bodies run with the same thread number at once. Allocates nothing. One caller at a
  // time; not reentrant.
  template <typename Body>
  void parallel_for(int tasks, Body&& body) {
    using Plain = std::remove_reference_t<Body>;
    run(
        tasks, [](void* b, int task, int thread) { (*static_cast<Plain*>(b))(task, thread); },
        const_cast<void*>(static_cast<const void*>(&body)));
  }

 private:
  using Call = void (*)(void* body, int task, int thread);
  void run(int tasks, Call call, void* body);
  void work(int thread);
  bool run_one(int thread);

  // epoch (24 bits) | number of tasks (20) | next task (20): one word, so that a claim is valid by itself,
  // however late the claiming thread woke up. While a claimed task is unfinished its caller waits, so call_
  // and body_ are its own.
  std::atomic<std::uint64_t> ticket_{0};
  alignas(64) std::atomic<std::uint32_t> done_{0};
  alignas(64) std::atomic<std::uint32_t> epoch_{0};  // what sleeping workers wait on
  std::atomic<bool> stop_{false};
  Call call_ = nullptr;
  void* body_ = nullptr;
  std::vector<std::thread> workers_;
};

}  // namespace servoflow
