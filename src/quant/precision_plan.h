// Which linear layer runs in which format: an ordered list of rules over openpi's tensor names.
//
// A linear layer is named by its weight's tensor name without ".weight", for example
// "paligemma_with_expert.paligemma.model.language_model.layers.0.mlp.gate_proj".
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/json.h"
#include "quant/formats.h"
#include "servoflow/status.h"

namespace servoflow::quant {

struct Linear {
  std::string name;
  std::int64_t rows = 0, cols = 0;  // N, K
};

// `pattern` is a name, "re:" and an ECMAScript expression that matches from the name's start (as in
// compressed-tensors), or a glob in which * stands for any characters, dots included. A name beats an
// expression, an expression beats a glob; within a kind the first rule in the plan decides.
struct PlanRule {
  std::string pattern;
  LinearFormat format;
  bool operator==(const PlanRule&) const = default;
};

struct PrecisionPlan {
  std::string name;
  LinearFormat default_format;  // bf16
  std::vector<PlanRule> rules;
  std::map<std::string, std::string>
      provenance;  // who made it, from what; free text, part of the plan's JSON
  bool operator==(const PrecisionPlan&) const = default;

  // The format of each linear layer, in their order. Layers that carry little and matter much (is_protected)
  // keep the default unless a rule gives their whole name. Errors, all at once: a rule that matches no layer,
  // an expression that does not compile, a format that cannot hold its layer, a fused set whose members
  // differ.
  Result<std::vector<LinearFormat>> resolve(std::span<const Linear> linears) const;
};

// Action and time projections, embeddings and output heads, patch embedding, norms and their modulation.
bool is_protected(std::string_view linear_name);

// Sets that execution computes as one product, as indices into `linears`: {q, k, v} of an attention, {gate,
// up} of an MLP. Their formats must agree and NVFP4 shares one global scale over them.
std::vector<std::vector<std::size_t>> fused_sets(std::span<const Linear> linears);
std::vector<std::vector<std::size_t>> fused_sets(std::span<const std::string> names);

// {"precision_plan": 1, "name": …, "default": "bf16", "rules": [{"match": …, "format": …}], "provenance":
// {…}}.
Json to_json(const PrecisionPlan& plan);
// Strict: unknown keys and formats are errors, all reported at once. `where` starts each line.
Result<PrecisionPlan> plan_from_json(const Json& json, const std::string& where);
// The same document in TOML: `[[rules]]` with match and format.
Result<PrecisionPlan> plan_from_toml(std::string_view toml, const std::string& where);
// The text that a plan's hash is taken over: to_json without white space, keys sorted.
std::string canonical_text(const PrecisionPlan& plan);

// A recipe of recipes/*.toml by its name, or the path of a plan (.json, .toml).
Result<PrecisionPlan> load_plan(const std::string& name_or_path);
std::vector<std::string> builtin_plans();

}  // namespace servoflow::quant
