// The denoise loop's own kernels (sm_90 and later): five per expert layer and one between steps. They are
// short, so each fetches what does not depend on its predecessor (weights, the prefix's keys and values)
// while that one still runs, and what a norm needs travels beside the row: x · (1 + scale) as bf16 and the
// sum of its squares in parts; the reader applies 1 / rms and the product of the shift, which was made
// beforehand.
#pragma once

#include "ops/cuda/epilogue.cuh"
#include "ops/cuda/launch.h"

namespace servoflow::ops::cuda {

// The sizes these kernels are built for: those of the 300M expert. Anything else takes the composition.
inline constexpr int kExpertWidth = 1024, kExpertMlp = 4096, kExpertHeads = 8, kExpertHeadDim = 256;
inline constexpr int kExpertQkv = (kExpertHeads + 2) * kExpertHeadDim;
inline constexpr int kMostExpertKeys = 1024, kMostActions = 64;
inline constexpr int kStatParts = 32;  // sums of squares per row, of 32 features each
inline constexpr float kExpertEps = 1e-6f;

// y = f(x · Wᵀ) for few rows, the sums of a weight's rows split over warps and blocks in a fixed way.
struct ExpertProduct {
  const __nv_bfloat16* x = nullptr;  // [rows, depth] in tiles, as the weight is
  const void* weight = nullptr;
  WeightLayout w;
  Count rows;
  // qkv and gate/up: x lacks its norm's 1 / rms and shift.
  const float* squares = nullptr;  // [rows, kStatParts]
  const float* shift = nullptr;    // [n], the shift's product
  DeviceQkv qkv;
  __nv_bfloat16* y = nullptr;  // gate/up: [rows, mlp] in tiles
  // out and down: residual += gate * sum, and what the next norm needs of it.
  float* residual = nullptr;  // [rows, residual_pitch]
  std::int64_t residual_pitch = 0;
  const float* gate = nullptr;        // [width]
  const float* next_scale = nullptr;  // [width]; null: `scaled` is not wanted
  __nv_bfloat16* scaled = nullptr;    // [rows, width] in tiles
  float* next_squares = nullptr;      // [rows, kStatParts]
};
cudaError_t expert_qkv(const Stream& s, const ExpertProduct& op);
cudaError_t expert_gate_up(const Stream& s, const ExpertProduct& op);
cudaError_t expert_out(const Stream& s, const ExpertProduct& op);
cudaError_t expert_down(const Stream& s, const ExpertProduct& op);

// softmax(q kᵀ scale) v of suffix rows, the keys of a request split over a cluster of eight blocks.
struct ExpertAttention {
  DeviceQkv qkv;  // where q, k and v lie
  Segments segments;
  float scale = 1;
  __nv_bfloat16* out = nullptr;  // [rows, heads * head_dim] in tiles
};
cudaError_t expert_attention(const Stream& s, const ExpertAttention& op);

// Between steps: velocity = out(norm(x)), actions += dt · velocity, then x = in(actions) for the next step.
struct ExpertEdge {
  Count rows;
  bool finish = false, begin = false;
  float* residual = nullptr;  // [rows, residual_pitch]
  std::int64_t residual_pitch = 0;
  float* squares = nullptr;            // [rows, kStatParts], read by finish and written by begin
  const float* final_scale = nullptr;  // shift follows after the width
  const float* next_scale = nullptr;   // begin: of the first layer's norm
  __nv_bfloat16* scaled = nullptr;     // [rows, width], where edge_row() is told
  float dt = 0;
  int actions_dim = 0;
  float *actions = nullptr, *velocity = nullptr;
  std::int64_t actions_pitch = 0, velocity_pitch = 0;
  WeightLayout in, out;
  const void *in_weight = nullptr, *out_weight = nullptr;
  const float *in_bias = nullptr, *out_bias = nullptr;
};
cudaError_t expert_edge(const Stream& s, const ExpertEdge& op);

}  // namespace servoflow::ops::cuda
