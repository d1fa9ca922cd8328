// The sizes of one network. Nothing in the engine is special-cased to a size: all of them come from here.
#pragma once

#include <string>
#include <vector>

#include "core/json.h"
#include "servoflow/status.h"

namespace servoflow::weights {

struct VisionSizes {
  int width = 0, depth = 0, heads = 0, mlp = 0, patch = 0, image = 0;
  int head_dim() const { return width / heads; }
  int tokens() const { return (image / patch) * (image / patch); }
};

struct GemmaSizes {
  int width = 0, depth = 0, mlp = 0, heads = 0, kv_heads = 0, head_dim = 0;
};

// How the times 1 = t0 > t1 > … of an N-step schedule are rounded.
enum class TimeGrid {
  kAccumulated,  // openpi: t += float32(-1/N)
  kRounded,      // lerobot: float32(1 + j * (-1/N))
};

// Limits of what is read from files; larger values are mistakes.
inline constexpr int kMaxActionDim = 4096, kMaxHorizon = 4096, kMaxTokens = 65536, kMaxSteps = 50;

struct Architecture {
  VisionSizes vision;
  GemmaSizes prefix, expert;
  int vocab = 0;
  int action_dim = 0;  // the model's own width, 32 for published checkpoints
  int horizon = 0;
  int max_tokens = 200;
  int default_steps = 10;
  double min_period = 4e-3, max_period = 4.0;
  TimeGrid time_grid = TimeGrid::kAccumulated;
  std::string tokenizer;  // file name beside config.json; may be empty
};

// The published variants by name: paligemma_variant "gemma_2b", action_expert_variant "gemma_300m", So400m/14
// vision.
Result<GemmaSizes> named_gemma(const std::string& variant);
VisionSizes so400m();
// Reads an `architecture` block; `where` starts error messages. Unknown keys are errors.
//   vision {width, depth, heads, mlp, patch, image}, prefix {width, depth, mlp, heads, kv_heads, head_dim,
//   vocab}, expert {width, depth, mlp, heads, kv_heads, head_dim}; optional: tokenizer (a file in the
//   directory), and what a layout's config.json cannot tell: action_dim, horizon, max_tokens, default_steps,
//   min_period, max_period, time_grid ("accumulated" | "rounded"). An absent action_dim or horizon stays 0.
Result<Architecture> architecture_from_json(const Json& block, const std::string& where);
// The same, collecting problems ("FILE: PREFIXfield: cause") instead of failing; `block` must be an object.
std::vector<std::string> read_architecture(const Json& block, const std::string& file,
                                           const std::string& prefix, Architecture& out);
// The block again. Optional keys appear where they differ from the defaults.
Json architecture_to_json(const Architecture& architecture);
// The sizes of pi0.5 as published, and those of the tiny test networks.
Architecture pi05_architecture();
Architecture tiny_architecture();
// "pi05", "tiny", or a .json file: an architecture block, or an object with one under `architecture`. An
// absent action_dim is 32, an absent horizon 50.
Result<Architecture> named_architecture(const std::string& model);
// Contradictions inside the sizes themselves (odd head_dim, image not a multiple of patch, zero or absurd
// sizes): all in one list, empty when there is none.
std::vector<std::string> check_architecture(const Architecture& architecture);

}  // namespace servoflow::weights
