#include "toolkit/compare_tensors.h"

#include <algorithm>
#include <optional>
#include <utility>

namespace servoflow::toolkit {
namespace {

constexpr int kRows = 64;  // of one tensor that are kept per case, evenly spread

// "….layers.3.self_attn.q_proj.weight ….k_proj.weight ….v_proj.weight" -> "….layers.3.self_attn.{q,k,v}_proj"
// read well.
std::string short_name(const std::string& weights) {
  std::string first = weights.substr(0, weights.find(' '));
  if (first.ends_with(".weight")) first.resize(first.size() - 7);
  const std::pair<const char*, const char*> long_parts[] = {
      {"paligemma_with_expert.paligemma.model.vision_tower.vision_model.encoder.", "vision."},
      {"paligemma_with_expert.paligemma.model.multi_modal_projector.linear", "projector"},
      {"paligemma_with_expert.paligemma.model.language_model.", "prefix."},
      {"paligemma_with_expert.gemma_expert.model.", "expert."}};
  for (const auto& [from, to] : long_parts)
    if (first.starts_with(from)) {
      first = to + first.substr(std::string(from).size());
      break;
    }
  const auto ends = [&](const std::string& tail, const std::string& instead) {
    if (first.ends_with(tail)) first = first.substr(0, first.size() - tail.size()) + instead;
  };
  if (weights.find(' ') != std::string::npos) {
    ends("q_proj", "qkv");
    ends("gate_proj", "gate_up");
  }
  return first;
}

}  // namespace

Kept thin(std::span<const float> values, const Shape& shape) {
  const std::int64_t rows = shape.rank() > 1 ? shape[0] : 1;
  const std::int64_t cols = rows > 0 ? shape.elements() / rows : 0;
  Kept out{.rows = static_cast<int>(std::min<std::int64_t>(rows, kRows)), .cols = static_cast<int>(cols)};
  for (int i = 0; i < out.rows; ++i) {
    const auto row =
        values.subspan(static_cast<std::size_t>(i * rows / out.rows * cols), static_cast<std::size_t>(cols));
    out.values.insert(out.values.end(), row.begin(), row.end());
  }
  return out;
}

std::string stage_group(const std::string& stage) {
  const std::optional<StageName> name = parse_stage_name(stage);
  return name ? name->group : std::string();
}

Status Comparison::add(const KeepingTap& a, const KeepingTap& b, const std::string& case_name) {
  if (a.all.size() != b.all.size())
    return Status::invalid(case_name + ": A shows " + std::to_string(a.all.size()) + " tensors, B " +
                           std::to_string(b.all.size()) + ": the two are not the same network");
  for (std::size_t i = 0; i < a.all.size(); ++i) {
    const auto &x = a.all[i], &y = b.all[i];
    if (x.name != y.name || x.step != y.step || x.kept.rows != y.kept.rows || x.kept.cols != y.kept.cols)
      return Status::invalid(case_name + ": " + x.name + " of A faces " + y.name +
                             " of B: the two are not the same network");
    add(x, y.kept, case_name);
  }
  return {};
}

void Comparison::finish() {
  const ComparedTensor* last = nullptr;
  for (std::size_t i = 0; i < report_.tensors.size(); ++i) {
    ComparedTensor& t = report_.tensors[i];
    const Alive& alive = alive_[i];
    t.channels = static_cast<int>(alive.a.size());
    for (std::size_t c = 0; c < alive.a.size(); ++c) t.dead += alive.a[c] && !alive.b[c];
    if (last != nullptr && last->total.relative() > 0) t.growth = t.total.relative() / last->total.relative();
    last = &t;
  }
}

void Comparison::add(const KeepingTap::One& x, const Kept& y, const std::string& case_name) {
  const std::string name =
      x.input ? (x.step >= 0 ? "step" + std::to_string(x.step) + "/" : std::string()) + short_name(x.name)
              : x.name;
  const auto [it, fresh] = index_.try_emplace(name, report_.tensors.size());
  if (fresh) {
    const std::optional<StageName> stage = x.input ? std::nullopt : parse_stage_name(x.name);
    report_.tensors.push_back(
        {.name = name, .group = x.input ? "input" : stage_group(x.name), .step = x.input ? x.step : -1});
    if (stage && (stage->group == "velocity" || stage->group == "x"))
      report_.tensors.back().step = stage->index;
    alive_.push_back({});
  }
  ComparedTensor& t = report_.tensors[it->second];
  Alive& alive = alive_[it->second];
  const auto cols = static_cast<std::size_t>(x.kept.cols);
  alive.a.resize(std::max(alive.a.size(), cols));
  alive.b.resize(alive.a.size());
  Difference d;
  for (std::size_t i = 0; i < x.kept.values.size(); ++i) {
    const float a = x.kept.values[i], b = y.values[i];
    d.add(static_cast<double>(a), static_cast<double>(b));
    if (a != 0) alive.a[i % cols] = true;
    if (b != 0) alive.b[i % cols] = true;
  }
  if (const double c = d.cosine(); t.worst_case.empty() || c < t.worst_cosine) {
    t.worst_cosine = c;
    t.worst_case = case_name;
  }
  t.total.add(d);
}

}  // namespace servoflow::toolkit
