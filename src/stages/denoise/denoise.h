// The action expert: N Euler steps of the velocity field, conditioned on the prefix's K/V and on the step's
// time alone.
#pragma once

#include <memory>
#include <vector>

#include "ops/composite/composite.h"
#include "weights/architecture.h"
#include "weights/loader.h"

namespace servoflow::stages {

inline constexpr int kMaxSteps = 50;

// The times 1 = t_0 > … > t_{N-1} of a schedule, rounded as the checkpoint's own framework rounds them.
std::vector<float> time_grid(int steps, weights::TimeGrid grid);

// Everything of an N-step schedule that depends on the times alone: the AdaRMS conditions and all
// modulations.
struct Schedule {
  int steps = 0;
  int slot = 0;                   // where it is kept: two schedules never share one
  float dt = 0;                   // -1 / N
  std::vector<float> times;       // [steps]
  ops::Matrix condition;          // [steps, width] float32, after the second SiLU
  ops::ModulationRow modulation;  // table of all steps and sites
};

struct DenoiseRun {
  ops::Matrix actions, velocity;  // [rows, action_dim] float32
  ops::Count rows;
  ops::Segments segments;  // one per request, past = its valid prefix tokens
  const ops::KvCache* cache = nullptr;
  const ops::RopeTable* rope = nullptr;
  ops::Matrix x, final_normed;  // [rows, width] float32
  ops::BlockScratch scratch;
};

class Denoise {
 public:
  // `requests`: the most that one pass will bring. Beyond Backend::requests_at_once() the expert's weights
  // are laid out for products of hundreds of rows, which a backend may do in other kernels; the choice holds
  // for single requests, too.
  static Result<Denoise> load(weights::Loader& loader, const weights::Architecture& architecture,
                              int requests = 1);
  // The schedule for N steps; the last few are kept, so that a robot that keeps N computes it once.
  Result<const Schedule*> schedule(ops::Backend& backend, int steps);
  // Euler steps [first, first + count) in place on run.actions.
  void run(ops::Backend& backend, const Schedule& schedule, const DenoiseRun& run, int first,
           int count) const;

 private:
  struct Cached {
    Schedule schedule;
    std::uint64_t used = 0;
    float *times = nullptr, *table = nullptr;
    ops::Matrix features, hidden;
  };
  Status compute(ops::Backend& backend, Cached& cached, int steps) const;

  weights::Architecture architecture_;
  std::vector<ops::GemmaWeights> layers_;
  ops::ExpertWeights expert_;
  ops::Weight time_in_, time_out_;
  const float *time_in_bias_ = nullptr, *time_out_bias_ = nullptr;
  std::vector<ops::Weight> modulation_;  // [2 depth + 1], each [3 width, width]
  std::vector<const float*> modulation_bias_;
  std::vector<std::unique_ptr<Cached>> cache_;
  std::uint64_t clock_ = 0;
};

}  // namespace servoflow::stages
