#include "weights/manifest.h"

#include <algorithm>

namespace servoflow::weights {
namespace {

class List {
 public:
  void add(std::string name, Shape shape) { tensors.push_back({std::move(name), shape}); }
  void linear(const std::string& name, int out, int in) {
    add(name + ".weight", {out, in});
    add(name + ".bias", {out});
  }
  void norm(const std::string& name, int width) {
    add(name + ".weight", {width});
    add(name + ".bias", {width});
  }
  std::vector<TensorSpec> tensors;
};

void add_vision(const VisionSizes& v, List& list) {
  const std::string base = kVisionPrefix;
  list.add(base + "embeddings.patch_embedding.weight", {v.width, 3, v.patch, v.patch});
  list.add(base + "embeddings.patch_embedding.bias", {v.width});
  list.add(base + "embeddings.position_embedding.weight", {v.tokens(), v.width});
  for (int i = 0; i < v.depth; ++i) {
    const std::string layer = base + "encoder.layers." + std::to_string(i) + ".";
    for (const char* part : {"q_proj", "k_proj", "v_proj", "out_proj"})
      list.linear(layer + "self_attn." + part, v.width, v.width);
    list.norm(layer + "layer_norm1", v.width);
    list.norm(layer + "layer_norm2", v.width);
    list.linear(layer + "mlp.fc1", v.mlp, v.width);
    list.linear(layer + "mlp.fc2", v.width, v.mlp);
  }
  list.norm(base + "post_layernorm", v.width);
}

// `adaptive`: norms are AdaRMS, their scale, shift and gate come from a dense layer on the time condition.
void add_gemma(const std::string& base, const GemmaSizes& g, bool adaptive, List& list) {
  const auto norm = [&](const std::string& name) {
    if (adaptive) {
      list.linear(name + ".dense", 3 * g.width, g.width);
    } else {
      list.add(name + ".weight", {g.width});
    }
  };
  for (int i = 0; i < g.depth; ++i) {
    const std::string layer = base + "layers." + std::to_string(i) + ".";
    list.add(layer + "self_attn.q_proj.weight", {g.heads * g.head_dim, g.width});
    list.add(layer + "self_attn.k_proj.weight", {g.kv_heads * g.head_dim, g.width});
    list.add(layer + "self_attn.v_proj.weight", {g.kv_heads * g.head_dim, g.width});
    list.add(layer + "self_attn.o_proj.weight", {g.width, g.heads * g.head_dim});
    list.add(layer + "mlp.gate_proj.weight", {g.mlp, g.width});
    list.add(layer + "mlp.up_proj.weight", {g.mlp, g.width});
    list.add(layer + "mlp.down_proj.weight", {g.width, g.mlp});
    norm(layer + "input_layernorm");
    norm(layer + "post_attention_layernorm");
  }
  norm(base + "norm");
}

}  // namespace

std::vector<TensorSpec> manifest(const Architecture& a) {
  List list;
  add_vision(a.vision, list);
  list.add(std::string(kProjectorPrefix) + "weight", {a.prefix.width, a.vision.width});
  list.add(std::string(kProjectorPrefix) + "bias", {a.prefix.width});
  list.add(kTokenTable, {a.vocab, a.prefix.width});
  add_gemma(kLanguagePrefix, a.prefix, false, list);
  add_gemma(kExpertPrefix, a.expert, true, list);
  list.linear("action_in_proj", a.expert.width, a.action_dim);
  list.linear("action_out_proj", a.action_dim, a.expert.width);
  list.linear("time_mlp_in", a.expert.width, a.expert.width);
  list.linear("time_mlp_out", a.expert.width, a.expert.width);
  return std::move(list.tensors);
}

std::uint64_t parameter_count(const std::vector<TensorSpec>& tensors) {
  std::uint64_t total = 0;
  for (const TensorSpec& t : tensors) total += static_cast<std::uint64_t>(t.shape.elements());
  return total;
}

bool is_linear_weight(const TensorSpec& spec) {
  const bool table = spec.name == kTokenTable || spec.name.ends_with("position_embedding.weight");
  return !table && spec.shape.rank() == 2 && spec.name.ends_with(".weight");
}

std::string_view component_of(std::string_view name) {
  if (name == kTokenTable || name == kEmbedTokens) return "token table";
  if (name.starts_with(kVisionPrefix)) return "vision";
  if (name.starts_with(kProjectorPrefix)) return "projector";
  if (name.starts_with(kLanguagePrefix)) return "language model";
  if (name.starts_with(kExpertPrefix)) return "expert";
  return "action and time projections";
}

}  // namespace servoflow::weights
