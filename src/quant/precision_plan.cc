#include "quant/precision_plan.h"

#include <algorithm>
#include <array>
#include <map>
#include <optional>

#include "contract/json_fields.h"
#include "contract/problems.h"
#include "contract/toml_json.h"
#include "core/file.h"
#include "core/status_macros.h"
#include "quant/builtin_recipes.h"
#include "quant/patterns.h"

namespace servoflow::quant {
namespace {

using contract::JsonFields;
using contract::Problems;

constexpr std::size_t kMaxFileBytes = std::size_t{4} << 20;
constexpr int kVersion = 1;

// The last component of a dotted name, and what stands before it.
std::string_view last_part(std::string_view name) { return name.substr(name.rfind('.') + 1); }
std::string_view parent(std::string_view name) {
  const std::size_t dot = name.rfind('.');
  return dot == std::string_view::npos ? std::string_view() : name.substr(0, dot);
}

LinearFormat read_format(JsonFields& fields, const std::string& key,
                         const std::optional<std::string>& fallback) {
  const std::string text = fields.text(key, fallback);
  if (text.empty()) {
    if (fields.is_object()) fields.problems().add(fields.field(key), "names no format");
    return {};
  }
  Result<LinearFormat> format = parse_format(text);
  if (!format.ok()) {
    fields.problems().add(fields.field(key), format.status().message());
    return {};
  }
  return *format;
}

PrecisionPlan read_plan(const Json& json, Problems& problems) {
  PrecisionPlan plan;
  JsonFields root(json, "", problems);
  if (!root.is_object()) return plan;
  root.integer("precision_plan", kVersion, kVersion);
  plan.name = root.text("name");
  plan.default_format = read_format(root, "default", "bf16");
  if (plan.default_format.quantized())
    problems.add("default", "must be bf16 or fp32; formats of all layers are a rule with the match \"*\"");
  for (const Json* item : root.elements("rules", false)) {
    JsonFields rule(*item, "rules[" + std::to_string(plan.rules.size()) + "]", problems);
    PlanRule read;
    read.pattern = rule.text("match");
    if (rule.is_object()) {
      if (Result<NamePattern> pattern = NamePattern::compile(read.pattern, true); !pattern.ok())
        problems.add(rule.field("match"), pattern.status().message());
    }
    read.format = read_format(rule, "format", std::nullopt);
    rule.refuse_unknown();
    plan.rules.push_back(std::move(read));
  }
  if (const Json* provenance = root.get("provenance", false)) {
    JsonFields fields(*provenance, "provenance", problems);
    if (fields.is_object())
      for (const auto& [key, value] : provenance->items()) plan.provenance[key] = fields.text(key);
  }
  root.refuse_unknown();
  return plan;
}

}  // namespace

bool is_protected(std::string_view name) {
  const std::string_view last = last_part(name);
  for (const std::string_view part : {"action_in_proj", "action_out_proj", "state_proj", "time_mlp_in",
                                      "time_mlp_out", "action_time_mlp_in", "action_time_mlp_out", "lm_head",
                                      "embed_tokens", "patch_embedding", "position_embedding"})
    if (last == part) return true;
  // AdaRMS modulation ("input_layernorm.dense") and whatever else lies inside a norm.
  for (std::string_view rest = name; !rest.empty(); rest = parent(rest))
    if (last_part(rest).find("norm") != std::string_view::npos) return true;
  return false;
}

std::vector<std::vector<std::size_t>> fused_sets(std::span<const std::string> names) {
  struct Kind {
    std::array<std::string_view, 3> parts;
    std::size_t count;
  };
  constexpr std::array<Kind, 2> kKinds = {
      {{{"q_proj", "k_proj", "v_proj"}, 3}, {{"gate_proj", "up_proj", ""}, 2}}};
  std::map<std::pair<std::string, std::size_t>, std::vector<std::size_t>> found;
  for (std::size_t i = 0; i < names.size(); ++i)
    for (std::size_t kind = 0; kind < kKinds.size(); ++kind)
      for (std::size_t part = 0; part < kKinds[kind].count; ++part)
        if (last_part(names[i]) == kKinds[kind].parts[part])
          found[{std::string(parent(names[i])), kind}].push_back(i);
  std::vector<std::vector<std::size_t>> sets;
  for (auto& [key, members] : found)
    if (members.size() > 1) sets.push_back(std::move(members));
  std::sort(sets.begin(), sets.end());
  return sets;
}

std::vector<std::vector<std::size_t>> fused_sets(std::span<const Linear> linears) {
  std::vector<std::string> names;
  names.reserve(linears.size());
  for (const Linear& linear : linears) names.push_back(linear.name);
  return fused_sets(std::span<const std::string>(names));
}

Result<std::vector<LinearFormat>> PrecisionPlan::resolve(std::span<const Linear> linears) const {
  Problems problems("precision plan \"" + name + "\"");
  std::vector<NamePattern> patterns;
  for (std::size_t r = 0; r < rules.size(); ++r) {
    Result<NamePattern> pattern = NamePattern::compile(rules[r].pattern, true);
    if (!pattern.ok()) {
      problems.add("rules[" + std::to_string(r) + "].match", pattern.status().message());
    } else {
      patterns.push_back(std::move(*pattern));
    }
    if (Status status = validate(rules[r].format); !status.ok())
      problems.add("rules[" + std::to_string(r) + "].format", status.message());
  }
  SF_RETURN_IF_ERROR(problems.status());

  std::vector<LinearFormat> formats(linears.size(), default_format);
  std::vector<bool> used(rules.size(), false);
  for (std::size_t i = 0; i < linears.size(); ++i) {
    const bool guarded = is_protected(linears[i].name);
    std::optional<std::size_t> chosen;
    for (std::size_t r = 0; r < rules.size(); ++r) {
      if (guarded && patterns[r].kind() != NamePattern::Kind::kExact) continue;
      if (!patterns[r].matches(linears[i].name)) continue;
      used[r] = true;
      if (!chosen || patterns[r].kind() < patterns[*chosen].kind()) chosen = r;
    }
    if (!chosen) continue;
    formats[i] = rules[*chosen].format;
    if (linears[i].rows <= 0 || linears[i].cols <= 0)
      problems.add(linears[i].name, "its shape is not that of a matrix");
  }
  for (std::size_t r = 0; r < rules.size(); ++r) {
    if (used[r]) continue;
    std::string hint = patterns[r].kind() == NamePattern::Kind::kExact
                           ? "no layer has this name"
                           : "matches no layer that it may change";
    if (rules[r].pattern.ends_with(".weight")) hint += "; layers are named without \".weight\"";
    problems.add("rules[" + std::to_string(r) + "].match", "\"" + rules[r].pattern + "\" " + hint);
  }
  for (const std::vector<std::size_t>& set : fused_sets(linears)) {
    for (const std::size_t i : set)
      if (formats[i] != formats[set.front()]) {
        problems.add(linears[i].name, "is " + quant::name(formats[i]) + " and " + linears[set.front()].name +
                                          " is " + quant::name(formats[set.front()]) +
                                          "; they are computed as one product and need one format");
        break;
      }
  }
  SF_RETURN_IF_ERROR(problems.status());
  return formats;
}

Json to_json(const PrecisionPlan& plan) {
  Json rules = Json::array();
  for (const PlanRule& rule : plan.rules)
    rules.push_back({{"match", rule.pattern}, {"format", name(rule.format)}});
  Json json = {{"precision_plan", kVersion},
               {"name", plan.name},
               {"default", name(plan.default_format)},
               {"rules", std::move(rules)}};
  if (!plan.provenance.empty()) json["provenance"] = plan.provenance;
  return json;
}

std::string canonical_text(const PrecisionPlan& plan) {
  // Bytes that are no UTF-8 can only come from a plan made in code; they must not throw.
  return to_json(plan).dump(-1, ' ', false, Json::error_handler_t::replace);
}

Result<PrecisionPlan> plan_from_json(const Json& json, const std::string& where) {
  Problems problems(where);
  PrecisionPlan plan = read_plan(json, problems);
  SF_RETURN_IF_ERROR(problems.status());
  return plan;
}

Result<PrecisionPlan> plan_from_toml(std::string_view toml, const std::string& where) {
  if (toml.size() > kMaxFileBytes)
    return Status::invalid(where + ": larger than 4 MiB; not a precision plan");
  Problems problems(where);
  SF_ASSIGN_OR_RETURN(const Json json, contract::parse_toml(toml, where, problems));
  PrecisionPlan plan = read_plan(json, problems);
  SF_RETURN_IF_ERROR(problems.status());
  return plan;
}

std::vector<std::string> builtin_plans() {
  std::vector<std::string> names;
  for (const BuiltinRecipe& recipe : builtin_recipes()) names.emplace_back(recipe.name);
  std::sort(names.begin(), names.end());
  return names;
}

Result<PrecisionPlan> load_plan(const std::string& name_or_path) {
  for (const BuiltinRecipe& recipe : builtin_recipes())
    if (recipe.name == name_or_path) return plan_from_toml(recipe.toml, "recipe " + name_or_path);
  const bool toml = name_or_path.ends_with(".toml"), json = name_or_path.ends_with(".json");
  if (!toml && !json)
    return Status::invalid("precision: unknown recipe \"" + name_or_path + "\"; built in: " +
                           contract::join(builtin_plans()) + "; or pass the path of a plan (….toml, ….json)");
  SF_ASSIGN_OR_RETURN(const std::string text, read_text_file(name_or_path, kMaxFileBytes));
  if (toml) return plan_from_toml(text, name_or_path);
  SF_ASSIGN_OR_RETURN(const Json document, parse_json(text, name_or_path));
  return plan_from_json(document, name_or_path);
}

}  // namespace servoflow::quant
