// The denoise loop on its own kernels, where they know the expert's sizes; elsewhere its composition.
#include <cmath>

#include "ops/cuda/cuda_backend.cuh"
#include "ops/cuda/tensor_map.h"

namespace servoflow::ops::cuda {
namespace {

constexpr int kMostSteps = 50;  // of a schedule; more take the composition

bool has_sizes(const Weight& w, int n, int k) { return w.n == n && w.k == k; }

}  // namespace

bool CudaBackend::takes_expert(const ExpertWeights& w) {
  if (!clusters_ || w.width != kExpertWidth || w.heads != kExpertHeads || w.action_in.k > kMostActions ||
      w.action_out.n != w.action_in.k)
    return false;
  for (int layer = 0; layer < w.depth; ++layer) {
    const GemmaWeights& l = w.layers[layer];
    if (!has_sizes(l.qkv, kExpertQkv, kExpertWidth) || !has_sizes(l.gate_up, 2 * kExpertMlp, kExpertWidth) ||
        !has_sizes(l.out, kExpertWidth, kExpertHeads * kExpertHeadDim) ||
        !has_sizes(l.down, kExpertWidth, kExpertMlp))
      return false;
    for (const Weight* one : {&l.qkv, &l.out, &l.gate_up, &l.down}) {
      const WeightLayout* layout = layout_of(*one);
      if (layout == nullptr || !layout->tiled) return false;
    }
    if (layout_of(l.qkv)->order != RowOrder::kRotated || layout_of(l.qkv)->head_dim != kExpertHeadDim)
      return false;
  }
  return layout_of(w.action_in) != nullptr && layout_of(w.action_out) != nullptr;
}

// The products of the shifts: a norm's shift passes through the weight behind it once per schedule.
void CudaBackend::prepare_schedule(const ExpertWeights& w, const ModulationRow& modulation, int steps) {
  if (failed() || !takes_expert(w)) return;
  select();
  const std::int64_t per_layer = kExpertQkv + 2 * kExpertMlp, per_step = per_layer * w.depth;
  if (steps > kMostSteps) return;
  ShiftProducts& p = shift_products_[modulation.table];
  if (p.data == nullptr) {  // for any number of steps at once: recorded work keeps the address
    const Result<void*> memory = allocate(static_cast<std::uint64_t>(kMostSteps * per_step) * sizeof(float));
    if (!memory.ok()) return fail(memory.status());
    p.data = static_cast<float*>(*memory);
  }
  p.steps = steps;
  for (int layer = 0; layer < w.depth; ++layer)
    for (int part = 0; part < 2; ++part) {
      const Weight& weight = part == 0 ? w.layers[layer].qkv : w.layers[layer].gate_up;
      const float* shift =
          modulation.table + (2 * layer + part) * 3 * static_cast<std::int64_t>(w.width) + w.width;
      Product op{.x = {.data = const_cast<float*>(shift),
                       .rows = steps,
                       .cols = w.width,
                       .pitch = modulation.step_pitch},
                 .rows = {.capacity = steps},
                 .w = *layout_of(weight),
                 .weight = weight.data};
      op.epilogue = {.y = p.data + layer * per_layer + part * kExpertQkv, .pitch = per_step, .n = weight.n};
      ok(product_plain(stream_, op), "products of the schedule's shifts");
    }
}

bool CudaBackend::launch_loop_by(LoopLauncher launcher) {
  loop_launcher_ = launcher;
  return loop_;
}

// Whether one launch can do it all. As above, the answer is the policy's and not one call's.
bool CudaBackend::takes_loop(const DenoiseLoop& op) const {
  const Segments& s = op.step.segments;
  return loop_ && op.step.weights->depth <= kLoopLayers && s.count.capacity <= kLoopRequests &&
         s.max_rows <= kLoopRows && share_of_rank(op.step.cache->keys - s.max_rows) <= kLoopKeys;
}

void CudaBackend::run_loop(const DenoiseLoop& op, const float* shift) {
  const ExpertStep& step = op.step;
  const ExpertWeights& w = *step.weights;
  const auto rows = static_cast<std::int64_t>(step.segments.count.capacity) * kLoopRows;
  constexpr int kAttended = kExpertHeads * kExpertHeadDim;
  auto* squares = static_cast<float*>(
      scratch(squares_, static_cast<std::uint64_t>(step.rows.capacity) * kStatParts * sizeof(float)));
  auto* scaled = static_cast<__nv_bfloat16*>(
      scratch(expert_rows_, static_cast<std::uint64_t>(rows) * (kExpertWidth + kAttended + kExpertMlp) * 2));
  if (failed()) return;
  ExpertLoop loop{.depth = w.depth,
                  .segments = step.segments,
                  .qkv = qkv_of(step.segments, step.rope, nullptr, *step.cache, 0, w.heads),
                  .layer_bytes = static_cast<std::int64_t>(cache_bytes(*step.cache)) / step.cache->layers,
                  .scale = 1.0f / std::sqrt(static_cast<float>(kExpertHeadDim)),
                  .modulation = step.modulation.table,
                  .modulation_pitch = step.modulation.step_pitch,
                  .shift = shift,
                  .first = op.first,
                  .steps = op.steps,
                  .edge = edge_of(op, squares, scaled),
                  .attended = scaled + rows * kExpertWidth,
                  .hidden = scaled + rows * (kExpertWidth + kAttended),
                  .counters = loop_counters_,
                  .stall = loop_stall_};
  for (int layer = 0; layer < w.depth; ++layer) {
    const GemmaWeights& l = w.layers[layer];
    const auto at = [](const Weight& weight) { return static_cast<const __nv_bfloat16*>(weight.data); };
    loop.layers[layer] = {at(l.qkv), at(l.out), at(l.gate_up), at(l.down)};
  }
  const KvCache& cache = *step.cache;
  loop.side_rows = static_cast<std::int64_t>(cache.slots) * cache.keys;
  const std::int64_t keys = 2 * cache.layers * loop.side_rows;
  if (!tensor_map_of_rows(loop.keys, loop.qkv.k, keys, kExpertHeadDim, kExpertHeadDim, kLoopChunkKeys) ||
      !tensor_map_of_rows(loop.few_keys, loop.qkv.k, keys, kExpertHeadDim, kExpertHeadDim, kLoopSuffixKeys))
    return fail(Status::runtime("cuda: the driver refuses to describe the cache to the copy engine"));
  if (!recording_) take_turn();
  loop_launch_ = {.first = op.first, .steps = op.steps, .depth = w.depth, .rows = step.segments.max_rows};
  ok((loop_launcher_ != nullptr ? loop_launcher_ : expert_loop)(stream_, loop), "denoise loop");
}

ExpertEdge CudaBackend::edge_of(const DenoiseLoop& op, float* squares, __nv_bfloat16* scaled) {
  const ExpertStep& step = op.step;
  const ExpertWeights& w = *step.weights;
  return {.rows = step.rows,
          .residual = static_cast<float*>(step.x.data),
          .residual_pitch = step.x.pitch,
          .squares = squares,
          .scaled = scaled,
          .dt = op.dt,
          .actions_dim = w.action_in.k,
          .actions = static_cast<float*>(step.actions.data),
          .velocity = static_cast<float*>(step.velocity.data),
          .actions_pitch = step.actions.pitch,
          .velocity_pitch = step.velocity.pitch,
          .in = *layout_of(w.action_in),
          .out = *layout_of(w.action_out),
          .in_weight = w.action_in.data,
          .out_weight = w.action_out.data,
          .in_bias = w.action_in_bias,
          .out_bias = w.action_out_bias};
}

void CudaBackend::denoise_loop(const DenoiseLoop& op) {
  if (failed()) return;
  const ExpertStep& step = op.step;
  const ExpertWeights& w = *step.weights;
  const auto prepared = shift_products_.find(step.modulation.table);
  // Nothing here depends on the requests of one call: alone or in a batch, a row meets the same kernels.
  if (prepared == shift_products_.end() || op.first + op.steps > prepared->second.steps ||
      step.modulation.base != 0 || step.modulation.row_offset != nullptr ||
      step.cache->keys > kMostExpertKeys || step.cache->dtype != DType::kBF16 || !takes_expert(w))
    return ops::denoise_loop(*this, op);
  select();
  if (takes_loop(op)) return run_loop(op, prepared->second.data);
  auto* squares = static_cast<float*>(
      scratch(squares_, static_cast<std::uint64_t>(step.rows.capacity) * kStatParts * sizeof(float)));
  if (failed()) return;
  // The rows between its products, in tiles of eight.
  const std::int64_t tiled_rows = (step.rows.capacity + 7) / 8 * 8;
  auto* scaled = static_cast<__nv_bfloat16*>(
      scratch(expert_rows_, static_cast<std::uint64_t>(tiled_rows) *
                                (kExpertWidth + kExpertHeads * kExpertHeadDim + kExpertMlp) * 2));
  if (failed()) return;
  auto* attended = scaled + tiled_rows * kExpertWidth;
  auto* hidden = attended + tiled_rows * kExpertHeads * kExpertHeadDim;
  auto* residual = static_cast<float*>(step.x.data);
  const std::int64_t per_layer = kExpertQkv + 2 * kExpertMlp, per_step = per_layer * w.depth;
  const auto row_of = [&](int j, int site) {  // scale, shift and gate of a step's site
    return step.modulation.table + j * step.modulation.step_pitch +
           static_cast<std::int64_t>(site) * 3 * w.width;
  };
  ExpertEdge edge = edge_of(op, squares, scaled);
  for (int j = op.first; j < op.first + op.steps; ++j) {
    edge.finish = j > op.first;
    edge.begin = true;
    if (edge.finish) edge.final_scale = row_of(j - 1, 2 * w.depth);
    edge.next_scale = row_of(j, 0);
    ok(expert_edge(stream_, edge), "action projections");
    for (int layer = 0; layer < w.depth; ++layer) {
      const GemmaWeights& l = w.layers[layer];
      const float* shift = prepared->second.data + j * per_step + layer * per_layer;
      const DeviceQkv qkv = qkv_of(step.segments, step.rope, step.scratch.q, *step.cache, layer, w.heads);
      ok(expert_qkv(stream_, {.x = scaled,
                              .weight = l.qkv.data,
                              .w = *layout_of(l.qkv),
                              .rows = step.rows,
                              .squares = squares,
                              .shift = shift,
                              .qkv = qkv}),
         "expert qkv");
      ok(expert_attention(stream_, {.qkv = qkv,
                                    .segments = step.segments,
                                    .scale = 1.0f / std::sqrt(static_cast<float>(kExpertHeadDim)),
                                    .out = attended}),
         "expert attention");
      ExpertProduct into{.x = attended,
                         .weight = l.out.data,
                         .w = *layout_of(l.out),
                         .rows = step.rows,
                         .residual = residual,
                         .residual_pitch = step.x.pitch,
                         .gate = row_of(j, 2 * layer) + 2 * w.width,
                         .next_scale = row_of(j, 2 * layer + 1),
                         .scaled = scaled,
                         .next_squares = squares};
      ok(expert_out(stream_, into), "expert out");
      ok(expert_gate_up(stream_, {.x = scaled,
                                  .weight = l.gate_up.data,
                                  .w = *layout_of(l.gate_up),
                                  .rows = step.rows,
                                  .squares = squares,
                                  .shift = shift + kExpertQkv,
                                  .y = hidden}),
         "expert gate and up");
      into.x = hidden;
      into.weight = l.down.data;
      into.w = *layout_of(l.down);
      into.gate = row_of(j, 2 * layer + 1) + 2 * w.width;
      into.next_scale = layer + 1 < w.depth ? row_of(j, 2 * layer + 2) : nullptr;
      ok(expert_down(stream_, into), "expert down");
    }
  }
  edge.finish = true;
  edge.begin = false;
  edge.final_scale = row_of(op.first + op.steps - 1, 2 * w.depth);
  ok(expert_edge(stream_, edge), "action projections");
}

}  // namespace servoflow::ops::cuda
