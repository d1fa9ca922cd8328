#include "stages/prefix/prefix.h"

#include <cmath>

#include "core/status_macros.h"
#include "weights/manifest.h"

namespace servoflow::stages {

Result<Prefix> Prefix::load(weights::Loader& loader, const weights::Architecture& architecture) {
  Prefix p;
  p.sizes_ = architecture.prefix;
  for (int i = 0; i < p.sizes_.depth; ++i) {
    const std::string layer =
        "paligemma_with_expert.paligemma.model.language_model.layers." + std::to_string(i) + ".";
    const std::string attention = layer + "self_attn.";
    ops::GemmaWeights w;
    SF_ASSIGN_OR_RETURN(w.input_norm, loader.vector(layer + "input_layernorm.weight"));
    SF_ASSIGN_OR_RETURN(w.qkv, loader.matrix({attention + "q_proj.weight", attention + "k_proj.weight",
                                              attention + "v_proj.weight"},
                                             {.mode = ops::PackMode::kHeads, .head_dim = p.sizes_.head_dim}));
    if (i + 1 < p.sizes_.depth) {  // the last layer ends at its K/V: the rest of its weights is never read
      SF_ASSIGN_OR_RETURN(w.out, loader.matrix({attention + "o_proj.weight"}));
      SF_ASSIGN_OR_RETURN(w.post_norm, loader.vector(layer + "post_attention_layernorm.weight"));
      SF_ASSIGN_OR_RETURN(w.gate_up,
                          loader.matrix({layer + "mlp.gate_proj.weight", layer + "mlp.up_proj.weight"},
                                        {.mode = ops::PackMode::kInterleave}));
      SF_ASSIGN_OR_RETURN(w.down, loader.matrix({layer + "mlp.down_proj.weight"}));
    }
    p.layers_.push_back(w);
  }
  if (loader.backend().takes_raw_inputs()) {
    SF_ASSIGN_OR_RETURN(p.table_, loader.table(weights::kTokenTable));
  }
  return p;
}

void Prefix::embed(ops::Backend& backend, const PrefixRun& run) const {
  backend.scale_rows({.x = run.ids != nullptr ? table_ : run.text,
                      .y = run.x,
                      .rows = run.text_rows,
                      .scale = static_cast<float>(std::sqrt(static_cast<double>(sizes_.width))),
                      .row_map = run.text_map,
                      .ids = run.ids});
}

void Prefix::run(ops::Backend& backend, const PrefixRun& run) const {
  for (int i = 0; i < sizes_.depth; ++i) {
    const ops::GemmaWeights* weights = &layers_[static_cast<std::size_t>(i)];
    backend.gemma_layer({.weights = weights,
                         .x = run.x,
                         .rows = run.rows,
                         .segments = run.segments,
                         .cache = run.cache,
                         .layer = i,
                         .heads = sizes_.heads,
                         .rope = run.rope,
                         .only_cache = i + 1 == sizes_.depth,
                         .scratch = run.scratch,
                         .next = i + 1 < sizes_.depth ? weights + 1 : nullptr,
                         .normed = i > 0});
  }
}

}  // namespace servoflow::stages
