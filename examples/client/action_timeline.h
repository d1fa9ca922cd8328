// Which action a robot executes at a given moment: the newest chunk on a timeline, and what applies behind
// its end.
//
// Pure arithmetic: no clock is read, nothing waits, nothing is shared between threads.
#pragma once

#include <chrono>
#include <cstddef>
#include <optional>
#include <string_view>
#include <vector>

namespace robot {

using Clock = std::chrono::steady_clock;

// What the robot does when the last chunk is used up and no newer one has come. There is no default: a value
// that was never chosen (Stale{}) is refused.
enum class Stale {
  kHold = 1,     // repeat the chunk's last action
  kStop,         // no action: the robot stops by its own means
  kExtrapolate,  // go on with the last difference for some steps, then stop
};
std::optional<Stale> parse_stale(std::string_view name);  // "hold", "stop", "extrapolate"

enum class State { kWaiting, kFresh, kHold, kExtrapolate, kStop };
const char* name_of(State state);  // "waiting", "fresh", "hold", "extrapolate", "stop"

// Row-major [horizon, dim], in the robot's units.
struct Actions {
  std::size_t horizon = 0;
  std::size_t dim = 0;
  std::vector<double> values;
};

struct Chunk {
  Actions actions;
  Clock::time_point begin;  // of the observation: row i is meant for begin + i * period
};

struct Step {
  std::vector<double> action;  // [dim]; empty in the states waiting and stop
  State state = State::kWaiting;
  double age_s = 0;  // seconds since the observation that the action answers; 0 while waiting
};

struct TimelineOptions {
  double period_s = 0;                // seconds between two actions of a chunk, as the policy was trained
  std::size_t replan_every = 0;       // actions after which the next observation is due; 1 to the horizon
  Stale stale{};                      // to be chosen
  std::size_t extrapolate_steps = 3;  // actions behind the end; for Stale::kExtrapolate
};

class ActionTimeline {
 public:
  // Throws std::invalid_argument, which names the option.
  explicit ActionTimeline(const TimelineOptions& options);

  // A chunk older than the one in use changes nothing. Throws std::invalid_argument when the chunk is empty,
  // its size is not horizon * dim, a value is not finite, or its width is not that of the chunks before: none
  // of these may reach a motor.
  void add(Chunk chunk);

  Step at(Clock::time_point now) const;

  // When to take the next observation: `replan_every` actions (at most the horizon) behind the last one. The
  // epoch, which is always past, before the first chunk.
  Clock::time_point next_observation() const;

  bool has_chunk() const { return chunk_.actions.horizon > 0; }
  const Chunk& chunk() const { return chunk_; }  // the one in use; empty before the first

 private:
  TimelineOptions options_;
  Chunk chunk_;
};

}  // namespace robot
