// A program of somebody else's: opens a checkpoint and infers once.
#include <servoflow/policy.h>

#include <cstdio>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  auto policy = servoflow::Policy::open(argv[1], {.device = "cpu", .precision = "fp32"});
  if (!policy.ok()) {
    std::fprintf(stderr, "%s\n", policy.status().message().c_str());
    return servoflow::exit_code(policy.status());
  }
  auto session = policy->new_session({.robot = "libero", .seed = 7});
  if (!session.ok()) {
    std::fprintf(stderr, "%s\n", session.status().message().c_str());
    return servoflow::exit_code(session.status());
  }
  const std::vector<std::uint8_t> frame(std::size_t{224} * 224 * 3, 128);
  const std::vector<double> state(8, 0.0);
  servoflow::Observation observation;
  for (const char* name : {"observation/image", "observation/wrist_image"})
    observation.images.push_back({.name = name, .height = 224, .width = 224, .bytes = frame});
  observation.state = state;
  observation.prompt = "pick up the cup";
  const auto chunk = session->infer(observation, {.steps = 2});
  if (!chunk.ok()) {
    std::fprintf(stderr, "%s\n", chunk.status().message().c_str());
    return servoflow::exit_code(chunk.status());
  }
  std::printf("%d actions of width %d on %s\n", chunk->horizon, chunk->action_dim, chunk->backend.c_str());
  return chunk->horizon > 0 && chunk->action_dim == 7 ? 0 : 1;
}
