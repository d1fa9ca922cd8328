#include "weights/architecture.h"

#include <cmath>
#include <map>

#include "core/status_macros.h"
#include "weights/fields.h"

namespace servoflow::weights {
namespace {

constexpr int kPi05Vocab = 257152;  // rows of PaliGemma's token table
constexpr int kMaxWidth = 65536, kMaxMlp = 1 << 20, kMaxDepth = 1024, kMaxHeads = 1024, kMaxHeadDim = 4096;
constexpr int kMaxPatch = 1024, kMaxImage = 8192, kMaxVocab = 1 << 24;
constexpr double kMaxPeriod = 1e9;

const std::map<std::string, GemmaSizes>& gemma_variants() {
  static const std::map<std::string, GemmaSizes> variants = {
      {"gemma_2b", {.width = 2048, .depth = 18, .mlp = 16384, .heads = 8, .kv_heads = 1, .head_dim = 256}},
      {"gemma_300m", {.width = 1024, .depth = 18, .mlp = 4096, .heads = 8, .kv_heads = 1, .head_dim = 256}}};
  return variants;
}

void read_gemma(const Json* block, const std::string& file, const std::string& prefix, bool with_vocab,
                Architecture& out, GemmaSizes& sizes, std::vector<std::string>& problems) {
  if (block == nullptr) return;
  Fields fields(*block, file, prefix, problems);
  fields.integer("width", sizes.width, 1, kMaxWidth);
  fields.integer("depth", sizes.depth, 1, kMaxDepth);
  fields.integer("mlp", sizes.mlp, 1, kMaxMlp);
  fields.integer("heads", sizes.heads, 1, kMaxHeads);
  fields.integer("kv_heads", sizes.kv_heads, 1, kMaxHeads);
  fields.integer("head_dim", sizes.head_dim, 1, kMaxHeadDim);
  if (with_vocab) fields.integer("vocab", out.vocab, 1, kMaxVocab);
  fields.refuse_unread();
}

Json gemma_to_json(const GemmaSizes& g) {
  return {{"width", g.width}, {"depth", g.depth},       {"mlp", g.mlp},
          {"heads", g.heads}, {"kv_heads", g.kv_heads}, {"head_dim", g.head_dim}};
}

}  // namespace

Result<GemmaSizes> named_gemma(const std::string& variant) {
  const auto it = gemma_variants().find(variant);
  if (it != gemma_variants().end()) return it->second;
  std::string known;
  for (const auto& [name, sizes] : gemma_variants()) known += (known.empty() ? "" : ", ") + name;
  std::string message = "unknown variant \"" + printable(variant) + "\"; known: " + known;
  if (variant.ends_with("_lora")) {
    message += ". Merge the LoRA weights into the base tensors first";
  } else {
    message += ". Other sizes need an `architecture` block";
  }
  return Status::invalid(message);
}

VisionSizes so400m() {
  return {.width = 1152, .depth = 27, .heads = 16, .mlp = 4304, .patch = 14, .image = 224};
}

std::vector<std::string> read_architecture(const Json& block, const std::string& file,
                                           const std::string& prefix, Architecture& out) {
  std::vector<std::string> problems;
  Fields fields(block, file, prefix, problems);
  if (const Json* vision = fields.object("vision")) {
    Fields v(*vision, file, prefix + "vision.", problems);
    v.integer("width", out.vision.width, 1, kMaxWidth);
    v.integer("depth", out.vision.depth, 1, kMaxDepth);
    v.integer("heads", out.vision.heads, 1, kMaxHeads);
    v.integer("mlp", out.vision.mlp, 1, kMaxMlp);
    v.integer("patch", out.vision.patch, 1, kMaxPatch);
    v.integer("image", out.vision.image, 1, kMaxImage);
    v.refuse_unread();
  }
  read_gemma(fields.object("prefix"), file, prefix + "prefix.", true, out, out.prefix, problems);
  read_gemma(fields.object("expert"), file, prefix + "expert.", false, out, out.expert, problems);
  fields.text("tokenizer", out.tokenizer, false);
  if (!out.tokenizer.empty() && !stays_inside(out.tokenizer))
    fields.problem("tokenizer",
                   "\"" + printable(out.tokenizer) + "\" must be a file inside the checkpoint directory");
  fields.integer("action_dim", out.action_dim, 1, kMaxActionDim, false);
  fields.integer("horizon", out.horizon, 1, kMaxHorizon, false);
  fields.integer("max_tokens", out.max_tokens, 1, kMaxTokens, false);
  fields.integer("default_steps", out.default_steps, 1, kMaxSteps, false);
  fields.number("min_period", out.min_period, 1e-9, kMaxPeriod, false);
  fields.number("max_period", out.max_period, 1e-9, kMaxPeriod, false);
  if (std::string grid; fields.text("time_grid", grid, false)) {
    if (grid == "accumulated") {
      out.time_grid = TimeGrid::kAccumulated;
    } else if (grid == "rounded") {
      out.time_grid = TimeGrid::kRounded;
    } else {
      fields.problem("time_grid",
                     "expected \"accumulated\" or \"rounded\", found \"" + printable(grid) + "\"");
    }
  }
  fields.refuse_unread();
  return problems;
}

Result<Architecture> architecture_from_json(const Json& block, const std::string& where) {
  if (!block.is_object()) return Status::invalid(where + ": expected an object, found " + shown(block));
  Architecture out;
  std::vector<std::string> problems = read_architecture(block, where, "", out);
  if (problems.empty()) {
    // These two may be told elsewhere; a block without them is complete.
    Architecture sizes = out;
    if (sizes.action_dim == 0) sizes.action_dim = 1;
    if (sizes.horizon == 0) sizes.horizon = 1;
    for (const std::string& problem : check_architecture(sizes)) problems.push_back(where + ": " + problem);
  }
  if (problems.empty()) return out;
  std::string message;
  for (const std::string& problem : problems) message += (message.empty() ? "" : "\n") + problem;
  return Status::invalid(message);
}

Json architecture_to_json(const Architecture& a) {
  const Architecture standard;
  Json out;
  out["vision"] = {{"width", a.vision.width}, {"depth", a.vision.depth}, {"heads", a.vision.heads},
                   {"mlp", a.vision.mlp},     {"patch", a.vision.patch}, {"image", a.vision.image}};
  out["prefix"] = gemma_to_json(a.prefix);
  out["prefix"]["vocab"] = a.vocab;
  out["expert"] = gemma_to_json(a.expert);
  if (!a.tokenizer.empty()) out["tokenizer"] = a.tokenizer;
  if (a.action_dim != 0) out["action_dim"] = a.action_dim;
  if (a.horizon != 0) out["horizon"] = a.horizon;
  if (a.max_tokens != standard.max_tokens) out["max_tokens"] = a.max_tokens;
  if (a.default_steps != standard.default_steps) out["default_steps"] = a.default_steps;
  if (a.min_period != standard.min_period) out["min_period"] = a.min_period;
  if (a.max_period != standard.max_period) out["max_period"] = a.max_period;
  if (a.time_grid != standard.time_grid) out["time_grid"] = "rounded";
  return out;
}

Architecture pi05_architecture() {
  Architecture out;
  out.vision = so400m();
  out.prefix = gemma_variants().at("gemma_2b");
  out.expert = gemma_variants().at("gemma_300m");
  out.vocab = kPi05Vocab;
  out.action_dim = 32;
  out.horizon = 50;
  return out;
}

Architecture tiny_architecture() {
  Architecture out;
  out.vision = {.width = 48, .depth = 3, .heads = 3, .mlp = 100, .patch = 14, .image = 224};
  out.prefix = {.width = 64, .depth = 4, .mlp = 160, .heads = 4, .kv_heads = 1, .head_dim = 32};
  out.expert = {.width = 40, .depth = 4, .mlp = 96, .heads = 4, .kv_heads = 1, .head_dim = 32};
  out.vocab = 1024;
  out.action_dim = 32;
  out.horizon = 10;
  return out;
}

Result<Architecture> named_architecture(const std::string& model) {
  if (model == "pi05") return pi05_architecture();
  if (model == "tiny") return tiny_architecture();
  if (!model.ends_with(".json"))
    return Status::invalid("unknown model \"" + printable(model) +
                           "\"; expected pi05, tiny, or a .json file with an architecture block");
  SF_ASSIGN_OR_RETURN(const Json file, read_json_file(model, std::size_t{1} << 20));
  Architecture out;
  if (file.is_object() && file.contains("architecture")) {
    SF_ASSIGN_OR_RETURN(out, architecture_from_json(file["architecture"], model + ": architecture"));
  } else {
    SF_ASSIGN_OR_RETURN(out, architecture_from_json(file, model));
  }
  if (out.action_dim == 0) out.action_dim = 32;
  if (out.horizon == 0) out.horizon = 50;
  return out;
}

std::vector<std::string> check_architecture(const Architecture& a) {
  std::vector<std::string> problems;
  const auto within = [&](const char* field, std::int64_t value, std::int64_t high) {
    if (value >= 1 && value <= high) return;
    problems.push_back(std::string(field) + ": " + std::to_string(value) + " is not in 1 … " +
                       std::to_string(high));
  };
  const auto require = [&](bool holds, const std::string& what) {
    if (!holds) problems.push_back(what);
  };
  within("vision.width", a.vision.width, kMaxWidth);
  within("vision.depth", a.vision.depth, kMaxDepth);
  within("vision.heads", a.vision.heads, kMaxHeads);
  within("vision.mlp", a.vision.mlp, kMaxMlp);
  within("vision.patch", a.vision.patch, kMaxPatch);
  within("vision.image", a.vision.image, kMaxImage);
  for (const auto& [name, g] :
       {std::pair<std::string, const GemmaSizes&>{"prefix", a.prefix}, {"expert", a.expert}}) {
    within((name + ".width").c_str(), g.width, kMaxWidth);
    within((name + ".depth").c_str(), g.depth, kMaxDepth);
    within((name + ".mlp").c_str(), g.mlp, kMaxMlp);
    within((name + ".heads").c_str(), g.heads, kMaxHeads);
    within((name + ".kv_heads").c_str(), g.kv_heads, kMaxHeads);
    within((name + ".head_dim").c_str(), g.head_dim, kMaxHeadDim);
  }
  within("prefix.vocab", a.vocab, kMaxVocab);
  within("action_dim", a.action_dim, kMaxActionDim);
  within("horizon", a.horizon, kMaxHorizon);
  within("max_tokens", a.max_tokens, kMaxTokens);
  within("default_steps", a.default_steps, kMaxSteps);
  require(a.min_period > 0 && a.min_period < a.max_period && a.max_period <= kMaxPeriod,
          "min_period: must be positive and below max_period");
  if (!problems.empty()) return problems;  // what follows divides by the sizes above

  const auto number = [](int value) { return std::to_string(value); };
  require(a.vision.width % a.vision.heads == 0, "vision.heads: " + number(a.vision.heads) +
                                                    " heads do not divide vision.width " +
                                                    number(a.vision.width));
  require(a.vision.image % a.vision.patch == 0, "vision.image: " + number(a.vision.image) +
                                                    " is not a multiple of vision.patch " +
                                                    number(a.vision.patch));
  require(a.prefix.head_dim % 2 == 0, "prefix.head_dim: " + number(a.prefix.head_dim) +
                                          " is odd; rotary positions turn pairs of elements");
  require(a.prefix.heads % a.prefix.kv_heads == 0, "prefix.kv_heads: " + number(a.prefix.kv_heads) +
                                                       " does not divide prefix.heads " +
                                                       number(a.prefix.heads));
  require(a.expert.width % 2 == 0, "expert.width: " + number(a.expert.width) +
                                       " is odd; the time embedding has a sine and a cosine half");
  // The expert attends to the prefix's keys and values, layer by layer and head by head.
  const auto same = [&](const char* field, int prefix, int expert) {
    require(prefix == expert, std::string("expert.") + field + ": " + number(expert) +
                                  " differs from prefix." + field + " " + number(prefix));
  };
  same("depth", a.prefix.depth, a.expert.depth);
  same("heads", a.prefix.heads, a.expert.heads);
  same("kv_heads", a.prefix.kv_heads, a.expert.kv_heads);
  same("head_dim", a.prefix.head_dim, a.expert.head_dim);
  return problems;
}

}  // namespace servoflow::weights
