// What the operations of ops.h, and the blocks made of them, become on the GPU: which kernel takes each.
#include <algorithm>
#include <cmath>

#include "ops/composite/composite.h"
#include "ops/cuda/cuda_backend.cuh"

namespace servoflow::ops::cuda {
namespace {

DeviceModulation modulation_of(const ModulationRow& m) {
  return {m.table + m.base * m.step_pitch + static_cast<std::int64_t>(m.site) * 3 * m.width, m.step_pitch,
          m.row_offset};
}

}  // namespace

const WeightLayout* CudaBackend::layout_of(const Weight& w) {
  const auto found = layouts_.find(w.data);
  if (found != layouts_.end()) return &found->second;
  fail(Status::runtime("cuda: a weight that this backend did not pack"));
  return nullptr;
}

Product CudaBackend::product_of(const Matrix& x, const Count& rows, const Weight& w) {
  Product p{.x = x, .rows = rows, .weight = w.data};
  if (const WeightLayout* layout = layout_of(w)) p.w = *layout;
  return p;
}

DeviceEpilogue CudaBackend::epilogue_of(const Epilogue& e, const Matrix& y) const {
  DeviceEpilogue out{.y = y.data,
                     .pitch = y.pitch,
                     .f32 = y.dtype == DType::kF32,
                     .n = y.cols,
                     .bias = e.bias,
                     .activation = e.activation,
                     .row_bias = e.row_bias,
                     .row_bias_period = std::max(1, e.row_bias_period),
                     .accumulate = e.accumulate,
                     .row_map = e.row_map};
  if (e.gate != nullptr) {
    const DeviceModulation m = modulation_of(*e.gate);
    out.gate = m.scale + 2 * e.gate->width;
    out.gate_pitch = m.step_pitch;
    out.gate_row = m.row_offset;
  }
  return out;
}

DeviceQkv CudaBackend::qkv_of(const Segments& segments, const RopeTable* rope, void* q, const KvCache& cache,
                              int layer, int heads) const {
  const std::uint64_t side = cache_bytes(cache) / 2 / static_cast<std::uint64_t>(cache.layers);
  char* k = static_cast<char*>(cache.data) + 2 * static_cast<std::uint64_t>(layer) * side;
  return {.q = q,
          .k = k,
          .v = k + side,
          .f32 = cache.dtype == DType::kF32,
          .heads = heads,
          .kv_heads = cache.kv_heads,
          .head_dim = cache.head_dim,
          .keys = cache.keys,
          .cos = rope != nullptr ? rope->cos : nullptr,
          .sin = rope != nullptr ? rope->sin : nullptr,
          .segments = segments.device,
          .segment_count = segments.count};
}

// Scratch memory of at least `bytes`; grown while nothing is recorded, never given back.
void* CudaBackend::scratch(Scratch& memory, std::uint64_t bytes) {
  if (bytes > memory.bytes && !failed()) {
    const Result<void*> fresh = allocate(bytes);
    if (!fresh.ok()) {
      fail(fresh.status());
      return nullptr;
    }
    memory = {*fresh, bytes};
  }
  return memory.data;
}

void CudaBackend::run_product(const Product& op, const Count& rows) {
  if (failed()) return;
  const bool aligned = op.x.dtype == DType::kBF16 && op.x.pitch % 8 == 0;
  if (wgmma_ && wgmma_takes(op)) {
    ok(product_wgmma(stream_, op, rows.likely > 0 ? rows.likely : rows.capacity), "matmul");
  } else if (op.w.tensor_core && aligned) {
    ok(product_mma(stream_, op), "matmul");
  } else {
    ok(product_plain(stream_, op), "matmul");
  }
}

void CudaBackend::product_into_rows(Product op, const Matrix& x, const Count& rows, const NextNorm& norm) {
  if (failed()) return;
  FinishRows end{.x = x, .rows = rows, .norm = norm};
  if (wgmma_ && wgmma_takes(op)) {
    if (const int splits = wgmma_splits(op.w.n, op.w.k); splits > 1) {
      const std::int64_t pitch = static_cast<std::int64_t>(rows.capacity) * op.w.n;
      op.splits = splits;
      op.split_pitch = pitch;
      op.partials = static_cast<float*>(
          scratch(partials_[lane_], static_cast<std::uint64_t>(pitch * splits) * sizeof(float)));
      end.partials = op.partials;
      end.splits = splits;
      end.split_pitch = pitch;
      end.epilogue = op.epilogue;
    }
  }
  run_product(op, rows);
  if (!failed() && (end.splits > 0 || norm.kind != NextNorm::kNone)) ok(finish_rows(stream_, end), "norm");
}

void CudaBackend::do_patch_rows(const PatchRows& op) { ok(cuda::patch_rows(stream_, op), "patch_rows"); }
void CudaBackend::do_scale_rows(const ScaleRows& op) { ok(cuda::scale_rows(stream_, op), "scale_rows"); }
void CudaBackend::do_time_embedding(const TimeEmbedding& op) {
  ok(cuda::time_embedding(stream_, op), "time_embedding");
}
void CudaBackend::do_euler_step(const EulerStep& op) { ok(cuda::euler_step(stream_, op), "euler_step"); }

void CudaBackend::do_matmul(const Matmul& op) {
  select();
  Product p = product_of(op.x, op.rows, *op.w);
  if (p.w.tensor_core && p.x.dtype == DType::kF32) {  // its input is rounded to what the tensor cores take
    p.x.dtype = DType::kBF16;
    p.x.pitch = pitch(p.x.cols, DType::kBF16);
    p.x.data = scratch(rounded_[lane_], static_cast<std::uint64_t>(op.rows.capacity * p.x.pitch) * 2);
    if (failed()) return;
    ok(round_rows(stream_, op.x, p.x, op.rows), "rounding");
  }
  p.epilogue = epilogue_of(op.epilogue, op.y);
  p.geglu = op.epilogue.geglu;
  if (op.epilogue.accumulate && op.epilogue.row_map == nullptr && op.epilogue.row_bias == nullptr) {
    product_into_rows(p, op.y, op.rows, {});
  } else {
    run_product(p, op.rows);
  }
}

void CudaBackend::do_layer_norm(const LayerNorm& op) {
  ok(finish_rows(
         stream_,
         {.x = op.x,
          .rows = op.rows,
          .norm =
              {.kind = NextNorm::kLayer, .weight = op.weight, .bias = op.bias, .eps = op.eps, .y = op.y}}),
     "layer_norm");
}

void CudaBackend::do_rms_norm(const RmsNorm& op) {
  NextNorm norm{.kind = NextNorm::kRms, .weight = op.weight, .eps = op.eps, .y = op.y};
  if (op.modulation != nullptr) {
    norm.kind = NextNorm::kModulated;
    norm.modulation = modulation_of(*op.modulation);
  }
  ok(finish_rows(stream_, {.x = op.x, .rows = op.rows, .norm = norm}), "rms_norm");
}

void CudaBackend::do_split_qkv(const SplitQkv& op) {
  const DeviceQkv out = qkv_of(op.segments, op.rope, op.q, *op.cache, op.layer, op.heads);
  // Which rows there are is the segments' to say; each row finds its own.
  ok(cuda::split_qkv(stream_, op.qkv, out, {.capacity = op.qkv.rows}), "split_qkv");
}

void CudaBackend::do_attention(const Attention& op) {
  const DeviceQkv at = qkv_of(op.segments, nullptr, nullptr, *op.cache, op.layer, op.heads);
  const DeviceAttention a{.q = op.q,
                          .k = at.k,
                          .v = at.v,
                          .f32 = at.f32,
                          .heads = at.heads,
                          .kv_heads = at.kv_heads,
                          .head_dim = at.head_dim,
                          .keys = at.keys,
                          .slots = op.cache->slots,
                          .segments = op.segments,
                          .scale = op.scale,
                          .out = op.out};
  const auto run = wgmma_ && attention_wide_takes(a)           ? attention_wide
                   : wgmma_ && attention_picture_takes(a)      ? attention_picture
                   : !a.f32 && attention_mma_takes(a.head_dim) ? attention_mma
                                                               : attention_plain;
  ok(run(stream_, a), "attention");
}

// The blocks below are their compositions with neighbouring steps joined: q, k, v go straight to where the
// attention reads them, and what ends a product begins the next norm.

void CudaBackend::siglip_block(const SiglipBlock& op) {
  const SiglipWeights& w = *op.weights;
  const WeightLayout* qkv = layout_of(w.qkv);
  if (qkv == nullptr || qkv->order != RowOrder::kRotated) return ops::siglip_block(*this, op);
  select();
  const BlockScratch& s = op.scratch;
  if (!op.normed)
    layer_norm({.x = op.x, .y = s.normed, .rows = op.rows, .weight = w.norm1_weight, .bias = w.norm1_bias});
  Product in = product_of(s.normed, op.rows, w.qkv);
  in.to_qkv = true;
  in.qkv = qkv_of(op.segments, nullptr, s.q, *op.cache, 0, op.heads);
  in.qkv.bias = w.qkv_bias;
  run_product(in, op.rows);
  attention({.q = s.q,
             .heads = op.heads,
             .cache = op.cache,
             .segments = op.segments,
             .scale = 1.0f / std::sqrt(static_cast<float>(op.cache->head_dim)),
             .out = s.attended});
  Product out = product_of(s.attended, op.rows, w.out);
  out.epilogue = epilogue_of({.bias = w.out_bias, .accumulate = true}, op.x);
  product_into_rows(
      out, op.x, op.rows,
      {.kind = NextNorm::kLayer, .weight = w.norm2_weight, .bias = w.norm2_bias, .y = s.normed});
  matmul({.x = s.normed,
          .w = &w.fc1,
          .y = s.hidden,
          .rows = op.rows,
          .epilogue = {.bias = w.fc1_bias, .activation = Activation::kGeluTanh}});
  if (failed()) return;
  Product fc2 = product_of(s.hidden, op.rows, w.fc2);
  fc2.epilogue = epilogue_of({.bias = w.fc2_bias, .accumulate = true}, op.x);
  NextNorm behind;
  if (op.next != nullptr)
    behind = {.kind = NextNorm::kLayer,
              .weight = op.next->norm1_weight,
              .bias = op.next->norm1_bias,
              .y = s.normed};
  product_into_rows(fc2, op.x, op.rows, behind);
}

// The two halves of a Gemma layer. `normed` holds the layer's normalised input when it begins, and `next` is
// the norm that the layer behind it begins with.
void CudaBackend::attend(const GemmaWeights& w, const Matrix& x, const Count& rows, const Segments& segments,
                         const KvCache& cache, int layer, int heads, const RopeTable* rope,
                         const ModulationRow* gate, const NextNorm& next, const BlockScratch& s,
                         bool only_cache) {
  Product in = product_of(s.normed, rows, w.qkv);
  in.to_qkv = true;
  in.qkv = qkv_of(segments, rope, s.q, cache, layer, heads);
  run_product(in, rows);
  if (only_cache) return;
  attention({.q = s.q,
             .heads = heads,
             .cache = &cache,
             .layer = layer,
             .segments = segments,
             .scale = 1.0f / std::sqrt(static_cast<float>(cache.head_dim)),
             .out = s.attended});
  Product out = product_of(s.attended, rows, w.out);
  out.epilogue = epilogue_of({.gate = gate, .accumulate = true}, x);
  product_into_rows(out, x, rows, next);
}

void CudaBackend::gated_mlp(const GemmaWeights& w, const Matrix& x, const Count& rows,
                            const ModulationRow* gate, const NextNorm& next, const BlockScratch& s) {
  matmul({.x = s.normed, .w = &w.gate_up, .y = s.hidden, .rows = rows, .epilogue = {.geglu = true}});
  if (failed()) return;
  Product down = product_of(s.hidden, rows, w.down);
  down.epilogue = epilogue_of({.gate = gate, .accumulate = true}, x);
  product_into_rows(down, x, rows, next);
}

void CudaBackend::gemma_layer(const GemmaLayer& op) {
  const GemmaWeights& w = *op.weights;
  const WeightLayout* qkv = layout_of(w.qkv);
  if (qkv == nullptr || qkv->order != RowOrder::kRotated) return ops::gemma_layer(*this, op);
  select();
  const BlockScratch& s = op.scratch;
  if (!op.normed) rms_norm({.x = op.x, .y = s.normed, .rows = op.rows, .weight = w.input_norm});
  attend(w, op.x, op.rows, op.segments, *op.cache, op.layer, op.heads, op.rope, nullptr,
         {.kind = NextNorm::kRms, .weight = w.post_norm, .y = s.normed}, s, op.only_cache);
  if (op.only_cache) return;
  NextNorm behind;
  if (op.next != nullptr) behind = {.kind = NextNorm::kRms, .weight = op.next->input_norm, .y = s.normed};
  gated_mlp(w, op.x, op.rows, nullptr, behind, s);
}

void CudaBackend::expert_step(const ExpertStep& op) {
  const ExpertWeights& w = *op.weights;
  for (int layer = 0; layer < w.depth; ++layer) {
    const WeightLayout* qkv = layout_of(w.layers[layer].qkv);
    if (qkv == nullptr || qkv->order != RowOrder::kRotated) return ops::expert_step(*this, op);
  }
  select();
  const BlockScratch& s = op.scratch;
  ModulationRow at = op.modulation;
  const auto norm_of = [&](int site, const Matrix& y) {
    at.site = site;
    return NextNorm{.kind = NextNorm::kModulated, .modulation = modulation_of(at), .y = y};
  };
  matmul({.x = op.actions,
          .w = &w.action_in,
          .y = op.x,
          .rows = op.rows,
          .epilogue = {.bias = w.action_in_bias}});
  at.site = 0;
  rms_norm({.x = op.x, .y = s.normed, .rows = op.rows, .modulation = &at});
  for (int layer = 0; layer < w.depth; ++layer) {
    ModulationRow attention_gate = op.modulation, mlp_gate = op.modulation;
    attention_gate.site = 2 * layer;
    mlp_gate.site = 2 * layer + 1;
    attend(w.layers[layer], op.x, op.rows, op.segments, *op.cache, layer, w.heads, op.rope, &attention_gate,
           norm_of(2 * layer + 1, s.normed), s, false);
    gated_mlp(w.layers[layer], op.x, op.rows, &mlp_gate,
              norm_of(2 * layer + 2, layer + 1 < w.depth ? s.normed : op.final_normed), s);
  }
  matmul({.x = op.final_normed,
          .w = &w.action_out,
          .y = op.velocity,
          .rows = op.rows,
          .epilogue = {.bias = w.action_out_bias}});
}

}  // namespace servoflow::ops::cuda
