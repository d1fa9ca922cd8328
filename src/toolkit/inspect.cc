#include "toolkit/inspect.h"

#include <fmt/format.h>

#include <algorithm>

#include "contract/action_labels.h"
#include "contract/canonical.h"
#include "contract/load.h"
#include "contract/statistics.h"
#include "contract/toml_robot.h"

namespace servoflow::toolkit {
namespace {

using weights::Layout;

// The contract if one is chosen, else why there is none. A robot that was asked for must load.
void read_contract(const std::string& checkpoint, const InspectOptions& options, InspectReport& out) {
  const Layout layout = out.weights.layout.value_or(Layout::kOpenpi);
  if (layout == Layout::kOpenpi) out.assets = contract::list_assets(checkpoint);
  Result<contract::Contract> loaded =
      contract::load_contract(checkpoint, {options.robot, options.assets, layout == Layout::kLerobot});
  if (loaded.ok()) {
    out.contract_hash = contract::contract_hash(*loaded);
    out.contract = std::move(*loaded);
  } else if (!options.robot.empty()) {
    out.problems.push_back(loaded.status().message());
  } else {
    out.notes.push_back(loaded.status().message());
  }
}

void scan(const std::string& checkpoint, const InspectOptions& options, InspectReport& out) {
  const Result<weights::Checkpoint> opened = weights::open_checkpoint(checkpoint);
  if (!opened.ok()) return out.notes.push_back("weights were not scanned: the checkpoint does not open");
  Result<std::vector<weights::NonFinite>> found = weights::scan_weights(*opened, options.scanning);
  if (!found.ok()) return out.problems.push_back(found.status().message());
  for (const weights::NonFinite& f : *found)
    out.problems.push_back(fmt::format("{}: {}: {} NaN and {} infinite values, the first at element {}",
                                       checkpoint, f.name, f.nans, f.infinities, f.first_index));
  out.scan = std::move(*found);
}

double stored_size(const weights::Inspection& w) {
  std::uint64_t bytes = 0, parameters = 0;
  for (const weights::TensorCount& c : w.components)
    if (c.what == "token table") bytes = c.bytes, parameters = c.parameters;
  return parameters > 0 ? static_cast<double>(bytes) / static_cast<double>(parameters) : 2;
}

std::string camera_text(const contract::CameraSlot& c) {
  return c.slot + (c.key.empty() ? " (always masked)" : " = " + c.key + (c.required ? "" : " (optional)"));
}

std::string transforms_text(const std::vector<contract::Transform>& transforms) {
  std::string out;
  for (const contract::Transform& t : transforms) out += (out.empty() ? "" : ", ") + t.name;
  return out.empty() ? "none" : out;
}

std::string columns_text(const contract::Actions& actions) {
  std::string out;
  for (int i = 0; i < actions.width; ++i)
    out += (i > 0 ? ", " : "") +
           contract::label_text(contract::action_name(actions, i), contract::action_unit(actions, i));
  return out;
}

std::string norm_text(const contract::Normalization& n) {
  return n.kind == contract::NormKind::kIdentity   ? "identity"
         : n.kind == contract::NormKind::kQuantile ? "quantile"
                                                   : "mean/std";
}

std::string statistics_rows(const char* what, const contract::Normalization& n) {
  const contract::Statistics& s = n.stats;
  const std::size_t rows = std::max({s.mean.size(), s.std.size(), s.q01.size(), s.q99.size()});
  const auto cell = [](const std::vector<double>& v, std::size_t i) {
    return i < v.size() ? fmt::format("{:.5g}", v[i]) : "-";
  };
  std::string out = fmt::format("  {:<10}{:>12}{:>12}{:>12}{:>12}   ({})\n", what, "q01", "q99", "mean",
                                "std", norm_text(n));
  for (std::size_t i = 0; i < rows; ++i)
    out += fmt::format("  {:<10}{:>12}{:>12}{:>12}{:>12}\n", i, cell(s.q01, i), cell(s.q99, i),
                       cell(s.mean, i), cell(s.std, i));
  return out;
}

std::string contract_text(const contract::Contract& c, const std::string& hash) {
  std::string cameras, state;
  for (const contract::CameraSlot& camera : c.cameras)
    cameras += (cameras.empty() ? "" : "\n              ") + camera_text(camera);
  int width = 0;
  for (const contract::StatePart& part : c.state_parts) {
    state += (state.empty() ? "" : " + ") + part.key + "[" + std::to_string(part.width) + "]";
    width += part.width;
  }
  std::string out = fmt::format("\nrobot         {}\n  contract    sha256 {}\n", c.name, hash);
  if (!c.asset.empty()) out += fmt::format("  statistics  {}\n", c.asset);
  out += fmt::format("  cameras     {}\n  state       {} numbers: {}; transforms: {}\n", cameras, width,
                     state, transforms_text(c.state_transforms));
  out += fmt::format("  prompt      {}{}, at most {} tokens\n", c.prompt.key,
                     c.prompt.mode == contract::PromptMode::kState ? ", with the state in it" : "",
                     c.prompt.max_tokens);
  out += fmt::format("  actions     {} columns; transforms: {}\n",
                     c.actions.width > 0 ? std::to_string(c.actions.width) : "all",
                     transforms_text(c.actions.transforms));
  if (!c.actions.names.empty() || !c.actions.units.empty())
    out += fmt::format("              {}\n", columns_text(c.actions));
  return out + statistics_rows("state", c.state_norm) + statistics_rows("action", c.action_norm);
}

std::string architecture_text(const weights::Architecture& a, const std::string& from) {
  const auto& v = a.vision;
  const auto gemma = [](const weights::GemmaSizes& g) {
    return fmt::format("width {}, {} layers, {} query / {} KV heads of {}, MLP {}", g.width, g.depth, g.heads,
                       g.kv_heads, g.head_dim, g.mlp);
  };
  return fmt::format("network       pi0.5; sizes from the {}\n", from) +
         fmt::format(
             "  vision      width {}, {} blocks, {} heads of {}, MLP {}; {} px in patches of {}: {} tokens a "
             "picture\n",
             v.width, v.depth, v.heads, v.head_dim(), v.mlp, v.image, v.patch, v.tokens()) +
         fmt::format("  prefix      {}, {} tokens known\n  expert      {}\n", gemma(a.prefix), a.vocab,
                     gemma(a.expert)) +
         fmt::format(
             "  actions     horizon {}, {} dimensions, {} denoise steps; prompts of at most {} tokens\n",
             a.horizon, a.action_dim, a.default_steps, a.max_tokens);
}

Json text_or_null(const std::string& text) { return text.empty() ? Json(nullptr) : Json(text); }

// What the linear layers are stored in; nothing for a checkpoint in floating point.
std::string quantization_text(const weights::Inspection& w) {
  if (w.quantization.empty()) return "";
  std::string out =
      fmt::format("\nquantization  {}; what the checkpoint's config gives each part\n", w.quantization);
  out += fmt::format("  {:<30}{:<22}{:>7}{:>16}{:>11}   {}\n", "linear layers", "precision", "layers",
                     "parameters", "stored", "group");
  for (const weights::StoredPrecision& p : w.precisions)
    out += fmt::format("  {:<30}{:<22}{:>7}{:>16}{:>11}   {}\n", p.component, p.precision, p.layers,
                       p.parameters, bytes_text(static_cast<double>(p.bytes)),
                       p.group.empty()       ? "none: in floating point"
                       : p.group == p.layout ? p.group
                                             : p.group + ", " + p.layout);
  return out;
}

Json stored_precisions_to_json(const std::vector<weights::StoredPrecision>& precisions) {
  Json out = Json::array();
  for (const weights::StoredPrecision& p : precisions)
    out.push_back({{"component", p.component},
                   {"precision", p.precision},
                   {"group", text_or_null(p.group)},
                   {"layout", text_or_null(p.layout)},
                   {"layers", p.layers},
                   {"parameters", p.parameters},
                   {"bytes", p.bytes}});
  return out;
}

Json counts_to_json(const std::vector<weights::TensorCount>& counts) {
  Json out = Json::array();
  for (const weights::TensorCount& c : counts)
    out.push_back(
        {{"what", c.what}, {"tensors", c.tensors}, {"parameters", c.parameters}, {"bytes", c.bytes}});
  return out;
}

}  // namespace

InspectReport inspect(const std::string& checkpoint, const InspectOptions& options) {
  InspectReport out;
  out.weights = weights::inspect_checkpoint(checkpoint);
  out.problems = out.weights.problems;
  if (out.weights.layout || !options.robot.empty()) read_contract(checkpoint, options, out);

  const std::string named = out.weights.architecture ? out.weights.architecture->tokenizer : "";
  const Result<std::string> tokenizer = weights::find_tokenizer(checkpoint, named, options.tokenizer);
  if (tokenizer.ok())
    out.tokenizer = *tokenizer;
  else
    (options.tokenizer.empty() ? out.notes : out.problems).push_back(tokenizer.status().message());

  if (out.weights.architecture)
    out.memory =
        plan_memory(*out.weights.architecture,
                    std::max<int>(3, out.contract ? static_cast<int>(out.contract->cameras.size()) : 0),
                    stored_size(out.weights));
  if (options.scan) scan(checkpoint, options, out);
  return out;
}

Status inspect_outcome(const InspectReport& report) {
  if (report.problems.empty()) return {};
  return Status::invalid(
      report.weights.path + ": " + std::to_string(report.problems.size()) +
      (report.problems.size() == 1 ? " problem, listed above" : " problems, listed above"));
}

std::string inspect_text(const InspectReport& r) {
  const weights::Inspection& w = r.weights;
  std::string out = fmt::format("checkpoint    {}\n", w.path);
  out += fmt::format("layout        {}; {} weight file(s), {} tensors, {}\n",
                     w.layout ? weights::layout_name(*w.layout) : "unknown", w.files.size(), w.stored_tensors,
                     bytes_text(static_cast<double>(w.stored_bytes)));
  if (w.architecture) out += architecture_text(*w.architecture, w.sizes_from);
  if (!w.components.empty()) {
    out += fmt::format("\n{:<32}{:>9}{:>16}{:>11}\n", "weights", "tensors", "parameters", "stored");
    const auto row = [&](const weights::TensorCount& c) {
      out += fmt::format("  {:<30}{:>9}{:>16}{:>11}\n", c.what, c.tensors, c.parameters,
                         bytes_text(static_cast<double>(c.bytes)));
    };
    for (const weights::TensorCount& c : w.components) row(c);
    for (const weights::TensorCount& c : w.dtypes)
      row({"all in " + c.what, c.tensors, c.parameters, c.bytes});
    out += fmt::format("  token table read from {}\n", w.token_table);
    for (const weights::IgnoredTensor& i : w.ignored)
      out += fmt::format("  ignored: {} ({})\n", i.name, i.reason);
  }
  out += quantization_text(w);
  if (r.contract) out += contract_text(*r.contract, r.contract_hash);
  out += fmt::format("\ntokenizer     {}\n", r.tokenizer.empty() ? "none found" : r.tokenizer);
  if (!r.memory.empty()) {
    out += fmt::format("\n{:<14}{:>11}{:>11}{:>11}   token table (mapped from the file)\n", "memory",
                       "weights", "workspace", "total");
    for (const MemoryPlan& p : r.memory)
      out += fmt::format(
          "  {:<12}{:>11}{:>11}{:>11}   {}{}\n", p.precision, bytes_text(static_cast<double>(p.weights)),
          bytes_text(static_cast<double>(p.workspace)), bytes_text(static_cast<double>(p.total())),
          bytes_text(static_cast<double>(p.token_table)),
          p.unavailable.empty() ? "" : "   not here: " + p.unavailable);
  }
  if (r.scan)
    out += fmt::format("\nscan          every value read; {}\n",
                       r.scan->empty() ? "all are finite" : "not all are finite");
  for (const std::string& note : r.notes) out += fmt::format("\nnote: {}\n", note);
  if (r.problems.empty()) return out + "\nno problems\n";
  out += fmt::format("\n{} problem(s):\n", r.problems.size());
  for (const std::string& problem : r.problems) out += "  - " + problem + "\n";
  return out;
}

Json inspect_to_json(const InspectReport& r) {
  const weights::Inspection& w = r.weights;
  Json ignored = Json::array(), scan = nullptr;
  for (const weights::IgnoredTensor& i : w.ignored)
    ignored.push_back({{"name", i.name}, {"reason", i.reason}});
  if (r.scan) {
    scan = Json::array();
    for (const weights::NonFinite& f : *r.scan)
      scan.push_back(
          {{"name", f.name}, {"nans", f.nans}, {"infinities", f.infinities}, {"first_index", f.first_index}});
  }
  return {{"checkpoint", w.path},
          {"layout", w.layout ? Json(weights::layout_name(*w.layout)) : Json(nullptr)},
          {"architecture", w.architecture ? weights::architecture_to_json(*w.architecture) : Json(nullptr)},
          {"horizon", w.architecture ? Json(w.architecture->horizon) : Json(nullptr)},
          {"action_dim", w.architecture ? Json(w.architecture->action_dim) : Json(nullptr)},
          {"sizes_from", text_or_null(w.sizes_from)},
          {"files", w.files},
          {"stored_tensors", w.stored_tensors},
          {"stored_bytes", w.stored_bytes},
          {"dtypes", counts_to_json(w.dtypes)},
          {"components", counts_to_json(w.components)},
          {"parameters", w.parameters},
          {"quantization", text_or_null(w.quantization)},
          {"precisions", stored_precisions_to_json(w.precisions)},
          {"token_table", text_or_null(w.token_table)},
          {"ignored", std::move(ignored)},
          {"unused_config", w.unused_config},
          {"contract", r.contract ? contract::contract_to_json(*r.contract) : Json(nullptr)},
          {"contract_hash", text_or_null(r.contract_hash)},
          {"assets", r.assets},
          {"robots", contract::list_builtin_robots()},
          {"tokenizer", text_or_null(r.tokenizer)},
          {"memory", memory_to_json(r.memory)},
          {"scan", std::move(scan)},
          {"notes", r.notes},
          {"problems", r.problems}};
}

}  // namespace servoflow::toolkit
