// The denoise loop's one launch when its blocks run at different speeds, and when one of them does not count.
// Needs a Hopper GPU.
#include "ops/cuda/loop_trouble.h"

#include <cstdio>
#include <cstdlib>

#include "ops/cuda/expert_problem.h"
#include "ops/cuda/loop_stall.h"
#include "ops/cuda/paths.h"

namespace servoflow::ops {
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(Ops);  // the problem comes with them
}

namespace servoflow::ops::cuda {
namespace {

std::unique_ptr<Backend> backend() {
  auto made = make_cuda_backend("bf16", 0, CudaPath::kBest);
  if (!made.ok()) {
    std::printf("%s\n", std::string(made.status().message()).c_str());
    std::exit(1);
  }
  return std::move(*made);
}

// As little as there can be, for compute-sanitizer (`make sanitize-loop-gpu`).
TEST(LoopTrouble, OneLayerOfOneStepUndisturbed) {
  Device device(backend());
  ExpertProblem problem(device, {.depth = 1, .steps = 1, .horizon = 10, .past = {48}});
  const Result<std::vector<float>> first = problem.run(1), again = problem.run(1);
  ASSERT_TRUE(first.ok() && again.ok()) << first.status().message() << again.status().message();
  for (const float a : *first) EXPECT_TRUE(std::isfinite(a));
  EXPECT_EQ(*first, *again);
}

TEST(LoopTrouble, AnySpeedsOfItsBlocksGiveTheSameBits) {
  Device device(backend());
  const std::vector<ExpertShape> shapes = {
      {.depth = 3, .steps = 3, .horizon = 50, .past = {712, 600, 37, 1}},
      {.depth = 2, .steps = 2, .horizon = 10, .past = {560, 48}},
  };
  for (const ExpertShape& shape : shapes) {
    ExpertProblem problem(device, shape);
    const int all = static_cast<int>(shape.past.size());
    const auto run = [&](int count) {
      const Result<std::vector<float>> actions = problem.run(count);
      EXPECT_TRUE(actions.ok()) << actions.status().message();
      return actions.ok() ? *actions : std::vector<float>();
    };
    undo_trouble(*device.b);
    const std::vector<float> want = run(all);
    ASSERT_FALSE(want.empty());
    const std::vector<float> first(want.begin(),
                                   want.begin() + static_cast<std::ptrdiff_t>(want.size()) / all);
    for (unsigned seed = 0; seed <= 8; ++seed) {  // without a seed nobody waits
      ASSERT_TRUE(trouble_loop(*device.b, {.seed = seed})) << "this GPU does not run the loop in one launch";
      const int before = troubled_launches();
      EXPECT_EQ(run(all), want) << "seed " << seed;
      EXPECT_EQ(run(1), first) << "seed " << seed << ", alone";
      EXPECT_EQ(troubled_launches(), before + 2) << "the loop took another way";
    }
  }
}

// Block 42 is rank 2 of cluster 5, block 74 makes group 10 of keys and values; turn 3 is layer 1 of step 1. A
// row's edge is made by the block of its number.
struct Silence {
  const char* name;
  LoopTrouble trouble;
  const char* stands;
};
class LoopStalls : public testing::TestWithParam<Silence> {};

// In a process of its own: what the GPU had of it is lost.
[[noreturn]] void stall(const LoopTrouble& trouble) {
  Device device(backend());
  ExpertProblem problem(device, {.depth = 2, .steps = 2, .horizon = 25, .past = {600}});
  if (!trouble_loop(*device.b, trouble)) {
    std::fprintf(stderr, "this GPU does not run the loop in one launch\n");
    std::_Exit(1);
  }
  const Result<std::vector<float>> actions = problem.run(1);
  std::fprintf(stderr, "%s\n",
               actions.ok() ? "nobody missed it" : std::string(actions.status().message()).c_str());
  std::_Exit(actions.ok() ? 1 : 7);
}

TEST_P(LoopStalls, SayWhereAndWhoIsMissing) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const Silence& s = GetParam();
  EXPECT_EXIT(
      stall(s.trouble), testing::ExitedWithCode(7),
      std::string("denoise loop stopped itself.*it stands at ") + s.stands + " have counted; block [0-9]+");
}

INSTANTIATE_TEST_SUITE_P(
    Phases, LoopStalls,
    testing::Values(
        Silence{"edge", {0, 12, loop::kEdges, loop::kColumns, 25}, "step 1, edge: request 0: 24 of 25 rows"},
        Silence{"qkv",
                {0, 74, loop::kKeys, loop::kAttended, 3 * 4},
                "step 1, layer 1, q/k/v: request 0: 3 of 4 blocks with keys and values, every eighth from 2"},
        Silence{"attention",
                {0, 42, loop::kAttended, loop::kHidden, 3 * 8},
                "step 1, layer 1, attention: request 0: 7 of 8 blocks of cluster 5"},
        Silence{"out",
                {0, 42, loop::kColumns, loop::kKeys, 6 * 15},
                "step 1, layer 1, out: request 0: 14 of 15 blocks of rank 2"},
        Silence{"gate_up",
                {0, 42, loop::kHidden, kLoopCounters, 3 * 16},
                "step 1, layer 1, gate/up: request 0: 15 of 16 blocks of slice 2"},
        Silence{"down",
                {0, 42, loop::kColumns, loop::kKeys, 7 * 15},
                "step 1, layer 1, down: request 0: 14 of 15 blocks of rank 2"}),
    [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace servoflow::ops::cuda
