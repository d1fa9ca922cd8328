#include "ops/composite/composite.h"

#include <cmath>

namespace servoflow::ops {
namespace {

// Attention of one layer, in place on x: x += gate * (attention(norm(x)) · W_oᵀ). Shared by prefix and
// expert.
void attend(Backend& b, const GemmaWeights& w, const Matrix& x, const Count& rows, const Segments& segments,
            const KvCache& cache, int layer, int heads, const RopeTable* rope,
            const ModulationRow* modulation, const BlockScratch& s, bool only_cache, const char* qkv_zone,
            const char* zone, const char* out_zone) {
  b.rms_norm({.x = x, .y = s.normed, .rows = rows, .weight = w.input_norm, .modulation = modulation});
  b.matmul({.x = s.normed, .w = &w.qkv, .y = s.qkv, .rows = rows, .zone = qkv_zone});
  b.split_qkv({.qkv = s.qkv,
               .heads = heads,
               .segments = segments,
               .rope = rope,
               .q = s.q,
               .cache = &cache,
               .layer = layer});
  if (only_cache) return;
  b.attention({.q = s.q,
               .heads = heads,
               .cache = &cache,
               .layer = layer,
               .segments = segments,
               .scale = 1.0f / std::sqrt(static_cast<float>(cache.head_dim)),
               .out = s.attended,
               .zone = zone});
  b.matmul({.x = s.attended,
            .w = &w.out,
            .y = x,
            .rows = rows,
            .epilogue = {.gate = modulation, .accumulate = true},
            .zone = out_zone});
}

// The gated MLP, in place on x: x += gate * (gelu(n · W_gateᵀ) * (n · W_upᵀ)) · W_downᵀ.
void gated_mlp(Backend& b, const GemmaWeights& w, const Matrix& x, const Count& rows,
               const ModulationRow* modulation, const BlockScratch& s, const char* up_zone,
               const char* down_zone) {
  b.rms_norm({.x = x, .y = s.normed, .rows = rows, .weight = w.post_norm, .modulation = modulation});
  b.matmul({.x = s.normed,
            .w = &w.gate_up,
            .y = s.hidden,
            .rows = rows,
            .epilogue = {.geglu = true},
            .zone = up_zone});
  b.matmul({.x = s.hidden,
            .w = &w.down,
            .y = x,
            .rows = rows,
            .epilogue = {.gate = modulation, .accumulate = true},
            .zone = down_zone});
}

}  // namespace

void siglip_block(Backend& b, const SiglipBlock& op) {
  const SiglipWeights& w = *op.weights;
  const BlockScratch& s = op.scratch;
  b.layer_norm({.x = op.x, .y = s.normed, .rows = op.rows, .weight = w.norm1_weight, .bias = w.norm1_bias});
  b.matmul({.x = s.normed,
            .w = &w.qkv,
            .y = s.qkv,
            .rows = op.rows,
            .epilogue = {.bias = w.qkv_bias},
            .zone = "vision/qkv"});
  b.split_qkv({.qkv = s.qkv, .heads = op.heads, .segments = op.segments, .q = s.q, .cache = op.cache});
  b.attention({.q = s.q,
               .heads = op.heads,
               .cache = op.cache,
               .segments = op.segments,
               .scale = 1.0f / std::sqrt(static_cast<float>(op.cache->head_dim)),
               .out = s.attended,
               .zone = "vision/attention"});
  b.matmul({.x = s.attended,
            .w = &w.out,
            .y = op.x,
            .rows = op.rows,
            .epilogue = {.bias = w.out_bias, .accumulate = true},
            .zone = "vision/out"});
  b.layer_norm({.x = op.x, .y = s.normed, .rows = op.rows, .weight = w.norm2_weight, .bias = w.norm2_bias});
  b.matmul({.x = s.normed,
            .w = &w.fc1,
            .y = s.hidden,
            .rows = op.rows,
            .epilogue = {.bias = w.fc1_bias, .activation = Activation::kGeluTanh},
            .zone = "vision/mlp"});
  b.matmul({.x = s.hidden,
            .w = &w.fc2,
            .y = op.x,
            .rows = op.rows,
            .epilogue = {.bias = w.fc2_bias, .accumulate = true},
            .zone = "vision/mlp"});
}

void gemma_layer(Backend& b, const GemmaLayer& op) {
  attend(b, *op.weights, op.x, op.rows, op.segments, *op.cache, op.layer, op.heads, op.rope, nullptr,
         op.scratch, op.only_cache, "prefix/qkv", "prefix/attention", "prefix/out");
  if (op.only_cache) return;
  gated_mlp(b, *op.weights, op.x, op.rows, nullptr, op.scratch, "prefix/mlp", "prefix/mlp");
}

void expert_step(Backend& b, const ExpertStep& op) {
  const ExpertWeights& w = *op.weights;
  ModulationRow attention = op.modulation, mlp = op.modulation, last = op.modulation;
  b.matmul({.x = op.actions,
            .w = &w.action_in,
            .y = op.x,
            .rows = op.rows,
            .epilogue = {.bias = w.action_in_bias},
            .zone = "denoise/projection"});
  for (int layer = 0; layer < w.depth; ++layer) {
    attention.site = 2 * layer;
    mlp.site = 2 * layer + 1;
    attend(b, w.layers[layer], op.x, op.rows, op.segments, *op.cache, layer, w.heads, op.rope, &attention,
           op.scratch, false, "denoise/qkv", "denoise/attention", "denoise/out");
    gated_mlp(b, w.layers[layer], op.x, op.rows, &mlp, op.scratch, "denoise/mlp", "denoise/mlp");
  }
  last.site = 2 * w.depth;
  b.rms_norm({.x = op.x, .y = op.final_normed, .rows = op.rows, .modulation = &last});
  b.matmul({.x = op.final_normed,
            .w = &w.action_out,
            .y = op.velocity,
            .rows = op.rows,
            .epilogue = {.bias = w.action_out_bias},
            .zone = "denoise/projection"});
}

void denoise_loop(Backend& b, const DenoiseLoop& op) {
  ExpertStep step = op.step;
  for (int j = op.first; j < op.first + op.steps; ++j) {
    step.modulation.base = j;
    b.expert_step(step);
    b.euler_step({.x = step.actions, .v = step.velocity, .rows = step.rows, .dt = op.dt});
  }
}

}  // namespace servoflow::ops
