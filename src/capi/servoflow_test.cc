// The C interface from outside: the same bits as the C++ one, and an error for everything that is wrong.
#include "servoflow/servoflow.h"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstring>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "servoflow/policy.h"

namespace servoflow {
namespace {

constexpr const char* kCheckpoint = "tests/golden/openpi-tiny";

servoflow_policy_options cpu_options() {
  servoflow_policy_options options = SERVOFLOW_POLICY_OPTIONS_INIT;
  options.device = "cpu";
  options.precision = "fp32";
  options.robot = "libero";
  options.max_batch = 2;
  return options;
}

std::vector<std::uint8_t> frame(int height, int width, int start) {
  std::vector<std::uint8_t> out(std::size_t{3} * height * width);
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = static_cast<std::uint8_t>(start + 7 * i + i / 97);
  return out;
}

// One request and all it borrows.
struct Request {
  std::vector<std::uint8_t> base = frame(180, 240, 3), wrist = frame(224, 224, 40);
  std::vector<double> state{0.1, -0.2, 0.3, 0, 0.4, -0.5, 0.04, -0.04};
  servoflow_image images[2] = {SERVOFLOW_IMAGE_INIT, SERVOFLOW_IMAGE_INIT};
  servoflow_observation observation = SERVOFLOW_OBSERVATION_INIT;

  explicit Request(const char* prompt = "open the drawer") {
    set(images[0], "observation/image", base, 180, 240);
    set(images[1], "left_wrist_0_rgb", wrist, 224, 224);
    observation.images = images;
    observation.image_count = 2;
    observation.state = state.data();
    observation.state_count = state.size();
    observation.prompt = prompt;
  }
  Request(const Request&) = delete;
  Request& operator=(const Request&) = delete;

  static void set(servoflow_image& image, const char* name, const std::vector<std::uint8_t>& bytes,
                  int height, int width) {
    image.name = name;
    image.bytes = bytes.data();
    image.byte_count = bytes.size();
    image.height = height;
    image.width = width;
  }
};

class CApi : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    const servoflow_policy_options options = cpu_options();
    ASSERT_EQ(servoflow_policy_open(kCheckpoint, &options, &policy_), SERVOFLOW_OK) << servoflow_last_error();
  }
  static void TearDownTestSuite() { EXPECT_EQ(servoflow_policy_free(policy_), SERVOFLOW_OK); }
  void SetUp() override {
    session_ = new_session(7);
    ASSERT_EQ(servoflow_chunk_new(&chunk_), SERVOFLOW_OK);
  }
  void TearDown() override {
    EXPECT_EQ(servoflow_session_free(session_), SERVOFLOW_OK);
    EXPECT_EQ(servoflow_chunk_free(chunk_), SERVOFLOW_OK);
  }

  static servoflow_session* new_session(std::uint64_t seed) {
    servoflow_session_options options = SERVOFLOW_SESSION_OPTIONS_INIT;
    options.seed = seed;
    servoflow_session* session = nullptr;
    EXPECT_EQ(servoflow_session_new(policy_, &options, &session), SERVOFLOW_OK) << servoflow_last_error();
    return session;
  }
  static servoflow_chunk_view view(servoflow_chunk* chunk) {
    servoflow_chunk_view out = SERVOFLOW_CHUNK_VIEW_INIT;
    EXPECT_EQ(servoflow_chunk_get(chunk, &out), SERVOFLOW_OK) << servoflow_last_error();
    return out;
  }
  static std::vector<double> actions(servoflow_chunk* chunk) {
    const servoflow_chunk_view v = view(chunk);
    return {v.actions, v.actions + std::size_t{1} * v.horizon * v.action_dim};
  }
  // The call must fail as bad input, with a message that holds `words`.
  static void refused(servoflow_status status, const std::string& words) {
    EXPECT_EQ(status, SERVOFLOW_INVALID_INPUT) << words;
    EXPECT_NE(std::string(servoflow_last_error()).find(words), std::string::npos) << servoflow_last_error();
  }
  void infer_refused(const Request& request, const std::string& words,
                     const servoflow_infer_options* options = nullptr) {
    refused(servoflow_infer(session_, &request.observation, options, chunk_), words);
    servoflow_chunk_view v = SERVOFLOW_CHUNK_VIEW_INIT;
    refused(servoflow_chunk_get(chunk_, &v), "holds no answer");
  }

  static servoflow_policy* policy_;
  servoflow_session* session_ = nullptr;
  servoflow_chunk* chunk_ = nullptr;
};
servoflow_policy* CApi::policy_ = nullptr;

TEST_F(CApi, GivesTheBitsOfTheCppApi) {
  const Request request;
  const auto policy =
      Policy::open(kCheckpoint, {.device = "cpu", .precision = "fp32", .threads = 1, .robot = "libero"});
  ASSERT_TRUE(policy.ok()) << policy.status().message();
  auto session = policy->new_session({.seed = 7});
  ASSERT_TRUE(session.ok());
  Observation observation;
  observation.images = {{"observation/image", ImageLayout::kHWC, 180, 240, request.base},
                        {"observation/wrist_image", ImageLayout::kHWC, 224, 224, request.wrist}};
  observation.state = request.state;
  observation.prompt = "open the drawer";
  for (int i = 0; i < 3; ++i) {
    const auto expected = session->infer(observation);
    ASSERT_TRUE(expected.ok()) << expected.status().message();
    ASSERT_EQ(servoflow_infer(session_, &request.observation, nullptr, chunk_), SERVOFLOW_OK)
        << servoflow_last_error();
    EXPECT_STREQ(servoflow_last_error(), "");
    const servoflow_chunk_view v = view(chunk_);
    EXPECT_EQ(v.request, static_cast<std::uint64_t>(i));
    ASSERT_EQ(v.horizon, expected->horizon);
    ASSERT_EQ(v.action_dim, 7);
    ASSERT_EQ(v.model_dim, 32);
    EXPECT_EQ(std::memcmp(v.actions, expected->actions.data(), expected->actions.size() * sizeof(double)), 0);
    EXPECT_EQ(
        std::memcmp(v.normalized, expected->normalized.data(), expected->normalized.size() * sizeof(float)),
        0);
    EXPECT_EQ(v.contract_hash, expected->contract_hash);
    EXPECT_EQ(v.backend, expected->backend);
    EXPECT_GT(v.total_ms, 0);
    EXPECT_EQ(v.step_count, 10u);
  }
  EXPECT_EQ(servoflow_session_reset(session_), SERVOFLOW_OK);
  ASSERT_EQ(servoflow_infer(session_, &request.observation, nullptr, chunk_), SERVOFLOW_OK);
  EXPECT_EQ(view(chunk_).request, 0u);
}

TEST_F(CApi, GivenNoiseAndStepsCount) {
  const Request request;
  std::vector<float> noise(320, 0.5f);
  servoflow_infer_options options = SERVOFLOW_INFER_OPTIONS_INIT;
  options.noise = noise.data();
  options.noise_count = noise.size();
  options.steps = 2;
  ASSERT_EQ(servoflow_infer(session_, &request.observation, &options, chunk_), SERVOFLOW_OK);
  EXPECT_EQ(view(chunk_).step_count, 2u);
  const std::vector<double> first = actions(chunk_);
  ASSERT_EQ(servoflow_infer(session_, &request.observation, &options, chunk_), SERVOFLOW_OK);
  EXPECT_EQ(actions(chunk_), first);

  options.noise_count = 319;
  infer_refused(request, "noise: 319 values", &options);
  options.noise_count = 0;
  infer_refused(request, "options.noise", &options);
  options = SERVOFLOW_INFER_OPTIONS_INIT;
  options.steps = 51;
  infer_refused(request, "steps", &options);
  options.steps = -1;
  infer_refused(request, "steps", &options);
}

TEST_F(CApi, ABatchGivesTheBitsOfSingleCalls) {
  const Request first("open the drawer"), second("put the book away");
  servoflow_session* const other = new_session(8);
  servoflow_chunk* other_chunk = nullptr;
  ASSERT_EQ(servoflow_chunk_new(&other_chunk), SERVOFLOW_OK);
  ASSERT_EQ(servoflow_infer(session_, &first.observation, nullptr, chunk_), SERVOFLOW_OK);
  ASSERT_EQ(servoflow_infer(other, &second.observation, nullptr, other_chunk), SERVOFLOW_OK);
  const std::vector<double> alone[] = {actions(chunk_), actions(other_chunk)};
  servoflow_session* sessions[] = {session_, other};
  servoflow_chunk* chunks[] = {chunk_, other_chunk};
  const servoflow_observation* observations[] = {&first.observation, &second.observation};
  for (servoflow_session* s : sessions) ASSERT_EQ(servoflow_session_reset(s), SERVOFLOW_OK);
  ASSERT_EQ(servoflow_infer_batch(sessions, observations, chunks, 2, nullptr), SERVOFLOW_OK)
      << servoflow_last_error();
  EXPECT_EQ(actions(chunk_), alone[0]);
  EXPECT_EQ(actions(other_chunk), alone[1]);

  refused(servoflow_infer_batch(sessions, observations, chunks, 0, nullptr), "count: 0");
  refused(servoflow_infer_batch(sessions, nullptr, chunks, 2, nullptr), "observations or chunks is NULL");
  sessions[1] = session_;
  refused(servoflow_infer_batch(sessions, observations, chunks, 2, nullptr), "twice");
  sessions[1] = nullptr;
  refused(servoflow_infer_batch(sessions, observations, chunks, 2, nullptr), "request 1: session: is NULL");
  sessions[1] = other;
  observations[1] = nullptr;
  refused(servoflow_infer_batch(sessions, observations, chunks, 2, nullptr),
          "request 1: observation: is NULL");
  servoflow_chunk_view old = SERVOFLOW_CHUNK_VIEW_INIT;
  for (servoflow_chunk* chunk : chunks) refused(servoflow_chunk_get(chunk, &old), "holds no answer");
  EXPECT_EQ(servoflow_session_free(other), SERVOFLOW_OK);
  EXPECT_EQ(servoflow_chunk_free(other_chunk), SERVOFLOW_OK);
}

TEST_F(CApi, WrongFramesAreNamed) {
  Request request;
  const auto with = [&](auto change, const std::string& words) {
    const servoflow_image kept = request.images[0];
    change(request.images[0]);
    infer_refused(request, words);
    request.images[0] = kept;
  };
  with([](auto& i) { i.name = nullptr; }, "observation.images[0].name");
  with([](auto& i) { i.name = "observation/elbow"; }, "observation/elbow");
  with([](auto& i) { i.bytes = nullptr; }, "observation.images[0].bytes: is NULL (image observation/image)");
  with([](auto& i) { i.byte_count -= 1; }, "observation/image");
  with([](auto& i) { i.byte_count = 0; }, "observation/image");
  with([](auto& i) { i.height = -180; }, "observation/image");
  with([](auto& i) { i.width = 0; }, "observation/image");
  with([](auto& i) { i.width = std::numeric_limits<std::int32_t>::max(); }, "observation/image");
  with([](auto& i) { i.layout = 3; }, "observation.images[0].layout: 3");
  with([](auto& i) { i.layout = SERVOFLOW_ENCODED; }, "observation/image");
  with([](auto& i) { i.reserved = 1; }, "observation.images[0].reserved");
  with([](auto& i) { i.struct_size = 0; }, "observation.images[0].struct_size");
  request.images[1].struct_size = ~std::size_t{0};
  infer_refused(request, "observation.images[1].struct_size");
}

TEST_F(CApi, WrongObservationsAreNamed) {
  const auto with = [&](auto change, const std::string& words) {
    Request request;
    change(request.observation);
    infer_refused(request, words);
  };
  with([](auto& o) { o.state_count = 7; }, "observation/state");
  with([](auto& o) { o.state = nullptr; }, "observation.state: is NULL");
  with([](auto& o) { o.state_count = ~std::size_t{0}; }, "observation.state_count");
  with([](auto& o) { o.prompt = nullptr; }, "prompt: missing");
  with([](auto& o) { o.prompt = "\xff\xfe"; }, "prompt: not valid UTF-8");
  with([](auto& o) { o.token_count = 3; }, "observation.tokens: is NULL");
  with([](auto& o) { o.image_count = 1; }, "observation/wrist_image");
  with([](auto& o) { o.image_count = 0; }, "observation/image");
  with([](auto& o) { o.image_count = 1u << 30; }, "observation.image_count");
  with([](auto& o) { o.images = nullptr; }, "observation.images: is NULL");
  with([](auto& o) { o.struct_size = 8; }, "observation.struct_size");
  Request nan;
  nan.state[3] = std::numeric_limits<double>::quiet_NaN();
  infer_refused(nan, "observation/state[3]: not a finite number");
  refused(servoflow_infer(session_, nullptr, nullptr, chunk_), "observation: is NULL");
}

TEST_F(CApi, DeadAndForeignHandlesAreErrors) {
  const Request request;
  servoflow_session* const freed = new_session(1);
  ASSERT_EQ(servoflow_session_free(freed), SERVOFLOW_OK);
  refused(servoflow_session_free(freed), "session: not a live handle");
  refused(servoflow_infer(freed, &request.observation, nullptr, chunk_), "session: not a live handle");
  refused(servoflow_session_reset(freed), "session: not a live handle");
  refused(servoflow_session_contract(freed, nullptr, nullptr), "session: not a live handle");
  ASSERT_EQ(servoflow_infer(session_, &request.observation, nullptr, chunk_), SERVOFLOW_OK);
  refused(servoflow_infer(nullptr, &request.observation, nullptr, chunk_), "session: is NULL");
  servoflow_chunk_view old = SERVOFLOW_CHUNK_VIEW_INIT;
  refused(servoflow_chunk_get(chunk_, &old), "holds no answer");
  refused(servoflow_infer(session_, &request.observation, nullptr, nullptr), "chunk: is NULL");
  refused(
      servoflow_infer(reinterpret_cast<servoflow_session*>(policy_), &request.observation, nullptr, chunk_),
      "session: not a live handle");
  int invented = 0;
  refused(servoflow_policy_free(reinterpret_cast<servoflow_policy*>(&invented)), "policy: not a live handle");
  refused(servoflow_session_new(nullptr, nullptr, &session_), "policy: is NULL");
  refused(servoflow_session_new(policy_, nullptr, nullptr), "session: is NULL");
  refused(servoflow_chunk_new(nullptr), "chunk: is NULL");
  refused(servoflow_policy_get_info(policy_, nullptr), "info: is NULL");
  EXPECT_EQ(servoflow_policy_free(nullptr), SERVOFLOW_OK);
  EXPECT_EQ(servoflow_session_free(nullptr), SERVOFLOW_OK);
  EXPECT_EQ(servoflow_chunk_free(nullptr), SERVOFLOW_OK);
}

TEST_F(CApi, OpeningTellsWhatIsWrong) {
  servoflow_policy* policy = nullptr;
  servoflow_policy_options options = cpu_options();
  refused(servoflow_policy_open("nowhere/at/all", &options, &policy), "nowhere/at/all");
  refused(servoflow_policy_open(nullptr, &options, &policy), "checkpoint: is NULL");
  refused(servoflow_policy_open(kCheckpoint, &options, nullptr), "policy: is NULL");
  options.robot = "dishwasher";
  refused(servoflow_policy_open(kCheckpoint, &options, &policy), "dishwasher");
  options = cpu_options();
  options.precision = "fp7";
  refused(servoflow_policy_open(kCheckpoint, &options, &policy), "fp7");
  options = cpu_options();
  options.threads = -1;
  refused(servoflow_policy_open(kCheckpoint, &options, &policy), "options.threads");
  options = cpu_options();
  options.struct_size = 3;
  refused(servoflow_policy_open(kCheckpoint, &options, &policy), "options.struct_size");
  EXPECT_EQ(policy, nullptr);
}

TEST_F(CApi, APolicyTellsAboutItselfAndItsProgress) {
  servoflow_policy_options options = cpu_options();
  struct Seen {
    int calls = 0;
    std::uint64_t done = 0, total = 0;
  } seen;
  options.progress = [](std::uint64_t done, std::uint64_t total, void* user) {
    auto& s = *static_cast<Seen*>(user);
    ++s.calls;
    s.done = done;
    s.total = total;
  };
  options.progress_user = &seen;
  servoflow_policy* policy = nullptr;
  ASSERT_EQ(servoflow_policy_open(kCheckpoint, &options, &policy), SERVOFLOW_OK) << servoflow_last_error();
  EXPECT_GT(seen.calls, 0);
  EXPECT_EQ(seen.done, seen.total);
  servoflow_policy_info info = SERVOFLOW_POLICY_INFO_INIT;
  ASSERT_EQ(servoflow_policy_get_info(policy, &info), SERVOFLOW_OK);
  EXPECT_STREQ(info.checkpoint, kCheckpoint);
  EXPECT_STREQ(info.layout, "openpi");
  EXPECT_STREQ(info.precision, "fp32");
  EXPECT_EQ(info.horizon, 10);
  EXPECT_EQ(info.model_action_dim, 32);
  EXPECT_EQ(info.device_count, 1);
  EXPECT_GT(info.parameters, 0u);

  // Part by part, as the C++ API has it.
  const auto same = Policy::open(kCheckpoint, {.device = "cpu", .precision = "fp32"});
  ASSERT_TRUE(same.ok());
  const std::vector<ComponentPrecision>& parts = same->info().components;
  ASSERT_EQ(info.component_count, parts.size());
  ASSERT_GT(parts.size(), 3u);
  const auto* next = reinterpret_cast<const unsigned char*>(info.components);
  for (const ComponentPrecision& part : parts) {
    const auto& c = *reinterpret_cast<const servoflow_component_precision*>(next);
    EXPECT_EQ(c.struct_size, sizeof(c));
    EXPECT_EQ(c.component, part.component);
    EXPECT_STREQ(c.precision, "fp32");
    EXPECT_STREQ(c.kernel, "");
    EXPECT_EQ(c.layers, part.layers);
    EXPECT_EQ(c.reserved, 0);
    EXPECT_EQ(c.parameters, part.parameters);
    EXPECT_EQ(c.weight_bytes, part.weight_bytes);
    next += info.components->struct_size;
  }

  // A session keeps what it needs: its policy's handle may go first.
  servoflow_session* session = nullptr;
  ASSERT_EQ(servoflow_session_new(policy, nullptr, &session), SERVOFLOW_OK);
  ASSERT_EQ(servoflow_policy_free(policy), SERVOFLOW_OK);
  const Request request;
  EXPECT_EQ(servoflow_infer(session, &request.observation, nullptr, chunk_), SERVOFLOW_OK);
  const char *json = nullptr, *hash = nullptr;
  ASSERT_EQ(servoflow_session_contract(session, &json, &hash), SERVOFLOW_OK);
  EXPECT_EQ(json[0], '{');
  EXPECT_EQ(std::strlen(hash), 64u);
  EXPECT_EQ(servoflow_session_free(session), SERVOFLOW_OK);
  EXPECT_EQ(servoflow_abi_version(), SERVOFLOW_ABI_VERSION);
  EXPECT_STREQ(servoflow_version(), SF_TEST_VERSION);
}

// Programs that were compiled before `components` was appended hand over the struct they know.
TEST_F(CApi, TheFirstVersionsPolicyInfoIsStillFilled) {
  constexpr std::size_t kFirst = offsetof(servoflow_policy_info, components);
  servoflow_policy_info info = SERVOFLOW_POLICY_INFO_INIT;
  info.struct_size = kFirst;
  info.component_count = 77;
  info.components = reinterpret_cast<const servoflow_component_precision*>(&info);
  ASSERT_EQ(servoflow_policy_get_info(policy_, &info), SERVOFLOW_OK) << servoflow_last_error();
  EXPECT_EQ(info.struct_size, kFirst);
  EXPECT_STREQ(info.precision, "fp32");
  EXPECT_GT(info.ready_seconds, 0);
  EXPECT_EQ(info.component_count, 77u) << "beyond the caller's struct";
  EXPECT_EQ(static_cast<const void*>(info.components), static_cast<const void*>(&info));
  info.struct_size = kFirst - 1;
  refused(servoflow_policy_get_info(policy_, &info), "info.struct_size");
}

TEST_F(CApi, ThreadsMayShareEverything) {
  const Request request;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&] {
      servoflow_infer_options options = SERVOFLOW_INFER_OPTIONS_INIT;
      options.steps = 1;
      for (int i = 0; i < 3; ++i) {
        EXPECT_EQ(servoflow_infer(session_, &request.observation, &options, chunk_), SERVOFLOW_OK);
        servoflow_session* const own = new_session(3);
        EXPECT_EQ(servoflow_infer(own, &request.observation, &options, chunk_), SERVOFLOW_OK);
        EXPECT_EQ(servoflow_session_free(own), SERVOFLOW_OK);
        EXPECT_EQ(servoflow_session_free(own),
                  SERVOFLOW_INVALID_INPUT);  // each thread has its own last error
        EXPECT_STRNE(servoflow_last_error(), "");
      }
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_STREQ(servoflow_last_error(), "");
}

}  // namespace
}  // namespace servoflow
