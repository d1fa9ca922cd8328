#include "toolkit/bench_robots.h"

#include <algorithm>

#include "contract/canonical.h"
#include "contract/validate.h"
#include "core/status_macros.h"

namespace servoflow::toolkit {
namespace {

constexpr int kFrame = 224;  // side of the frames, whatever the model's own size is

std::uint32_t next_random(std::uint32_t& state) {
  state = state * 1664525u + 1013904223u;  // an LCG is random enough for pixels
  return state >> 8;
}

Result<contract::Contract> contract_of(const Session& session) {
  SF_ASSIGN_OR_RETURN(const Json json, parse_json(session.contract_json(), "contract"));
  return contract::contract_from_json(json, "contract");
}

int required_views(const contract::Contract& contract) {
  int views = 0, required = 0;
  for (const contract::CameraSlot& c : contract.cameras) {
    if (!c.key.empty()) ++views;
    if (c.required) required = views;
  }
  return required;
}

}  // namespace

Result<int> required_views(const Session& session) {
  SF_ASSIGN_OR_RETURN(const contract::Contract contract, contract_of(session));
  return required_views(contract);
}

WorkShape request_shape(const WorkShape& work, bool ragged, int index) {
  WorkShape out = work;
  out.batch = 1;
  if (!ragged) return out;
  out.tokens = std::max(1, work.tokens - index * work.tokens / (2 * std::max(1, work.batch)));
  if (index % 2 == 1 && work.views > 1) --out.views;
  return out;
}

Result<BenchRobots::Robot> BenchRobots::make_robot(const Session& session, const BenchOptions& o,
                                                   const WorkShape& shape, int vocab, int index) {
  SF_ASSIGN_OR_RETURN(const contract::Contract contract, contract_of(session));
  Robot out;
  for (const contract::CameraSlot& c : contract.cameras)
    if (!c.key.empty()) out.slots.push_back(c.slot);
  const auto views = static_cast<std::size_t>(shape.views);
  if (out.slots.size() < views)
    return Status::invalid("--views " + std::to_string(views) + ": robot " + contract.name + " has " +
                           std::to_string(out.slots.size()) + " cameras");
  if (const int least = required_views(contract); shape.views < least)
    return Status::invalid("--views " + std::to_string(views) + ": robot " + contract.name +
                           " needs at least " + std::to_string(least) + " pictures" +
                           (o.ragged ? "; with --ragged every other request has one less" : ""));
  out.slots.resize(views);
  auto random = static_cast<std::uint32_t>(index + 1);
  for (std::size_t i = 0; i < views; ++i) {
    std::vector<std::uint8_t>& frame = out.frames.emplace_back(static_cast<std::size_t>(kFrame) * kFrame * 3);
    for (std::uint8_t& value : frame) value = static_cast<std::uint8_t>(next_random(random));
  }
  out.state.resize(static_cast<std::size_t>(contract::state_width(contract)));
  if (!o.prompt)
    for (int i = 0; i < shape.tokens; ++i)
      out.tokens.push_back(
          static_cast<std::int32_t>(next_random(random) % static_cast<std::uint32_t>(vocab)));
  return out;
}

Result<BenchRobots> BenchRobots::create(const Policy& policy, const BenchOptions& o, int vocab) {
  BenchRobots out;
  if (o.ragged && o.prompt) return Status::invalid("--ragged: needs token ids, not a --prompt");
  for (int i = 0; i < o.work.batch; ++i) {
    SF_ASSIGN_OR_RETURN(Session session, policy.new_session({.seed = static_cast<std::uint64_t>(i)}));
    out.shapes_.push_back(request_shape(o.work, o.ragged, i));
    SF_ASSIGN_OR_RETURN(Robot robot, make_robot(session, o, out.shapes_.back(), vocab, i));
    out.robots_.push_back(std::move(robot));
    out.sessions_.push_back(std::move(session));
  }
  for (std::size_t i = 0; i < out.robots_.size(); ++i) {  // they have found their places in memory
    Robot& robot = out.robots_[i];
    for (std::size_t c = 0; c < robot.slots.size(); ++c)
      robot.observation.images.push_back(
          {robot.slots[c], ImageLayout::kHWC, kFrame, kFrame, robot.frames[c]});
    robot.observation.state = robot.state;
    robot.observation.tokens = robot.tokens;
    if (o.prompt) robot.observation.prompt = *o.prompt;
    out.session_pointers_.push_back(&out.sessions_[i]);
    out.observations_.push_back(&robot.observation);
  }
  out.chunks_.resize(out.robots_.size());
  return out;
}

Status BenchRobots::infer(int count, int steps) {
  if (count == 1) return infer_alone(0, steps);
  const auto n = static_cast<std::size_t>(count);
  return infer_batch(std::span(session_pointers_).first(n), std::span(observations_).first(n),
                     {.steps = steps}, std::span(chunks_).first(n));
}

Status BenchRobots::infer_alone(int index, int steps) {
  const auto i = static_cast<std::size_t>(index);
  return sessions_[i].infer_into(robots_[i].observation, {.steps = steps}, chunks_[i]);
}

void BenchRobots::reset() {
  for (Session& session : sessions_) session.reset();
}

}  // namespace servoflow::toolkit
