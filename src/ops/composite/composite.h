// The four composite operations: a transformer's blocks as named steps over the ops of ops.h. Their default
// bodies are the specification and the oracle of any backend's replacement.
#pragma once

#include "ops/backend.h"

namespace servoflow::ops {

// Scratch matrices that a block works in. Planned once (policy/plan.h), shared by all layers.
struct BlockScratch {
  Matrix normed;  // [rows, width]           activation dtype
  Matrix qkv;     // [rows, (h + 2 kv) d]    float32
  void* q = nullptr;
  Matrix attended;  // [rows, h d]           activation dtype
  Matrix hidden;    // [rows, mlp]           activation dtype
};

struct SiglipWeights {
  const float *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;
  Weight qkv, out, fc1, fc2;
  const float *qkv_bias, *out_bias, *fc1_bias, *fc2_bias;
};

// One pre-LN block of the vision tower, in place on x [rows, width] float32.
struct SiglipBlock {
  const SiglipWeights* weights = nullptr;
  Matrix x;
  Count rows;
  Segments segments;               // one per picture, past = 0
  const KvCache* cache = nullptr;  // one layer, a slot per picture
  int heads = 0;
  BlockScratch scratch;
  // Blocks that follow each other may share a launch: a backend may make the first norm of `next` while it
  // ends this block, in scratch.normed; `normed` says that the block before was given this one as its next.
  // Both may be ignored.
  const SiglipWeights* next = nullptr;
  bool normed = false;
};

struct GemmaWeights {
  const float *input_norm = nullptr, *post_norm = nullptr;  // null in the expert: modulated
  Weight qkv, out, gate_up, down;
};

// One layer of the prefix, in place on x [rows, width] float32; its K/V go to the segments' slots.
// `only_cache`: nothing but K/V is wanted (the last layer, whose output nobody reads).
struct GemmaLayer {
  const GemmaWeights* weights = nullptr;
  Matrix x;
  Count rows;
  Segments segments;
  const KvCache* cache = nullptr;
  int layer = 0, heads = 0;
  const RopeTable* rope = nullptr;
  bool only_cache = false;
  BlockScratch scratch;
  const GemmaWeights* next = nullptr;  // as in SiglipBlock
  bool normed = false;
};

// Weights of the action expert.
struct ExpertWeights {
  const GemmaWeights* layers = nullptr;  // [depth]
  int depth = 0, width = 0, heads = 0;
  Weight action_in, action_out;
  const float *action_in_bias = nullptr, *action_out_bias = nullptr;
};

// One evaluation of the velocity field at modulation row `modulation.base`: actions [rows, action_dim] ->
// velocity.
struct ExpertStep {
  const ExpertWeights* weights = nullptr;
  Matrix actions, velocity;  // float32
  Count rows;
  Segments segments;  // suffix rows: past = valid prefix tokens of the slot
  const KvCache* cache =
      nullptr;  // the prefix's cache; suffix K/V are written behind the prefix of each slot
  const RopeTable* rope = nullptr;
  ModulationRow modulation;  // site is set by the step
  Matrix x;                  // [rows, width] float32
  BlockScratch scratch;
  Matrix final_normed;  // [rows, width] float32
};

// `steps` Euler steps from step `first`: actions += dt · velocity(actions, t_j), in place.
struct DenoiseLoop {
  ExpertStep step;
  int first = 0, steps = 0;
  float dt = 0;
};

void siglip_block(Backend& backend, const SiglipBlock& op);
void gemma_layer(Backend& backend, const GemmaLayer& op);
void expert_step(Backend& backend, const ExpertStep& op);
void denoise_loop(Backend& backend, const DenoiseLoop& op);

}  // namespace servoflow::ops
