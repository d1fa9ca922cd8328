// The public API on a real checkpoint directory: determinism, batches, sessions in threads, errors.
#include "servoflow/policy.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <thread>

#include "core/safetensors.h"

namespace servoflow {
namespace {

const std::string kCheckpoint = "tests/golden/openpi-tiny";

struct Frames {
  Frames() : first(256 * 256 * 3), second(320 * 180 * 3), state{0.4, -0.5, 0.2, -0.4, 0.4, -0.6, -0.2, -0.2} {
    for (std::size_t i = 0; i < first.size(); ++i) first[i] = static_cast<std::uint8_t>(i * 7 / 3);
    for (std::size_t i = 0; i < second.size(); ++i) second[i] = static_cast<std::uint8_t>(i * 5 / 7);
  }
  Observation observation(std::string_view prompt = "open the drawer") const {
    Observation o;
    o.images = {{"observation/image", ImageLayout::kHWC, 256, 256, first},
                {"observation/wrist_image", ImageLayout::kHWC, 180, 320, second}};
    o.state = state;
    o.prompt = prompt;
    return o;
  }
  std::vector<std::uint8_t> first, second;
  std::vector<double> state;
};

class PolicyTest : public testing::Test {
 protected:
  void SetUp() override {
    auto opened =
        Policy::open(kCheckpoint, {.device = "cpu", .precision = "bf16", .threads = 2, .max_batch = 4});
    ASSERT_TRUE(opened.ok()) << opened.status().message();
    policy = std::make_unique<Policy>(*opened);
  }
  Session session(std::uint64_t seed, const std::string& robot = "libero") const {
    auto s = policy->new_session({.robot = robot, .seed = seed});
    EXPECT_TRUE(s.ok()) << s.status().message();
    return *s;
  }
  Frames frames;
  std::unique_ptr<Policy> policy;
};

TEST_F(PolicyTest, InfersAChunkInRobotUnits) {
  Session s = session(7);
  const auto chunk = s.infer(frames.observation());
  ASSERT_TRUE(chunk.ok()) << chunk.status().message();
  EXPECT_EQ(chunk->horizon, 10);
  EXPECT_EQ(chunk->action_dim, 7);
  EXPECT_EQ(chunk->actions.size(), 70u);
  EXPECT_EQ(chunk->normalized.size(), 320u);
  EXPECT_EQ(chunk->times.steps.size(), 10u);
  EXPECT_GT(chunk->prefix_tokens, 512);
  EXPECT_EQ(chunk->device, "cpu");
  EXPECT_EQ(chunk->precision, "bf16");
  EXPECT_EQ(chunk->contract_hash, s.contract_hash());
  for (const double a : chunk->actions) EXPECT_TRUE(std::isfinite(a));
}

TEST_F(PolicyTest, SeedsRequestsAndResetDecideTheNoise) {
  Session a = session(7), b = session(7), other = session(8);
  const auto first = a.infer(frames.observation()), second = a.infer(frames.observation());
  EXPECT_EQ(first->actions, b.infer(frames.observation())->actions);
  EXPECT_NE(first->actions, second->actions);
  EXPECT_NE(first->actions, other.infer(frames.observation())->actions);
  EXPECT_EQ(second->request, 1u);
  a.reset();
  EXPECT_EQ(a.infer(frames.observation())->actions, first->actions);
}

TEST_F(PolicyTest, ResetWithASeedIsANewSession) {
  Session a = session(7), b = session(8);
  for (int i = 0; i < 2; ++i) ASSERT_TRUE(a.infer(frames.observation()).ok());
  a.reset(8);
  for (int i = 0; i < 4; ++i)  // also the one whose noise was drawn ahead for the old seed
    EXPECT_EQ(a.infer(frames.observation())->actions, b.infer(frames.observation())->actions);
}

TEST_F(PolicyTest, KeptNoiseRepeatsTheInference) {
  Session a = session(7), b = session(1);
  ASSERT_TRUE(a.infer(frames.observation()).ok());
  EXPECT_TRUE(a.infer(frames.observation())->noise.empty());
  const auto kept = a.infer(frames.observation(), {.keep_noise = true});
  ASSERT_EQ(kept->noise.size(), 320u);
  EXPECT_EQ(kept->actions, b.infer(frames.observation(), {.noise = kept->noise})->actions);
}

TEST_F(PolicyTest, BatchesEqualSingleInferences) {
  const std::vector<std::string> prompts = {"open the drawer", "a",
                                            "put the red mug on the plate, then close the door"};
  std::vector<Session> together, alone;
  std::vector<Observation> observations;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    together.push_back(session(i));
    alone.push_back(session(i));
    observations.push_back(frames.observation(prompts[i]));
  }
  observations[1].images.pop_back();  // its wrist camera is missing
  observations[1].images[0].name = "base_0_rgb";
  if (!alone[1].infer(observations[1]).ok()) observations[1] = frames.observation(prompts[1]);
  alone[1].reset();
  Session* sessions[] = {&together[0], &together[1], &together[2]};
  const Observation* seen[] = {&observations[0], &observations[1], &observations[2]};
  std::vector<ActionChunk> chunks(3);
  const Status status = infer_batch(sessions, seen, {.steps = 5}, chunks);
  ASSERT_TRUE(status.ok()) << status.message();
  for (std::size_t i = 0; i < 3; ++i)
    EXPECT_EQ(chunks[i].actions, alone[i].infer(observations[i], {.steps = 5})->actions) << i;
}

TEST_F(PolicyTest, SessionsInThreadsKeepTheirOwnResults) {
  std::vector<std::vector<double>> want(4);
  for (std::uint64_t i = 0; i < want.size(); ++i)
    want[i] = session(i).infer(frames.observation(), {.steps = 2})->actions;
  std::vector<std::thread> threads;
  for (std::uint64_t i = 0; i < want.size(); ++i)
    threads.emplace_back([&, i] {
      Session s = session(i);
      for (int repeat = 0; repeat < 5; ++repeat) {
        s.reset();
        const auto chunk = s.infer(frames.observation(), {.steps = 2});
        ASSERT_TRUE(chunk.ok());
        ASSERT_EQ(chunk->actions, want[i]);
      }
    });
  for (std::thread& t : threads) t.join();
}

TEST_F(PolicyTest, GivenNoiseIsUsedAndChecked) {
  Session s = session(1);
  std::vector<float> noise(320, 0.25f);
  const auto a = s.infer(frames.observation(), {.noise = noise}),
             b = s.infer(frames.observation(), {.noise = noise});
  EXPECT_EQ(a->actions, b->actions);
  noise.pop_back();
  EXPECT_EQ(s.infer(frames.observation(), {.noise = noise}).status().code(), StatusCode::kInvalidInput);
}

TEST_F(PolicyTest, NonFiniteResultsNeverLeave) {
  Session s = session(1);
  const std::vector<float> noise(320, std::numeric_limits<float>::quiet_NaN());
  ActionChunk chunk;
  ASSERT_TRUE(s.infer_into(frames.observation(), {}, chunk).ok());
  const Status status = s.infer_into(frames.observation(), {.noise = noise}, chunk);
  EXPECT_EQ(status.code(), StatusCode::kRuntime) << status.message();
  EXPECT_TRUE(chunk.actions.empty());
  EXPECT_TRUE(chunk.normalized.empty());
  EXPECT_TRUE(s.infer_into(frames.observation(), {}, chunk).ok())
      << "one bad request must not poison the next";
}

TEST_F(PolicyTest, DescribesACheckpointWithoutItsWeights) {
  const auto info = Policy::describe(kCheckpoint, "libero");
  ASSERT_TRUE(info.ok()) << info.status().message();
  EXPECT_EQ(info->layout, "openpi");
  EXPECT_EQ(info->horizon, policy->info().horizon);
  EXPECT_EQ(info->model_action_dim, policy->info().model_action_dim);
  EXPECT_EQ(info->default_steps, 10);
  const auto session = policy->new_session({.robot = "libero"});
  ASSERT_TRUE(session.ok());
  EXPECT_EQ(info->contract_json, session->contract_json());
  EXPECT_EQ(info->contract_hash, session->contract_hash());
  EXPECT_EQ(Policy::describe(kCheckpoint).status().code(), StatusCode::kInvalidInput);
  EXPECT_EQ(Policy::describe("no/such/folder").status().code(), StatusCode::kInvalidInput);
}

TEST_F(PolicyTest, ErrorsNameTheField) {
  Session s = session(1);
  const auto message = [&](const Observation& o, const InferOptions& options = {}) {
    return s.infer(o, options).status().message();
  };
  Observation o = frames.observation();
  o.state = std::span(frames.state).subspan(1);
  EXPECT_NE(message(o).find("state"), std::string::npos) << message(o);
  o = frames.observation();
  o.images.erase(o.images.begin());
  EXPECT_NE(message(o).find("observation/image"), std::string::npos) << message(o);
  o = frames.observation();
  o.images[0].height = 255;
  EXPECT_NE(message(o).find("observation/image"), std::string::npos) << message(o);
  EXPECT_NE(message(frames.observation(), {.steps = 51}).find("steps"), std::string::npos);
  EXPECT_NE(policy->new_session({.robot = "nobody"}).status().message().find("libero"), std::string::npos);
  EXPECT_EQ(Policy::open("no/such/folder").status().code(), StatusCode::kInvalidInput);
  EXPECT_EQ(Policy::open(kCheckpoint, {.device = "tpu"}).status().code(), StatusCode::kInvalidInput);
  EXPECT_EQ(Policy::open(kCheckpoint, {.precision = "fp64"}).status().code(), StatusCode::kInvalidInput);
  EXPECT_EQ(Policy::open(kCheckpoint, {.device = "cuda"}).status().code(), StatusCode::kRuntime);
}

// Backends of two kinds stand for two GPUs: what they are called tells where a session went.
TEST(PolicyDevices, SessionsGoWhereTheFewestAre) {
  auto policy =
      Policy::open_synthetic("tiny", {.device = "cpu,reference", .precision = "fp32", .threads = 1}, 0, 2);
  ASSERT_TRUE(policy.ok()) << policy.status().message();
  const PolicyInfo& info = policy->info();
  ASSERT_EQ(info.devices.size(), 2u);
  const std::string first = info.devices[0].backend, second = info.devices[1].backend;
  EXPECT_TRUE(first.starts_with("cpu/")) << first;
  EXPECT_EQ(second, "reference");
  EXPECT_EQ(info.backend, first);
  EXPECT_EQ(info.weight_bytes, info.devices[0].weight_bytes + info.devices[1].weight_bytes);
  const auto session = [&] { return *policy->new_session(); };
  std::vector<Session> alive = {session(), session(), session(), session()};
  std::vector<std::string> where;
  for (const Session& s : alive) where.push_back(s.device().backend);
  EXPECT_EQ(where, (std::vector<std::string>{first, second, first, second}));
  alive.erase(alive.begin() + 1);  // one of the second's
  EXPECT_EQ(session().device().backend, second);
  EXPECT_EQ(session().device().backend, second) << "the one before has left again";
  EXPECT_FALSE(policy->new_session({.robot = "libero"}).ok());
  EXPECT_EQ(session().device().backend, second) << "a session that failed holds no seat";
  alive.push_back(session());
  EXPECT_EQ(session().device().backend, first) << "two each: the first of equals";

  const std::vector<std::int32_t> tokens = {2, 5, 9, 7};
  const std::vector<std::uint8_t> frame(224 * 224 * 3, 99);
  Observation o;
  o.images = {{"base_0_rgb", ImageLayout::kHWC, 224, 224, frame}};
  o.tokens = tokens;
  for (const std::size_t i : {0u, 2u}) {
    const auto chunk = alive[i].infer(o, {.steps = 1});
    ASSERT_TRUE(chunk.ok()) << chunk.status().message();
    EXPECT_EQ(chunk->backend, i == 0 ? first : second);
  }
}

TEST(PolicyDevices, ABatchRunsOnAllOfThemAndKeepsItsBits) {
  const PolicyOptions one{.device = "cpu", .precision = "bf16", .threads = 1, .max_batch = 3};
  PolicyOptions two = one;
  two.device = "cpu,cpu";
  std::vector<std::uint64_t> progress;
  two.progress = [&](std::uint64_t done, std::uint64_t total) { progress.push_back(100 * done / total); };
  auto alone = Policy::open(kCheckpoint, one), both = Policy::open(kCheckpoint, two);
  ASSERT_TRUE(alone.ok() && both.ok()) << both.status().message();
  EXPECT_TRUE(std::is_sorted(progress.begin(), progress.end()));
  EXPECT_EQ(progress.back(), 100u);
  const Frames frames;
  const std::vector<std::string> prompts = {"open the drawer", "a", "put the red mug on the plate",
                                            "close it", "wipe the table"};
  std::vector<Session> sessions;
  std::vector<Session*> pointers;
  std::vector<Observation> observations;
  std::vector<const Observation*> seen;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    sessions.push_back(*both->new_session({.robot = "libero", .seed = i}));
    observations.push_back(frames.observation(prompts[i]));
  }
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    pointers.push_back(&sessions[i]);
    seen.push_back(&observations[i]);
  }
  std::vector<ActionChunk> chunks(prompts.size());
  for (int call = 0; call < 2; ++call) {
    const Status status =
        infer_batch(pointers, seen, {.steps = 2}, chunks);  // three on one, two on the other
    ASSERT_TRUE(status.ok()) << status.message();
  }
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    Session single = *alone->new_session({.robot = "libero", .seed = i});
    ASSERT_TRUE(single.infer(observations[i], {.steps = 2}).ok());
    EXPECT_EQ(chunks[i].actions, single.infer(observations[i], {.steps = 2})->actions) << i;
    EXPECT_GT(chunks[i].times.prefix, 0);
  }
  // Four on one device are one too many; the error is that device's.
  std::vector<Session> crowd;
  for (int i = 0; i < 8; ++i) crowd.push_back(*both->new_session({.robot = "libero"}));
  std::vector<Session*> many;
  for (Session& s : crowd) many.push_back(&s);
  const std::vector<const Observation*> same(many.size(), seen[0]);
  std::vector<ActionChunk> none(many.size());
  EXPECT_EQ(infer_batch(many, same, {}, none).code(), StatusCode::kInvalidInput);
  EXPECT_EQ(crowd[0].infer(observations[0])->request, 0u) << "nothing of a failed batch happened";
}

TEST(PolicyDevices, ListsAreChecked) {
  const auto message = [](const std::string& device) {
    return std::string(Policy::open_synthetic("tiny", {.device = device}).status().message());
  };
  EXPECT_NE(message("cpu,").find("entry is empty"), std::string::npos) << message("cpu,");
  EXPECT_NE(message("cuda:0,0").find("cuda:0 stands there twice"), std::string::npos) << message("cuda:0,0");
  EXPECT_NE(message("cuda,cuda:0").find("twice"), std::string::npos) << message("cuda,cuda:0");
  EXPECT_NE(message("cpu,tpu").find("tpu"), std::string::npos) << message("cpu,tpu");
  EXPECT_NE(message("cuda:all").find("--device cuda"), std::string::npos) << message("cuda:all");
}

TEST(PolicyDevices, TheBatchIsAsAskedForOrWhatPaysOff) {
  EXPECT_EQ(Policy::open(kCheckpoint, {.device = "cpu", .max_batch = 5})->info().max_batch, 5);
  EXPECT_EQ(Policy::open(kCheckpoint, {.device = "cpu", .max_batch = 0})->info().max_batch, 1);
}

TEST(PolicySynthetic, RunsOnTokenIds) {
  auto policy = Policy::open_synthetic("tiny", {.device = "cpu"}, 0, 12);
  ASSERT_TRUE(policy.ok()) << policy.status().message();
  auto session = policy->new_session();
  ASSERT_TRUE(session.ok()) << session.status().message();
  const std::vector<std::uint8_t> frame(224 * 224 * 3, 99);
  const std::vector<std::int32_t> tokens = {2, 5, 9, 7};
  Observation o;
  o.images = {{"base_0_rgb", ImageLayout::kHWC, 224, 224, frame}};
  o.tokens = tokens;
  const auto chunk = session->infer(o);
  ASSERT_TRUE(chunk.ok()) << chunk.status().message();
  EXPECT_EQ(chunk->horizon, 12);
  EXPECT_EQ(chunk->prefix_tokens, 260);
  EXPECT_EQ(Policy::open_synthetic("huge").status().code(), StatusCode::kInvalidInput);
}

}  // namespace
}  // namespace servoflow
