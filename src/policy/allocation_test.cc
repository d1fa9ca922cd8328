// Steady-state inference allocates nothing: every allocation of the process, libraries included, is counted.
#include <gtest/gtest.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>

#include "servoflow/policy.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SF_COUNTS_ALLOCATIONS 0  // the sanitizers own malloc
#else
#define SF_COUNTS_ALLOCATIONS 1
#endif

namespace {
std::atomic<long> allocations{0};
}

#if SF_COUNTS_ALLOCATIONS
extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);
void* malloc(std::size_t n) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  return __libc_malloc(n);
}
void* calloc(std::size_t n, std::size_t size) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  return __libc_calloc(n, size);
}
void* realloc(void* p, std::size_t n) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  return __libc_realloc(p, n);
}
void* aligned_alloc(std::size_t alignment, std::size_t n) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  return __libc_memalign(alignment, n);
}
int posix_memalign(void** out, std::size_t alignment, std::size_t n) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  *out = __libc_memalign(alignment, n);
  return *out != nullptr ? 0 : ENOMEM;
}
}
#endif

namespace servoflow {
namespace {

TEST(Allocation, SteadyStateInferenceAllocatesNothing) {
  for (const char* precision : {"fp32", "bf16", "int8-w8a8", "int4-g128-w4a16", "nvfp4-w4a8"}) {
    auto policy = Policy::open("tests/golden/openpi-tiny", {.device = "cpu", .precision = precision});
    ASSERT_TRUE(policy.ok()) << policy.status().message();
    auto session = policy->new_session({.robot = "libero"});
    ASSERT_TRUE(session.ok()) << session.status().message();
    std::vector<std::uint8_t> frame(256 * 256 * 3, 40);
    std::vector<double> state(8, 0.1);
    Observation o;
    o.images = {{"observation/image", ImageLayout::kHWC, 256, 256, frame},
                {"observation/wrist_image", ImageLayout::kHWC, 256, 256, frame}};
    o.state = state;
    o.prompt = "open the top drawer";
    ActionChunk chunk;
    for (int i = 0; i < 3; ++i) ASSERT_TRUE(session->infer_into(o, {}, chunk).ok());
    const long before = allocations.load();
    for (int i = 0; i < 20; ++i) {
      frame[static_cast<std::size_t>(i)] = static_cast<std::uint8_t>(i);
      state[0] = 0.01 * i;
      const Status status = session->infer_into(o, {}, chunk);
      ASSERT_TRUE(status.ok());
    }
    const long during = allocations.load() - before;
    if (SF_COUNTS_ALLOCATIONS) EXPECT_GT(before, 0) << "the hook is not in place";
    if (SF_COUNTS_ALLOCATIONS) EXPECT_EQ(during, 0) << precision;
  }
}

}  // namespace
}  // namespace servoflow
