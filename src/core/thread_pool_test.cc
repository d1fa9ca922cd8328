#include "core/thread_pool.h"

#include <gtest/gtest.h>

#include <chrono>
#include <numeric>

namespace servoflow {
namespace {

TEST(ThreadPool, RunsEveryTaskOnce) {
  for (const int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.threads(), threads);
    for (const int tasks : {0, 1, 2, 7, 1000, 20000}) {
      std::vector<std::atomic<int>> seen(static_cast<std::size_t>(tasks));
      pool.parallel_for(tasks, [&](int task, int thread) {
        EXPECT_LT(thread, threads);
        seen[static_cast<std::size_t>(task)].fetch_add(1, std::memory_order_relaxed);
      });
      for (const auto& count : seen) EXPECT_EQ(count.load(), 1);
    }
  }
}

// Many short jobs back to back: late workers meet jobs that are already over, and results must be visible on
// return.
TEST(ThreadPool, BackToBackJobsNeverMix) {
  ThreadPool pool(4);
  std::vector<int> data(64);
  for (int round = 0; round < 20000; ++round) {
    const int tasks = 1 + round % 64;
    pool.parallel_for(tasks, [&](int task, int) { data[static_cast<std::size_t>(task)] = round; });
    for (int i = 0; i < tasks; ++i) ASSERT_EQ(data[static_cast<std::size_t>(i)], round);
  }
}

TEST(ThreadPool, ThreadNumbersAreExclusive) {
  ThreadPool pool(4);
  std::array<std::atomic<int>, 4> busy{};
  pool.parallel_for(2000, [&](int, int thread) {
    ASSERT_EQ(busy[static_cast<std::size_t>(thread)].fetch_add(1), 0);
    std::this_thread::yield();
    busy[static_cast<std::size_t>(thread)].fetch_sub(1);
  });
}

TEST(ThreadPool, WakesSleepingWorkers) {
  ThreadPool pool(2);
  for (int i = 0; i < 20; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // long enough for workers to fall asleep
    std::atomic<int> count{0};
    pool.parallel_for(10, [&](int, int) { count.fetch_add(1); });
    ASSERT_EQ(count.load(), 10);
  }
}

}  // namespace
}  // namespace servoflow
