// What is recorded before a policy is ready, what is recorded when it comes, and that neither shows in an
// answer.
#include <gtest/gtest.h>

#include "policy/network.h"
#include "policy/noise.h"
#include "weights/synth.h"

namespace servoflow::policy {
namespace {

class Recordings : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override { architecture_ = weights::tiny_architecture(); }

  std::unique_ptr<Network> network() const {
    auto source = std::make_shared<weights::SyntheticSource>(architecture_, 3, DType::kBF16);
    auto made = Network::create(source, architecture_, {.device = GetParam(), .max_batch = 2});
    if (!made.ok()) std::printf("%s\n", std::string(made.status().message()).c_str());
    EXPECT_TRUE(made.ok());
    return made.ok() ? std::move(*made) : nullptr;
  }
  stages::ModelInput input(int pictures, int tokens) const {
    const auto side = static_cast<std::size_t>(architecture_.vision.image);
    stages::ModelInput in;
    for (int p = 0; p < pictures; ++p) {
      in.pictures.push_back({p, std::vector<float>(side * side * 3)});
      for (std::size_t i = 0; i < in.pictures.back().pixels.size(); ++i)
        in.pictures.back().pixels[i] = static_cast<float>(i * 7 % 101) / 50 - 1;
    }
    in.picture_count = pictures;
    for (int t = 0; t < tokens; ++t) in.tokens.push_back(3 + t);
    return in;
  }
  struct Answer {
    std::vector<float> actions;
    bool recorded = false;
  };
  Answer run(Network& network, const std::vector<stages::ModelInput>& inputs, int steps) const {
    const auto size = static_cast<std::size_t>(architecture_.horizon * architecture_.action_dim);
    Answer out{std::vector<float>(size * inputs.size()), false};
    std::vector<float> noise(size);
    fill_noise(1, 2, noise);
    std::vector<NetworkRequest> requests;
    for (std::size_t i = 0; i < inputs.size(); ++i)
      requests.push_back({&inputs[i], noise, std::span(out.actions).subspan(i * size, size)});
    StageTimes times;
    const Status status = network.run(requests, steps, &times, nullptr);
    EXPECT_TRUE(status.ok()) << status.message();
    out.recorded = times.recorded;
    return out;
  }
  weights::Architecture architecture_;
};

TEST_P(Recordings, WhatWasPreparedIsReplayedAndAnswersTheSame) {
  const auto prepared = network(), plain = network();
  ASSERT_TRUE(prepared && plain);
  const std::vector<PassShape> shapes = {{1, 1, 2}, {1, 2, 2}, {2, 1, 2}};
  std::vector<std::uint64_t> progress;
  Status status = prepared->prepare(shapes, [&](std::uint64_t done, std::uint64_t total) {
    EXPECT_EQ(total, shapes.size());
    progress.push_back(done);
  });
  ASSERT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(progress, (std::vector<std::uint64_t>{1, 2, 3}));
  EXPECT_EQ(prepared->recordings(), 3);
  // Lengths other than those of the passes that were recorded, in both orders.
  const std::vector<std::vector<stages::ModelInput>> work = {
      {input(2, 30)}, {input(1, 3)}, {input(1, 40), input(1, 2)}, {input(2, 1)}};
  for (const auto& inputs : work) {
    const Answer first = run(*prepared, inputs, 2), again = run(*prepared, inputs, 2),
                 want = run(*plain, inputs, 2);
    EXPECT_FALSE(first.recorded || again.recorded);
    EXPECT_EQ(first.actions, want.actions);
    EXPECT_EQ(again.actions, want.actions);
  }
  EXPECT_EQ(prepared->recordings(), 3);
  EXPECT_EQ(plain->recordings(), 3);

  // Pictures are counted over the batch, and everything else is recorded when it comes.
  for (const auto& [inputs, steps] : {std::pair(std::vector{input(2, 3), input(1, 3)}, 2),
                                      {std::vector{input(0, 5)}, 2},
                                      {std::vector{input(1, 3)}, 3}}) {
    const Answer first = run(*prepared, inputs, steps), again = run(*prepared, inputs, steps);
    EXPECT_TRUE(first.recorded);
    EXPECT_FALSE(again.recorded);
    EXPECT_EQ(first.actions, again.actions);
  }
  EXPECT_EQ(prepared->recordings(), 6);
  status = prepared->prepare({{{3, 1, 2}}}, {});
  EXPECT_EQ(status.code(), StatusCode::kInvalidInput) << "more requests than it was opened for";
}

// Two views of one robot and one of another, whose frames are given.
struct Robots {
  explicit Robots(int count)
      : frame(std::size_t{224} * 224 * 3, 99), observations(static_cast<std::size_t>(count)) {
    for (Observation& o : observations) o.tokens = tokens;
  }
  void views(std::size_t robot, int count) {
    observations[robot].images.clear();
    const char* slots[] = {"base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"};
    for (int i = 0; i < count; ++i)
      observations[robot].images.push_back({slots[i], ImageLayout::kHWC, 224, 224, frame});
  }
  std::vector<std::int32_t> tokens = {2, 5, 9, 7};
  std::vector<std::uint8_t> frame;
  std::vector<Observation> observations;
};

TEST_P(Recordings, APolicyPreparesWhatItsSessionsWillAskFor) {
  int recorded = 0;
  PolicyOptions options{.device = GetParam(), .max_batch = 2, .prepare_steps = {1, 2}};
  options.preparing = [&](std::uint64_t done, std::uint64_t total) {
    EXPECT_EQ(static_cast<int>(done), ++recorded);
    EXPECT_EQ(total, 12u);
  };
  auto policy = Policy::open_synthetic("tiny", options, 0, 4);
  ASSERT_TRUE(policy.ok()) << policy.status().message();
  EXPECT_EQ(policy->info().devices[0].prepared, 12) << "two numbers of steps, two batches, three slots";
  EXPECT_EQ(recorded, 12);
  Session a = *policy->new_session({.seed = 1}), b = *policy->new_session({.seed = 2});
  Robots robots(2);
  std::vector<double> last;
  for (const int views : {3, 1, 2}) {
    robots.views(0, views);
    const auto chunk = a.infer(robots.observations[0], {.steps = 2});
    ASSERT_TRUE(chunk.ok()) << chunk.status().message();
    EXPECT_FALSE(chunk->times.recorded) << views;
    last = chunk->actions;
  }
  a.reset();
  const auto alone = [&](int steps) { return *a.infer(robots.observations[0], {.steps = steps}); };
  const ActionChunk first = alone(2);
  EXPECT_EQ(first.request, 0u);
  EXPECT_NE(first.actions, last) << "another request has another noise";
  EXPECT_TRUE(alone(3).times.recorded);
  EXPECT_FALSE(alone(3).times.recorded);
  a.reset();
  EXPECT_EQ(alone(2).actions, first.actions);

  std::vector<ActionChunk> chunks(2);
  Session* sessions[] = {&a, &b};
  const Observation* seen[] = {&robots.observations[0], &robots.observations[1]};
  for (const auto& [views, late] : {std::pair(2, false), {1, true}, {1, false}}) {
    robots.views(1, views);
    const Status status = infer_batch(sessions, seen, {.steps = 2}, chunks);
    ASSERT_TRUE(status.ok()) << status.message();
    for (const ActionChunk& chunk : chunks) EXPECT_EQ(chunk.times.recorded, late) << views;
  }
}

TEST_P(Recordings, ARobotSaysHowManyPicturesThereAre) {
  for (const auto& [robot, shapes] : {std::pair("libero", 1), {"none", 3}, {"", 3}}) {
    auto policy = Policy::open("tests/golden/openpi-tiny",
                               {.device = GetParam(), .robot = robot, .prepare_steps = {1}});
    ASSERT_TRUE(policy.ok()) << policy.status().message();
    EXPECT_EQ(policy->info().devices[0].prepared, shapes) << '"' << robot << '"';
  }
}

TEST(RecordingsCpu, NothingIsRecorded) {
  PolicyOptions options{.device = "cpu", .max_batch = 4, .prepare_steps = {1, 2}};
  options.preparing = [](std::uint64_t, std::uint64_t) { ADD_FAILURE() << "there is nothing to record"; };
  auto policy = Policy::open_synthetic("tiny", options, 0, 4);
  ASSERT_TRUE(policy.ok()) << policy.status().message();
  EXPECT_EQ(policy->info().devices[0].prepared, 0);
  Session session = *policy->new_session();
  Robots robots(1);
  robots.views(0, 1);
  const auto chunk = session.infer(robots.observations[0], {.steps = 1});
  ASSERT_TRUE(chunk.ok()) << chunk.status().message();
  EXPECT_FALSE(chunk->times.recorded);
}

TEST(RecordingsCpu, ExpectationsThatCannotBeMetAreRefused) {
  const auto refused = [](const PolicyOptions& options, const char* saying) {
    const Status status = Policy::open_synthetic("tiny", options).status();
    EXPECT_EQ(status.code(), StatusCode::kInvalidInput);
    EXPECT_NE(status.message().find(saying), std::string::npos) << status.message();
  };
  refused({.device = "cpu", .prepare_steps = {10, 0}}, "prepare_steps: 0 Euler steps; choose 1 to 50");
  refused({.device = "cpu", .prepare_steps = {51}}, "prepare_steps: 51");
  refused({.device = "cpu", .prepare_steps = {1, 2, 3, 4, 5}},
          "prepare_steps: 5 numbers of steps; at most 4");
  refused({.device = "cpu", .prompt_tokens = 100000}, "prompt_tokens: 100000; the model takes at most");
}

INSTANTIATE_TEST_SUITE_P(Devices, Recordings, testing::Values("reference", "cuda"),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace servoflow::policy
