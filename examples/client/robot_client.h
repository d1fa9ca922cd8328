// A client for real robots: it asks for the next chunk while the last one is executed, and says what happens
// when none comes.
//
//   robot::RobotClient client({.address = {.host = "127.0.0.1", .port = 8000},
//                              .timeline = {.period_s = 1.0 / 50, .replan_every = 25, .stale =
//                              robot::Stale::kHold}, .observe = [&] { return my_robot.observation(); }});
//   client.start();
//   while (running) {
//     const robot::Step step = client.action();  // at the control rate; never waits for the network
//     if (!step.action.empty()) my_robot.command(step.action);
//     else if (step.state == robot::State::kStop) my_robot.stop();
//   }
//
// Needs Boost 1.74 or newer (headers), msgpack-cxx and, for recorded requests, nlohmann-json; nothing of the
// engine:
//   g++ -std=c++20 my_robot.cc robot_client.cc client_wire.cc action_timeline.cc -DMSGPACK_USE_BOOST -pthread
// Connections are plain ws://; where the network is not trusted, go through a tunnel.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>

#include "action_timeline.h"
#include "client_wire.h"

namespace robot {

// The server refused for a reason that repeating the request will not mend: what() is its reason.
class Refused : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Address {
  std::string host = "127.0.0.1";  // a name or a numeric address
  std::uint16_t port = 8000;
  std::string api_key;    // sent as "Authorization: Api-Key K" when not empty
  double timeout_s = 10;  // seconds for each of: to connect, to send a request and get its reply
};

struct ClientOptions {
  Address address;
  TimelineOptions timeline;
  // Called in the client's thread. What it throws ends the client and is raised by action(): a camera that
  // fails must stop the robot.
  std::function<Observation()> observe;
  // Seconds: the first and longest pause between attempts to connect. It doubles with each, with jitter (half
  // to all of it), and begins anew once a reply has come.
  double first_pause_s = 0.1;
  double longest_pause_s = 5;
};

// Every member may be called from any thread.
class RobotClient {
 public:
  // Throws std::invalid_argument, which names the option.
  explicit RobotClient(ClientOptions options);
  ~RobotClient();  // stops
  RobotClient(const RobotClient&) = delete;
  RobotClient& operator=(const RobotClient&) = delete;

  void start();  // once
  // Ends the thread: waits for `observe` to return and for a name's look-up, never for the server.
  void stop();

  // The action meant for `now`. Never waits. Throws what ended the client: Refused, BadReply, or what
  // `observe` threw.
  Step action(Clock::time_point now = Clock::now()) const;

  // Throws what action() does, or std::runtime_error when no chunk has come within `timeout_s` seconds.
  void wait_for_chunk(double timeout_s = 30) const;

  Chunk chunk() const;                                  // the one in use; empty before the first
  std::map<std::string, std::string> metadata() const;  // of the last connection, see decode_metadata
  std::string trouble() const;                          // why the last connection was lost; empty if none was
  std::uint64_t connects() const;                       // connections made so far
  std::uint64_t chunks() const;                         // chunks received so far

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// One connection for requests one by one, for programs without a control loop.
class Connection {
 public:
  // Throws Refused, or std::runtime_error when there is no connection to be had.
  explicit Connection(Address address);
  ~Connection();
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  // Waits for the reply. Throws Refused, BadReply, or std::runtime_error when the connection is lost.
  Actions infer(const Observation& observation);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace robot
