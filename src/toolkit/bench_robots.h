// The requests that `bench` measures: robots with frames, a state and tokens that are made up but the same in
// every run.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "servoflow/policy.h"
#include "toolkit/bench.h"

namespace servoflow::toolkit {

// What request `index` of a batch holds. With `ragged` the requests differ: tokens fall to half over the
// batch, every second robot has a camera less.
WorkShape request_shape(const WorkShape& work, bool ragged, int index);

// How many of its robot's cameras, in their order, make a request that lacks none it must have; 0: none must
// be there.
Result<int> required_views(const Session& session);

class BenchRobots {
 public:
  // One session, observation and chunk per request of `options.work.batch`.
  static Result<BenchRobots> create(const Policy& policy, const BenchOptions& options, int vocab);

  // The first `count` requests in one pass; each continues its noise where its last call left it.
  Status infer(int count, int steps);
  // Request `index` alone.
  Status infer_alone(int index, int steps);
  // All noise from the beginning: the calls that follow give the same actions as those after the last reset.
  void reset();

  const ActionChunk& chunk(int index) const { return chunks_[static_cast<std::size_t>(index)]; }
  int size() const { return static_cast<int>(chunks_.size()); }
  const std::vector<WorkShape>& shapes() const { return shapes_; }

 private:
  struct Robot {
    std::vector<std::string> slots;
    std::vector<std::vector<std::uint8_t>> frames;
    std::vector<double> state;
    std::vector<std::int32_t> tokens;
    Observation observation;  // borrows from the rest
  };
  static Result<Robot> make_robot(const Session& session, const BenchOptions& o, const WorkShape& shape,
                                  int vocab, int index);

  std::vector<Robot> robots_;
  std::vector<WorkShape> shapes_;
  std::vector<Session> sessions_;
  std::vector<Session*> session_pointers_;
  std::vector<const Observation*> observations_;
  std::vector<ActionChunk> chunks_;
};

}  // namespace servoflow::toolkit
