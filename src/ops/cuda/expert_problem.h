// A denoise loop of the published expert's sizes, a few layers deep, over requests of different lengths: for
// tests.
#pragma once

#include <algorithm>

#include "ops/block_conformance.h"

namespace servoflow::ops {

struct ExpertShape {
  int depth = 2, steps = 2, horizon = 25;
  std::vector<int> past = {100, 600, 37};  // of the requests
};

class ExpertProblem {
 public:
  ExpertProblem(Device& device, ExpertShape shape)
      : d_(device), shape_(std::move(shape)), parts_{device, true} {
    const int depth = shape_.depth, requests = static_cast<int>(shape_.past.size()), sites = 2 * depth + 1;
    const DType f32 = DType::kF32;
    capacity_ = (requests + 1) * shape_.horizon;
    cache_ = parts_.cache(depth, requests + 1, keys_, 1, kDim);
    rope_ = parts_.rope(keys_, kDim);
    for (int r = 0; r < requests; ++r)
      suffix_.push_back({r * shape_.horizon, shape_.horizon, r, shape_.past[static_cast<std::size_t>(r)]});
    void* q = *d_.b->allocate(d_.b->query_bytes(keys_, kHeads, kDim));
    for (int layer = 0; layer < depth; ++layer)
      for (int r = 0; r < requests; ++r) {
        const int rows = shape_.past[static_cast<std::size_t>(r)], cols = (kHeads + 2) * kDim;
        const std::vector<Segment> segment = {{0, rows, r, 0}};
        d_.b->split_qkv({.qkv = d_.put(parts_.values(rows * cols, 1), rows, cols, f32),
                         .heads = kHeads,
                         .segments = {d_.array(segment), {1}, rows, keys_},
                         .rope = &rope_,
                         .q = q,
                         .cache = &cache_,
                         .layer = layer});
      }
    for (int layer = 0; layer < depth; ++layer)
      layers_.push_back({.qkv = parts_.heads(kHeads, 1, kDim, kWidth),
                         .out = parts_.linear(kWidth, kHeads * kDim),
                         .gate_up = parts_.gated(kMlp, kWidth),
                         .down = parts_.linear(kWidth, kMlp)});
    weights_ = {.layers = layers_.data(),
                .depth = depth,
                .width = kWidth,
                .heads = kHeads,
                .action_in = projection(kWidth, kActions),
                .action_out = projection(kActions, kWidth),
                .action_in_bias = parts_.vector(kWidth),
                .action_out_bias = parts_.vector(kActions)};
    noise_ = parts_.values(capacity_ * kActions, 1);
    const int steps = shape_.steps + 1;  // one more than is taken
    modulation_ = {.table = parts_.vector(steps * sites * 3 * kWidth, 0.5f),
                   .step_pitch = sites * 3 * kWidth,
                   .width = kWidth};
    d_.b->prepare_schedule(weights_, modulation_, steps);
    scratch_ = parts_.scratch(capacity_, kWidth, kHeads, 1, kDim, kMlp);
    x_ = d_.matrix(capacity_, kWidth, f32);
    velocity_ = d_.matrix(capacity_, kActions, f32);
  }
  ExpertProblem(const ExpertProblem&) = delete;
  ExpertProblem& operator=(const ExpertProblem&) = delete;

  // The actions of the first `count` requests.
  Result<std::vector<float>> run(int count) {
    const std::vector<std::int32_t> segments = {count}, rows = {count * shape_.horizon};
    const int slots = static_cast<int>(shape_.past.size()) + 1;
    const Matrix actions = d_.put(noise_, capacity_, kActions, DType::kF32);
    d_.b->denoise_loop(
        {.step = {.weights = &weights_,
                  .actions = actions,
                  .velocity = velocity_,
                  .rows = {capacity_, d_.array(rows)},
                  .segments = {d_.array(suffix_), {slots, d_.array(segments)}, shape_.horizon, keys_},
                  .cache = &cache_,
                  .rope = &rope_,
                  .modulation = modulation_,
                  .x = x_,
                  .scratch = scratch_,
                  .final_normed = d_.matrix(capacity_, kWidth, DType::kF32)},
         .first = 0,
         .steps = shape_.steps,
         .dt = -1.0f / static_cast<float>(shape_.steps)});
    if (Status status = d_.b->finish(); !status.ok()) return status;
    return d_.get(actions, count * shape_.horizon);
  }

 private:
  static constexpr int kHeads = 8, kDim = 256, kWidth = 1024, kMlp = 4096, kActions = 32;

  Weight projection(int n, int k) {
    const std::vector<float> values = parts_.values(n * k, 1 / std::sqrt(static_cast<float>(k)));
    const HostMatrix host{DType::kF32, n, k, std::as_bytes(std::span(values)), "projection"};
    return *d_.b->pack({&host, 1}, {.keep_float32 = true});
  }

  Device& d_;
  ExpertShape shape_;
  BlockParts parts_;
  int keys_ = *std::max_element(shape_.past.begin(), shape_.past.end()) + 2 * shape_.horizon + 50;
  int capacity_ = 0;
  KvCache cache_;
  RopeTable rope_;
  std::vector<Segment> suffix_;
  std::vector<GemmaWeights> layers_;
  ExpertWeights weights_;
  std::vector<float> noise_;
  ModulationRow modulation_;
  BlockScratch scratch_;
  Matrix x_, velocity_;
};

}  // namespace servoflow::ops
