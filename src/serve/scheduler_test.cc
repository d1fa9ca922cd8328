// Scheduling on a real tiny policy: what is computed together, in which order, and that it changes no bit.
#include "serve/scheduler.h"

#include <gtest/gtest.h>

#include <condition_variable>
#include <map>

#include "serve/messages_for_tests.h"

namespace servoflow::serve {
namespace {

using namespace testing;  // NOLINT: map, with, array_of, …

class SchedulerTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto opened = PolicyHost::open(
        {.checkpoint = "tests/golden/openpi-tiny",
         .policy = {.device = "cpu", .precision = "bf16", .threads = 2, .robot = "libero", .max_batch = 4},
         .seed = 3,
         .sessions = 6},
        1);
    ASSERT_TRUE(opened.ok()) << opened.status().message();
    host = *opened;
  }

  std::shared_ptr<const Request> request(const Entries& extra = {}) const {
    Entries entries = libero();
    for (const auto& [key, value] : extra) entries = with(entries, key, value);
    auto decoded = Request::decode(message(map(entries)), host->schema(), {});
    EXPECT_TRUE(decoded.ok()) << decoded.status().message();
    return std::make_shared<const Request>(*std::move(decoded));
  }

  std::shared_ptr<SessionLease> lease(std::uint64_t client) {
    if (leases[client] == nullptr) leases[client] = host->lease();
    return leases[client];
  }

  bool submit(Scheduler& scheduler, std::uint64_t client, const Entries& extra = {},
              double deadline_ms = 1000) {
    Job job{.client = client, .lease = lease(client), .request = request(extra), .received = Clock::now()};
    job.deadline = job.received + std::chrono::microseconds(static_cast<int>(deadline_ms * 1000));
    job.done = [this, client](Answer answer) {
      const std::lock_guard guard(mutex);
      answers.emplace_back(client, std::move(answer));
      changed.notify_all();
    };
    return scheduler.submit(job);
  }
  void wait_for(std::size_t count) {
    std::unique_lock lock(mutex);
    ASSERT_TRUE(changed.wait_for(lock, std::chrono::seconds(60), [&] { return answers.size() >= count; }));
  }
  std::vector<double> alone(const Entries& extra) {
    auto session = host->lease();
    const auto r = request(extra);
    InferOptions options{.steps = r->options().steps, .noise = r->options().noise};
    auto chunk = session->session().infer(r->observation(), options);
    EXPECT_TRUE(chunk.ok());
    return chunk->actions;
  }
  std::vector<std::uint64_t> order() const {
    std::vector<std::uint64_t> out;
    for (const auto& [client, answer] : answers) out.push_back(client);
    return out;
  }

  // Waits for others longer than a test takes to submit them.
  SchedulerOptions patient{.max_batch = 4, .max_wait = std::chrono::milliseconds(400), .capacity = 16};
  Metrics metrics;
  std::shared_ptr<PolicyHost> host;
  std::map<std::uint64_t, std::shared_ptr<SessionLease>> leases;
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<std::pair<std::uint64_t, Answer>> answers;
};

TEST_F(SchedulerTest, ABatchHasTheBitsOfEachAlone) {
  Scheduler scheduler(patient, metrics);
  scheduler.set_clients(4);
  const Entries extras[] = {
      {{"prompt", text("a")}}, {{"prompt", text("open the red drawer")}}, {}, {{"prompt", text("close it")}}};
  for (std::uint64_t client = 0; client < 4; ++client) ASSERT_TRUE(submit(scheduler, client, extras[client]));
  wait_for(4);
  for (const auto& [client, answer] : answers) {
    ASSERT_TRUE(answer.status.ok()) << answer.status.message();
    EXPECT_EQ(answer.batch, 4);
    EXPECT_EQ(answer.chunk.actions, alone(extras[client]));
  }
  EXPECT_EQ(metrics.batch_size.count(), 1u);
}

TEST_F(SchedulerTest, ARobotAloneNeverWaits) {
  patient.max_wait = std::chrono::seconds(100);
  Scheduler scheduler(patient, metrics);
  scheduler.set_clients(1);
  ASSERT_TRUE(submit(scheduler, 1));
  wait_for(1);
  EXPECT_LT(answers[0].second.queue_ms, 1000);
}

TEST_F(SchedulerTest, EarliestDeadlineFirstAndEachConnectionInItsOrder) {
  patient.max_batch = 1;
  patient.max_wait = std::chrono::milliseconds(0);
  Scheduler scheduler(patient, metrics);
  scheduler.set_clients(4);
  // While the first one is computed (50 steps), the others come; of connection 3 the second is more urgent.
  ASSERT_TRUE(submit(scheduler, 0, {{"num_steps", whole(50)}}));
  while (scheduler.pending() == 1 && metrics.queue_length > 0) std::this_thread::yield();
  ASSERT_TRUE(submit(scheduler, 1, {}, 900));
  ASSERT_TRUE(submit(scheduler, 2, {}, 300));
  ASSERT_TRUE(submit(scheduler, 3, {{"prompt", text("first")}}, 600));
  ASSERT_TRUE(submit(scheduler, 3, {{"prompt", text("second")}}, 10));
  wait_for(5);
  EXPECT_EQ(order(), (std::vector<std::uint64_t>{0, 2, 3, 3, 1}));
  EXPECT_EQ(answers[2].second.chunk.request, 0u);
  EXPECT_EQ(answers[3].second.chunk.request, 1u);
}

TEST_F(SchedulerTest, OnlyWhatFitsGoesTogether) {
  Scheduler scheduler(patient, metrics);
  scheduler.set_clients(6);
  std::vector<float> noise(320, 0.5f), other(320, -0.25f);
  const Part first = array_of<float>("<f4", {10, 32}, noise),
             second = array_of<float>("<f4", {10, 32}, other);
  const Entries extras[] = {{}, {{"num_steps", whole(3)}}, {{"noise", first}},
                            {}, {{"noise", second}},       {{"num_steps", whole(3)}}};
  for (std::uint64_t client = 0; client < 6; ++client) ASSERT_TRUE(submit(scheduler, client, extras[client]));
  wait_for(6);
  leases.clear();
  for (const auto& [client, answer] : answers) {
    ASSERT_TRUE(answer.status.ok());
    EXPECT_EQ(answer.batch, 2) << client;
    EXPECT_EQ(answer.chunk.actions, alone(extras[client])) << client;
  }
}

TEST_F(SchedulerTest, OneBadRequestSpoilsNoOther) {
  Scheduler scheduler(patient, metrics);
  scheduler.set_clients(3);
  const Entries bad = {{"observation/image", bytes("\xff\xd8\xff not a picture")}};
  ASSERT_TRUE(submit(scheduler, 0));
  ASSERT_TRUE(submit(scheduler, 1, bad));
  ASSERT_TRUE(submit(scheduler, 2));
  wait_for(3);
  for (const auto& [client, answer] : answers) {
    EXPECT_EQ(answer.status.ok(), client != 1) << answer.status.message();
    if (client == 1) {
      EXPECT_SAYS(answer.status.message(), "observation/image");
    } else {
      EXPECT_EQ(answer.chunk.actions, alone({}));
      EXPECT_EQ(answer.chunk.request, 0u);
    }
  }
}

TEST_F(SchedulerTest, TheQueueIsBoundedAndForgetsTheGone) {
  patient.capacity = 3;
  patient.max_wait = std::chrono::seconds(2);
  Scheduler scheduler(patient, metrics);
  scheduler.set_clients(5);
  for (std::uint64_t client = 0; client < 3; ++client) ASSERT_TRUE(submit(scheduler, client));
  EXPECT_FALSE(submit(scheduler, 3));
  scheduler.forget(1);
  EXPECT_EQ(metrics.queue_length, 2);
  EXPECT_EQ(scheduler.pending(), 2u);
  scheduler.set_clients(2);
  wait_for(2);
  EXPECT_EQ(order(), (std::vector<std::uint64_t>{0, 2}));
}

TEST_F(SchedulerTest, StoppingFailsWhatWaits) {
  patient.max_wait = std::chrono::seconds(100);
  Scheduler scheduler(patient, metrics);
  scheduler.set_clients(5);
  ASSERT_TRUE(submit(scheduler, 0));
  scheduler.stop();
  ASSERT_EQ(answers.size(), 1u);
  EXPECT_SAYS(answers[0].second.status.message(), "shutting down");
  EXPECT_FALSE(submit(scheduler, 1));
}

TEST_F(SchedulerTest, EpisodesResetAndSeedsReseed) {
  Scheduler scheduler({.max_wait = std::chrono::milliseconds(0)}, metrics);
  scheduler.set_clients(1);
  const Entries script[] = {{},
                            {},
                            {{"reset", boolean(true)}},
                            {},
                            {{"episode_id", text("a")}},
                            {{"episode_id", whole(2)}},
                            {{"episode_id", whole(2)}},
                            {{"seed", whole(9)}},
                            {{"seed", whole(3)}},
                            {}};
  for (std::size_t i = 0; i < std::size(script); ++i) ASSERT_TRUE(submit(scheduler, 0, script[i]));
  wait_for(std::size(script));
  std::vector<std::uint64_t> counts;
  for (const auto& [client, answer] : answers) counts.push_back(answer.chunk.request);
  EXPECT_EQ(counts, (std::vector<std::uint64_t>{0, 1, 0, 1, 2, 0, 1, 0, 0, 1}));
  EXPECT_NE(answers[7].second.chunk.actions, answers[0].second.chunk.actions);
  EXPECT_EQ(answers[8].second.chunk.actions, answers[0].second.chunk.actions);
  EXPECT_EQ(answers[9].second.chunk.actions, answers[1].second.chunk.actions);
}

TEST_F(SchedulerTest, SessionsComeBackAnew) {
  std::vector<std::shared_ptr<SessionLease>> out;
  for (int i = 0; i < 6; ++i) {
    out.push_back(host->lease());
    ASSERT_NE(out.back(), nullptr);
  }
  EXPECT_EQ(host->lease(), nullptr);
  const auto r = request();
  const auto first = out[2]->session().infer(r->observation());
  ASSERT_TRUE(out[2]->session().infer(r->observation()).ok());
  out[2].reset();
  out[2] = host->lease();
  EXPECT_EQ(out[2]->session().infer(r->observation())->actions, first->actions);
}

}  // namespace
}  // namespace servoflow::serve
