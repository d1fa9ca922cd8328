#include "action_timeline.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>

namespace robot {

std::optional<Stale> parse_stale(std::string_view name) {
  if (name == "hold") return Stale::kHold;
  if (name == "stop") return Stale::kStop;
  if (name == "extrapolate") return Stale::kExtrapolate;
  return {};
}

const char* name_of(State state) {
  switch (state) {
    case State::kWaiting:
      return "waiting";
    case State::kFresh:
      return "fresh";
    case State::kHold:
      return "hold";
    case State::kExtrapolate:
      return "extrapolate";
    case State::kStop:
      return "stop";
  }
  return "unknown";
}

ActionTimeline::ActionTimeline(const TimelineOptions& options) : options_(options) {
  constexpr double kLongest = 3600;
  if (!(options.period_s > 0 && options.period_s <= kLongest))
    throw std::invalid_argument("period_s: must be above 0 and at most 3600 seconds");
  if (options.replan_every < 1) throw std::invalid_argument("replan_every: must be 1 or more");
  if (options.stale != Stale::kHold && options.stale != Stale::kStop && options.stale != Stale::kExtrapolate)
    throw std::invalid_argument("stale: choose hold, stop or extrapolate; there is no default");
}

void ActionTimeline::add(Chunk chunk) {
  constexpr std::size_t kMost = std::size_t{1} << 24;  // of a side: products and times below cannot overflow
  const Actions& actions = chunk.actions;
  if (actions.horizon < 1 || actions.dim < 1 || actions.horizon > kMost || actions.dim > kMost ||
      actions.values.size() != actions.horizon * actions.dim)
    throw std::invalid_argument("actions: " + std::to_string(actions.values.size()) + " values for shape [" +
                                std::to_string(actions.horizon) + ", " + std::to_string(actions.dim) + "]");
  if (!std::all_of(actions.values.begin(), actions.values.end(), [](double v) { return std::isfinite(v); }))
    throw std::invalid_argument("actions: a value is not finite");
  if (has_chunk() && actions.dim != chunk_.actions.dim)
    throw std::invalid_argument("actions: " + std::to_string(actions.dim) +
                                " columns; the chunks before had " + std::to_string(chunk_.actions.dim));
  if (has_chunk() && chunk.begin < chunk_.begin) return;
  chunk_ = std::move(chunk);
}

Step ActionTimeline::at(Clock::time_point now) const {
  if (!has_chunk()) return {};
  const Actions& actions = chunk_.actions;
  const auto row = [&](std::size_t i) { return actions.values.data() + i * actions.dim; };
  Step step;
  step.age_s = std::chrono::duration<double>(now - chunk_.begin).count();
  // In doubles: an age may be days, and a moment before the observation counts as its own.
  const double index = std::max(0.0, std::floor(step.age_s / options_.period_s));
  if (index < static_cast<double>(actions.horizon)) {
    step.state = State::kFresh;
    const double* first = row(static_cast<std::size_t>(index));
    step.action.assign(first, first + actions.dim);
    return step;
  }
  const double* last = row(actions.horizon - 1);
  if (options_.stale == Stale::kHold) {
    step.state = State::kHold;
    step.action.assign(last, last + actions.dim);
    return step;
  }
  const double behind = index - static_cast<double>(actions.horizon) + 1;
  if (options_.stale == Stale::kExtrapolate && actions.horizon > 1 &&
      behind <= static_cast<double>(options_.extrapolate_steps)) {
    step.state = State::kExtrapolate;
    const double* before = row(actions.horizon - 2);
    for (std::size_t i = 0; i < actions.dim; ++i)
      step.action.push_back(last[i] + behind * (last[i] - before[i]));
    return step;
  }
  step.state = State::kStop;
  return step;
}

Clock::time_point ActionTimeline::next_observation() const {
  if (!has_chunk()) return {};
  const std::size_t steps = std::min(options_.replan_every, chunk_.actions.horizon);
  const std::chrono::duration<double> wait(static_cast<double>(steps) * options_.period_s);
  return chunk_.begin + std::chrono::duration_cast<Clock::duration>(wait);
}

}  // namespace robot
