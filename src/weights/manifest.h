// Every tensor a pi0.5 network has, by openpi's name, with its shape: what a checkpoint must hold, and what
// it may hold.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "core/shape.h"
#include "weights/architecture.h"

namespace servoflow::weights {

// The token table [vocab, width]. Files may store it under either name; the manifest and WeightSource use the
// first.
inline constexpr char kTokenTable[] = "paligemma_with_expert.paligemma.lm_head.weight";
inline constexpr char kEmbedTokens[] =
    "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight";
// The expert's output head: stored by both published layouts, used by neither.
inline constexpr char kExpertHead[] = "paligemma_with_expert.gemma_expert.lm_head.weight";

inline constexpr char kVisionPrefix[] = "paligemma_with_expert.paligemma.model.vision_tower.vision_model.";
inline constexpr char kProjectorPrefix[] =
    "paligemma_with_expert.paligemma.model.multi_modal_projector.linear.";
inline constexpr char kLanguagePrefix[] = "paligemma_with_expert.paligemma.model.language_model.";
inline constexpr char kExpertPrefix[] = "paligemma_with_expert.gemma_expert.model.";

struct TensorSpec {
  std::string name;
  Shape shape;  // [out, in] for linear layers
};

// All tensors in the order vision, projector, token table, language model, expert, action and time
// projections; 811 at pi0.5 size. The architecture must have passed check_architecture.
std::vector<TensorSpec> manifest(const Architecture& architecture);
// Whether this is the weight of a linear layer, which a precision plan or a quantized checkpoint may name:
// rank 2, and no table of tokens or positions.
bool is_linear_weight(const TensorSpec& spec);
// Elements of all of them.
std::uint64_t parameter_count(const std::vector<TensorSpec>& tensors);
// Which part of the network a tensor belongs to: "vision", "projector", "token table", "language model",
// "expert", "action and time projections".
std::string_view component_of(std::string_view name);

}  // namespace servoflow::weights
