// The C++ client against the real server: $SERVOFLOW is the binary, the working directory the repository's
// root.
#include "examples/client/robot_client.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <thread>

extern char** environ;

namespace robot {
namespace {

using namespace std::chrono_literals;

// `servoflow serve` with the tiny checkpoint, ended with SIGTERM or by kill().
class Server {
 public:
  explicit Server(std::vector<std::string> more = {}, std::uint16_t port = 0) {
    const char* binary = std::getenv("SERVOFLOW");
    if (binary == nullptr) throw std::runtime_error("$SERVOFLOW is not set");
    std::vector<std::string> words = {binary,   "serve",  "tests/golden/openpi-tiny", "--robot",
                                      "libero", "--port", std::to_string(port),       "--precision",
                                      "fp32"};
    words.insert(words.end(), more.begin(), more.end());
    std::vector<char*> arguments;
    for (std::string& word : words) arguments.push_back(word.data());
    arguments.push_back(nullptr);
    int ends[2];
    if (pipe(ends) != 0) throw std::runtime_error("pipe");
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, ends[1], 1);
    posix_spawn_file_actions_addopen(&actions, 2, "/dev/null", 1, 0);
    posix_spawn_file_actions_addclose(&actions, ends[0]);
    posix_spawn_file_actions_addclose(&actions, ends[1]);
    const int failed = posix_spawn(&pid_, binary, &actions, nullptr, arguments.data(), environ);
    posix_spawn_file_actions_destroy(&actions);
    close(ends[1]);
    std::FILE* out = fdopen(ends[0], "r");
    char line[200] = "";
    const bool told =
        failed == 0 && std::fgets(line, sizeof(line), out) != nullptr;  // the address, once it serves
    std::fclose(out);
    const std::string text(line);
    if (!told || text.rfind(':') == std::string::npos) throw std::runtime_error("the server did not start");
    port_ = static_cast<std::uint16_t>(std::stoi(text.substr(text.rfind(':') + 1)));
  }
  ~Server() { end(SIGTERM); }
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  std::uint16_t port() const { return port_; }
  void end(int signal) {
    if (pid_ <= 0) return;
    ::kill(pid_, signal);
    int status = 0;
    waitpid(pid_, &status, 0);
    pid_ = 0;
    if (signal == SIGTERM) {
      EXPECT_EQ(status, 0);
    }
  }

 private:
  pid_t pid_ = 0;
  std::uint16_t port_ = 0;
};

Observation libero(std::size_t state = 8) {
  const Array<std::uint8_t> frame{{224, 224, 3}, std::vector<std::uint8_t>(std::size_t{224} * 224 * 3, 90)};
  Observation out;
  out.fields["observation/image"] = frame;
  out.fields["observation/wrist_image"] = frame;
  out.fields["observation/state"] = Array<double>{{state}, std::vector<double>(state, 0.1)};
  out.fields["prompt"] = "open the drawer";
  return out;
}

ClientOptions options(std::uint16_t port, Stale stale = Stale::kHold) {
  ClientOptions out;
  out.address.port = port;
  out.timeline = {.period_s = 0.02, .replan_every = 5, .stale = stale};
  out.observe = [] { return libero(); };
  out.first_pause_s = 0.05;
  out.longest_pause_s = 0.2;
  return out;
}

Clock::time_point at(const Chunk& chunk, double periods) {
  return chunk.begin +
         std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(periods * 0.02));
}

std::vector<double> row(const Chunk& chunk, std::size_t i) {
  const auto first = chunk.actions.values.begin() + static_cast<std::ptrdiff_t>(i * chunk.actions.dim);
  return {first, first + static_cast<std::ptrdiff_t>(chunk.actions.dim)};
}

// What ends the client, as action() throws it.
template <class Error>
std::string end_of(const RobotClient& client) {
  try {
    client.wait_for_chunk(20);
  } catch (const Error& error) {
    EXPECT_THROW(client.action(), Error);
    return error.what();
  }
  return "nothing was thrown";
}

template <class Condition>
bool within(std::chrono::seconds time, Condition condition) {
  for (const auto until = Clock::now() + time; Clock::now() < until; std::this_thread::sleep_for(10ms))
    if (condition()) return true;
  return false;
}

TEST(RobotClient, ChunksLieOnATimeline) {
  const Server server;
  RobotClient client(options(server.port()));
  EXPECT_EQ(client.action().state, State::kWaiting);
  client.start();
  client.wait_for_chunk();
  EXPECT_EQ(client.metadata().at("robot"), "libero");
  EXPECT_EQ(client.metadata().at("action_horizon"), "10");
  bool fresh = false;
  Clock::duration slowest{};
  for (int i = 0; i < 50; ++i) {
    const Clock::time_point before = Clock::now();
    const Step step = client.action();
    slowest = std::max(slowest, Clock::now() - before);
    EXPECT_EQ(step.action.size(), 7u);
    fresh = fresh || step.state == State::kFresh;
    std::this_thread::sleep_for(10ms);
  }
  EXPECT_TRUE(fresh);
  EXPECT_TRUE(within(20s, [&] { return client.chunks() >= 3; }));
  std::printf("action() took at most %.3f ms\n", std::chrono::duration<double, std::milli>(slowest).count());
  client.stop();
  const Chunk chunk = client.chunk();
  for (std::size_t i : {0, 3, 9}) {
    const Step step = client.action(at(chunk, static_cast<double>(i) + 0.5));
    EXPECT_EQ(step.action, row(chunk, i));
    EXPECT_EQ(step.state, State::kFresh);
  }
  EXPECT_EQ(client.connects(), 1u);
}

TEST(RobotClient, WhatHappensBehindTheLastChunkIsChosen) {
  const Server server;
  for (Stale stale : {Stale::kHold, Stale::kStop, Stale::kExtrapolate}) {
    RobotClient client(options(server.port(), stale));
    client.start();
    client.wait_for_chunk();
    client.stop();
    const Chunk chunk = client.chunk();
    const Step soon = client.action(at(chunk, 11.5)), late = client.action(at(chunk, 5000));
    if (stale == Stale::kHold) {
      EXPECT_EQ(late.state, State::kHold);
      EXPECT_EQ(late.action, row(chunk, 9));
      continue;
    }
    EXPECT_EQ(late.state, State::kStop);
    EXPECT_TRUE(late.action.empty());
    if (stale == Stale::kStop) continue;
    EXPECT_EQ(soon.state, State::kExtrapolate);
    for (std::size_t i = 0; i < 7; ++i)
      EXPECT_EQ(soon.action[i], row(chunk, 9)[i] + 2 * (row(chunk, 9)[i] - row(chunk, 8)[i]));
  }
}

TEST(RobotClient, ComesBackAfterARestart) {
  for (int signal : {SIGTERM, SIGKILL}) {
    auto server = std::make_unique<Server>();
    const std::uint16_t port = server->port();
    RobotClient client(options(port));
    client.start();
    client.wait_for_chunk();
    server->end(signal);
    EXPECT_TRUE(
        within(20s, [&] { return client.action().state == State::kHold && !client.trouble().empty(); }));
    const std::uint64_t before = client.chunks();
    std::this_thread::sleep_for(300ms);  // some attempts that meet nobody
    EXPECT_EQ(client.chunks(), before);
    EXPECT_NE(client.trouble().find("127.0.0.1:" + std::to_string(port)), std::string::npos)
        << client.trouble();
    server = std::make_unique<Server>(std::vector<std::string>{}, port);
    EXPECT_TRUE(within(30s, [&] { return client.chunks() > before; })) << client.trouble();
    EXPECT_EQ(client.connects(), 2u);
  }
}

TEST(RobotClient, ARefusalReachesTheRobot) {
  const Server server;
  ClientOptions wrong = options(server.port());
  wrong.observe = [] { return libero(5); };
  RobotClient client(wrong);
  client.start();
  EXPECT_NE(end_of<Refused>(client).find("observation/state: shape"), std::string::npos);
}

TEST(RobotClient, AnUnknownKeyIsRefusedAndAKnownOneServed) {
  const std::string keys =
      std::filesystem::temp_directory_path() / ("robot-client-keys-" + std::to_string(getpid()));
  std::ofstream(keys) << "a-secret-key\n";
  {
    const Server server({"--api-keys", keys});
    RobotClient without(options(server.port()));
    without.start();
    EXPECT_NE(end_of<Refused>(without).find("HTTP 401"), std::string::npos);
    ClientOptions known = options(server.port());
    known.address.api_key = "a-secret-key";
    RobotClient with(known);
    with.start();
    with.wait_for_chunk();
  }
  std::filesystem::remove(keys);
}

TEST(RobotClient, AFullServerIsTriedUntilThereIsAPlace) {
  const Server server({"--max-connections", "1"});
  RobotClient first(options(server.port())), second(options(server.port()));
  first.start();
  first.wait_for_chunk();
  second.start();
  EXPECT_TRUE(within(20s, [&] { return second.trouble().find("HTTP 503") != std::string::npos; }))
      << second.trouble();
  EXPECT_EQ(second.action().state, State::kWaiting);
  first.stop();
  second.wait_for_chunk();
  EXPECT_EQ(second.connects(), 1u);
}

TEST(RobotClient, ARefusalThatPassesIsNoEnd) {
  const Server server({"--max-rate", "2"});  // a second; this robot asks ten times
  RobotClient client(options(server.port()));
  client.start();
  EXPECT_TRUE(within(20s, [&] { return client.connects() >= 3; })) << client.trouble();
  EXPECT_NE(client.trouble().find("a second"), std::string::npos) << client.trouble();
  EXPECT_NO_THROW(client.action());
}

TEST(RobotClient, PingsAreAnsweredBetweenTwoRequests) {
  const Server server({"--idle-s", "1"});  // a silent client is let go after a second
  ClientOptions seldom = options(server.port());
  seldom.timeline.period_s = 0.3;
  seldom.timeline.replan_every = 10;
  RobotClient client(seldom);
  client.start();
  EXPECT_TRUE(within(20s, [&] { return client.chunks() >= 2; }));
  EXPECT_EQ(client.connects(), 1u) << client.trouble();
}

TEST(RobotClient, ACameraThatFailsStopsTheRobot) {
  const Server server;
  ClientOptions failing = options(server.port());
  failing.observe = []() -> Observation { throw std::runtime_error("no frame from the wrist camera"); };
  RobotClient client(failing);
  client.start();
  EXPECT_EQ(end_of<std::runtime_error>(client), "no frame from the wrist camera");
}

TEST(RobotClient, WithoutAServerItWaitsAndEndsAtOnce) {
  RobotClient client(options(1));
  client.start();
  EXPECT_THROW(client.wait_for_chunk(0.5), std::runtime_error);
  EXPECT_EQ(client.action().state, State::kWaiting);
  EXPECT_NE(client.trouble().find("refused"), std::string::npos) << client.trouble();
  const Clock::time_point before = Clock::now();
  client.stop();
  EXPECT_LT(Clock::now() - before, 5s);
  EXPECT_THROW(client.start(), std::logic_error);
}

TEST(RobotClient, StopDoesNotWaitForTheServer) {
  auto server = std::make_unique<Server>();
  ClientOptions slow = options(server->port());
  Observation observation = libero();
  observation.fields["num_steps"] = std::int64_t{50};
  slow.observe = [&] { return observation; };
  for (int i = 0; i < 10; ++i) {  // at whatever it is doing
    RobotClient client(slow);
    client.start();
    std::this_thread::sleep_for(std::chrono::milliseconds(7 * i));
    const Clock::time_point before = Clock::now();
    client.stop();
    EXPECT_LT(Clock::now() - before, 5s);
  }
}

TEST(RobotClient, OptionsAreChecked) {
  const auto with = [](auto change) {
    ClientOptions wrong = options(8000);
    change(wrong);
    try {
      RobotClient client(wrong);
    } catch (const std::invalid_argument& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  EXPECT_EQ(with([](ClientOptions&) {}), "accepted");
  EXPECT_EQ(with([](ClientOptions& o) { o.timeline.stale = {}; }),
            "stale: choose hold, stop or extrapolate; there is no default");
  EXPECT_EQ(with([](ClientOptions& o) { o.observe = nullptr; }), "observe: is not set");
  EXPECT_EQ(with([](ClientOptions& o) { o.address.api_key = "a\r\nHost: x"; }),
            "api_key: holds spaces or line ends");
  EXPECT_EQ(with([](ClientOptions& o) { o.longest_pause_s = 0.01; }),
            "longest_pause_s: is shorter than first_pause_s");
  EXPECT_NE(with([](ClientOptions& o) { o.address.host = "wss://robot"; }).find("host:"), std::string::npos);
  EXPECT_NE(with([](ClientOptions& o) { o.address.timeout_s = 0; }).find("timeout_s"), std::string::npos);
}

}  // namespace
}  // namespace robot
