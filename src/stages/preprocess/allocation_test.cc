// Counts every allocation of the process while a preprocessor runs in its steady state.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <vector>

#include "contract/load.h"
#include "stages/preprocess/preprocessor.h"

// Sanitizers bring a malloc of their own, which must not be replaced.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SF_COUNTS_ALLOCATIONS 0
#else
#define SF_COUNTS_ALLOCATIONS 1
#endif

namespace {
std::atomic<long> allocations{0};
}  // namespace

#if SF_COUNTS_ALLOCATIONS
// operator new ends here as well, as does what C libraries take.
extern "C" void* __libc_malloc(std::size_t);
extern "C" void* __libc_calloc(std::size_t, std::size_t);
extern "C" void* __libc_realloc(void*, std::size_t);
extern "C" void* malloc(std::size_t size) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  return __libc_malloc(size);
}
extern "C" void* calloc(std::size_t count, std::size_t size) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  return __libc_calloc(count, size);
}
extern "C" void* realloc(void* block, std::size_t size) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  return __libc_realloc(block, size);
}
#endif

namespace servoflow::stages {
namespace {

void expect_steady(const contract::Contract& contract, const std::vector<std::string_view>& names, int height,
                   int width, ImageLayout layout) {
  auto made = Preprocessor::create(
      contract,
      {.image_size = 224, .tokenizer_path = "tests/golden/tokenizer/tokenizer.model", .vocab = 1024});
  ASSERT_TRUE(made.ok()) << made.status().message();
  const std::vector<std::uint8_t> frame(3 * static_cast<std::size_t>(height) * width, 99);
  std::vector<double> state(8, 0.1);
  Observation observation;
  for (const auto name : names) observation.images.push_back({name, layout, height, width, frame});
  observation.state = state;
  observation.prompt = "put both the alphabet soup and the tomato sauce in the basket";
  ModelInput out;
  for (int i = 0; i < 2; ++i) ASSERT_TRUE((*made)->run(observation, out).ok());
  const long before = allocations.load();
  for (int i = 0; i < 10; ++i) {
    state[0] += 1e-6;  // stays in its bin
    const Status status = (*made)->run(observation, out);
    if (!status.ok()) FAIL() << status.message();
  }
  EXPECT_EQ(allocations.load() - before, 0);
}

TEST(Preprocessor, AllocatesNothingInItsSteadyState) {
#if SF_COUNTS_ALLOCATIONS
  const long before = allocations.load();
  delete new std::vector<int>(10);
  ASSERT_GT(allocations.load(), before) << "the counter is not in place";
#endif
  auto libero = contract::load_contract("tests/golden/openpi-tiny", {.robot = "libero"});
  ASSERT_TRUE(libero.ok()) << libero.status().message();
  for (const auto layout : {ImageLayout::kHWC, ImageLayout::kCHW}) {
    expect_steady(*libero, {"observation/image", "observation/wrist_image"}, 480, 640, layout);
    expect_steady(*libero, {"observation/image", "observation/wrist_image"}, 224, 224, layout);
  }
  libero->prompt.mode = contract::PromptMode::kState;
  expect_steady(*libero, {"observation/image", "observation/wrist_image"}, 256, 256, ImageLayout::kHWC);
  const auto lerobot = contract::load_contract("tests/golden/lerobot-tiny", {.lerobot_layout = true});
  ASSERT_TRUE(lerobot.ok()) << lerobot.status().message();
  expect_steady(*lerobot, {"observation.images.aux", "observation.images.top"}, 256, 256, ImageLayout::kHWC);
}

}  // namespace
}  // namespace servoflow::stages
