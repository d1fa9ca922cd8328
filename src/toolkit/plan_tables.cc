#include "toolkit/plan_tables.h"

#include <fmt/format.h>

#include "core/status_macros.h"
#include "weights/manifest.h"

namespace servoflow::toolkit {
namespace {

std::string ms(double x) { return x >= 100 ? fmt::format("{:.0f}", x) : fmt::format("{:.2f}", x); }
std::string g3(double x) { return fmt::format("{:.3g}", x); }
std::string g4(double x) { return fmt::format("{:.4g}", x); }

// Joules of a whole inference and of one action in it, at the power limit.
std::string energy(const PlanContext& c, double average_ms, int horizon) {
  if (c.device.power_w <= 0) return "-";
  return fmt::format("{:.3g}", c.device.power_w * average_ms / 1e3 / horizon);
}

PlanCase with_work(const PlanCase& base, const WorkShape& work) {
  PlanCase out = base;
  for (WorkShape& r : out.requests) r = work;
  for (WorkShape& r : out.requests) r.batch = 1;
  return out;
}

std::string change_text(const TargetOption& o) {
  std::string out;
  for (const std::string& change : o.changes) out += (out.empty() ? "" : ", ") + change;
  return out.empty() ? "nothing" : out;
}

std::vector<PlanPrecision> usable(const PlanContext& c) {
  std::vector<PlanPrecision> out;
  for (const PlanPrecision& p : plan_precisions())
    if (has_arithmetic(c.rates, p)) out.push_back(p);
  return out;
}

}  // namespace

HtmlTable work_table(const PlanContext& c) {
  HtmlTable out{.caption = "Work of one inference: parameters that are read, and operations",
                .header = {"component", "parameters, M", "GFLOP", "BF16 GB", "8-bit GB", "4-bit GB"}};
  const PlanWork w = count_components(c.base.architecture, c.base.requests);
  const double steps = c.base.requests[0].steps;
  const auto row = [&](const std::string& name, std::uint64_t weights, double flops) {
    const double n = static_cast<double>(weights);
    out.rows.push_back({name, fmt::format("{:.1f}", n / 1e6), g4(flops / 1e9),
                        fmt::format("{:.3f}", n * 2e-9), fmt::format("{:.3f}", n * 1e-9),
                        fmt::format("{:.3f}", n * 0.5625e-9)});
  };
  for (const StageParts* s : {&w.vision, &w.prefix, &w.step}) {
    const std::string of = s == &w.step ? ", one step" : "";
    for (const ComponentWork& part : s->components)
      row("- " + part.name + of, part.weights, part.products + part.attention);
    row(s == &w.step ? "a denoise step" : s->name, s->weights(), s->products() + s->attention());
  }
  row("modulations, once per schedule", w.modulation_weights, 0);
  row(fmt::format("all, {} steps", steps), w.vision.weights() + w.prefix.weights() + w.step.weights(),
      w.vision.products() + w.vision.attention() + w.prefix.products() + w.prefix.attention() +
          steps * (w.step.products() + w.step.attention()));
  return out;
}

HtmlTable stage_table(const PlanContext& c, const Prediction& p) {
  HtmlTable out{.caption = fmt::format("Latency by stage, ms, {} on {}", p.precision, c.device.title),
                .header = {"stage", "GFLOP", "GB", "floor", "arithmetic", "memory", "latency", "predicted",
                           "bound by"}};
  for (const StagePrediction* s : {&p.vision, &p.prefix, &p.denoise})
    out.rows.push_back({s->name, g4(s->gflop), fmt::format("{:.3f}", s->weight_gb + s->cache_gb),
                        ms(s->floor_ms), ms(s->compute_ms), ms(s->memory_ms), ms(s->latency_ms), ms(s->ms),
                        s->bound});
  out.rows.push_back({"host", "", "", "", "", "", "", ms(p.host_ms), ""});
  out.rows.push_back({"all", "", "", ms(p.floor_ms), "", "", "", ms(p.ms), ""});
  return out;
}

Result<HtmlTable> precision_table(const PlanContext& c) {
  HtmlTable out{.caption = fmt::format(
                    "Precisions on {}{}", c.device.title,
                    c.device.power_w > 0
                        ? fmt::format("; energy at its limit of {:.0f} W, so at most", c.device.power_w)
                        : ""),
                .header = {"precision", "vision", "prefix", "denoise", "ms", "floor", "Hz", "weights, GB",
                           "in all, GB", "J per action", "what"}};
  for (const PlanPrecision& precision : usable(c)) {
    PlanCase plan = c.base;
    plan.precision = precision.name;
    SF_ASSIGN_OR_RETURN(const Prediction p, predict(plan, c.device, c.rates));
    SF_ASSIGN_OR_RETURN(const PlanMemory memory,
                        predict_memory(plan.architecture, precision, static_cast<int>(plan.requests.size()),
                                       std::max(1, plan.requests[0].views)));
    const double total = memory.total(c.device.kind == "gpu") / 1e9;
    out.rows.push_back({precision.name, ms(p.vision.ms), ms(p.prefix.ms), ms(p.denoise.ms), ms(p.average_ms),
                        ms(p.floor_ms), g3(p.hz), fmt::format("{:.2f}", memory.weights / 1e9),
                        fmt::format("{:.2f}{}", total, total > c.device.memory_gb ? " (too much)" : ""),
                        energy(c, p.average_ms, plan.requests[0].horizon), precision.about});
  }
  return out;
}

Result<HtmlTable> sequence_table(const PlanContext& c) {
  HtmlTable out{.caption = "Views, prompt tokens and horizon: ms",
                .header = {"views / tokens", "rows", "horizon 10", "horizon 25", "horizon 50"}};
  for (const int views : {1, 2, 3})
    for (const int tokens : {48, 100, 200}) {
      std::vector<std::string> row = {fmt::format("{} / {}", views, tokens),
                                      std::to_string(views * c.base.architecture.vision.tokens() + tokens)};
      for (const int horizon : {10, 25, 50}) {
        WorkShape work = c.base.requests[0];
        work.views = views;
        work.tokens = tokens;
        work.horizon = horizon;
        SF_ASSIGN_OR_RETURN(const Prediction p, predict(with_work(c.base, work), c.device, c.rates));
        row.push_back(ms(p.average_ms));
      }
      out.rows.push_back(std::move(row));
    }
  return out;
}

Result<HtmlTable> steps_table(const PlanContext& c) {
  HtmlTable out{
      .caption = "Denoise steps and reuse of the prefix: inferences a second, on average",
      .header = {"steps", "prefix each time", "every 2nd", "every 3rd", "every 4th", "ms, prefix each time"}};
  for (const int steps : {10, 8, 5, 4, 3, 2, 1}) {
    WorkShape work = c.base.requests[0];
    work.steps = steps;
    PlanCase plan = with_work(c.base, work);
    std::vector<std::string> row = {std::to_string(steps)};
    double once = 0;
    for (plan.reuse = 1; plan.reuse <= 4; ++plan.reuse) {
      SF_ASSIGN_OR_RETURN(const Prediction p, predict(plan, c.device, c.rates));
      if (plan.reuse == 1) once = p.ms;
      row.push_back(g3(p.hz));
    }
    row.push_back(ms(once));
    out.rows.push_back(std::move(row));
  }
  return out;
}

Result<HtmlTable> batch_table(const PlanContext& c) {
  HtmlTable out{.caption = "Requests computed together",
                .header = {"requests", "ms", "ms per request", "requests a second", "in all, GB"}};
  SF_ASSIGN_OR_RETURN(const PlanPrecision precision, plan_precision(c.base.precision));
  for (const int batch : {1, 2, 4, 8, 16}) {
    PlanCase plan = c.base;
    plan.requests.assign(static_cast<std::size_t>(batch), c.base.requests[0]);
    SF_ASSIGN_OR_RETURN(const Prediction p, predict(plan, c.device, c.rates));
    SF_ASSIGN_OR_RETURN(const PlanMemory memory, predict_memory(plan.architecture, precision, batch,
                                                                std::max(1, plan.requests[0].views)));
    out.rows.push_back({std::to_string(batch), ms(p.average_ms), ms(p.average_ms / batch), g3(batch * p.hz),
                        fmt::format("{:.2f}", memory.total(c.device.kind == "gpu") / 1e9)});
  }
  return out;
}

Result<HtmlTable> student_table(const PlanContext& c) {
  HtmlTable out{.caption = "Students: fewer layers and narrower prefix and expert, to be trained",
                .header = {"layers / width", "parameters, M", "prefix, ms", "denoise, ms", "ms", "Hz"}};
  const int depth = c.base.architecture.prefix.depth;
  for (const double width : {1.0, 0.75, 0.5})
    for (const int layers : {depth, depth * 2 / 3, depth / 2, depth / 3}) {
      PlanCase plan = c.base;
      plan.architecture = student_of(c.base.architecture, layers, width);
      if (layers < 1 || !weights::check_architecture(plan.architecture).empty()) continue;
      SF_ASSIGN_OR_RETURN(const Prediction p, predict(plan, c.device, c.rates));
      out.rows.push_back({fmt::format("{} / {:g}", layers, width),
                          fmt::format("{:.0f}", static_cast<double>(weights::parameter_count(
                                                    weights::manifest(plan.architecture))) /
                                                    1e6),
                          ms(p.prefix.ms), ms(p.denoise.ms), ms(p.average_ms), g3(p.hz)});
    }
  return out;
}

HtmlTable target_table(const PlanContext& c, const TargetResult& target) {
  HtmlTable out{.caption = fmt::format("Ways to {:g} Hz, in order of what they risk", target.hz),
                .header = {"change", "risk", "ms", "Hz", "reaches it", "J per action"}};
  const auto row = [&](const std::string& what, const TargetOption& o) {
    out.rows.push_back({what + change_text(o), std::to_string(o.risk), ms(o.prediction.average_ms),
                        g3(o.prediction.hz), o.prediction.hz >= target.hz ? "yes" : "no",
                        energy(c, o.prediction.average_ms, o.plan.requests[0].horizon)});
  };
  row(target.reached ? "smallest: " : "the most there is: ", target.smallest);
  for (const TargetOption& o : target.by_lever) row("alone: ", o);
  return out;
}

std::string target_sentence(const PlanContext& c, const TargetResult& t) {
  if (!t.reached)
    return fmt::format("{:g} Hz on {} is out of reach: the fastest of all plans ({}) gives {:.3g} Hz.", t.hz,
                       c.device.title, change_text(t.smallest), t.smallest.prediction.hz);
  if (t.smallest.changes.empty())
    return fmt::format("{:g} Hz on {} is reached as it is: {:.3g} Hz.", t.hz, c.device.title,
                       t.smallest.prediction.hz);
  return fmt::format("The smallest change that reaches {:g} Hz on {}: {} ({:.3g} Hz).", t.hz, c.device.title,
                     change_text(t.smallest), t.smallest.prediction.hz);
}

Json target_to_json(const TargetResult& t) {
  const auto option = [](const TargetOption& o) {
    return Json{{"changes", o.changes}, {"risk", o.risk}, {"prediction", prediction_to_json(o.prediction)}};
  };
  Json alone = Json::array();
  for (const TargetOption& o : t.by_lever) alone.push_back(option(o));
  return {{"hz", t.hz},
          {"reached", t.reached},
          {"smallest", option(t.smallest)},
          {"each_alone", std::move(alone)}};
}

HtmlTable accuracy_table(const Accuracy& a) {
  HtmlTable out{.caption = "Predicted and measured, end to end",
                .header = {"result", "device", "work", "floor", "measured", "predicted", "error, %", "note"}};
  for (const AccuracyRow& r : a.rows) {
    if (r.left_out.empty())
      out.rows.push_back({r.file, r.device, r.work, ms(r.floor_ms), ms(r.measured_ms), ms(r.predicted_ms),
                          fmt::format("{:+.1f}", 100 * r.error()),
                          r.fitted      ? "fitted on this"
                          : r.same_work ? "the fitted work again, not counted"
                                        : r.precision});
    else
      out.rows.push_back(
          {r.file, r.device, r.work, "-", ms(r.measured_ms), "-", "-", "left out: " + r.left_out});
  }
  out.rows.push_back({"mean of the absolute errors", "", "", "", "", "", fmt::format("{:.1f}", 100 * a.mape),
                      fmt::format("{} results of other work", a.predicted)});
  return out;
}

HtmlTable accuracy_stage_table(const Accuracy& a) {
  HtmlTable out{.caption = "The same by stage, measured / predicted",
                .header = {"result", "vision", "prefix", "denoise"}};
  for (const AccuracyRow& r : a.rows) {
    if (!r.left_out.empty()) continue;
    std::vector<std::string> row = {r.file};
    for (int s = 0; s < 3; ++s)
      row.push_back(fmt::format("{} / {} ({:+.0f} %)", ms(r.stage_measured[s]), ms(r.stage_predicted[s]),
                                100 * (r.stage_predicted[s] / r.stage_measured[s] - 1)));
    out.rows.push_back(std::move(row));
  }
  return out;
}

HtmlTable memory_accuracy_table(const Accuracy& a) {
  HtmlTable out{.caption = "Memory of the policy, GB: weights, workspace and, on a GPU, the token table",
                .header = {"result", "measured", "predicted", "error, %"}};
  for (const AccuracyRow& r : a.rows)
    if (r.left_out.empty() && r.measured_gb > 0)
      out.rows.push_back({r.file, fmt::format("{:.2f}", r.measured_gb), fmt::format("{:.2f}", r.predicted_gb),
                          fmt::format("{:+.1f}", 100 * (r.predicted_gb / r.measured_gb - 1))});
  return out;
}

HtmlTable published_table(const Published& p) {
  HtmlTable out{
      .caption = "What others published for their engines, beside the floor and this engine's prediction, ms",
      .header = {"device", "engine", "precision", "published", "floor", "published / floor",
                 "predicted, servoflow", "source"}};
  for (const PublishedFigure& f : p.figures)
    out.rows.push_back({f.device, f.engine, f.precision, ms(f.ms), ms(f.prediction.floor_ms),
                        fmt::format("{:.1f}", f.ms / f.prediction.floor_ms), ms(f.prediction.ms), f.source});
  return out;
}

HtmlTable thor_table(const Published& p) {
  HtmlTable out{.caption = "The original effort on Jetson Thor, BF16, term by term",
                .header = {"term", "measured, ms", "GB", "implies GB/s", "at 273 GB/s, ms", "at 230", "at 55",
                           "GFLOP", "implies TFLOP/s", "arithmetic at the datasheet's rate, ms"}};
  for (const ThorTerm& t : p.thor) {
    if (t.weight_gb <= 0)
      out.rows.push_back({t.name, ms(t.measured_ms), "-", "-", "-", "-", "-", "-", "-", "-"});
    else
      out.rows.push_back({t.name, ms(t.measured_ms), fmt::format("{:.2f}", t.weight_gb),
                          fmt::format("{:.0f}", t.implied_gbs), ms(t.at_datasheet_ms), ms(t.at_high_ms),
                          ms(t.at_low_ms), g4(t.gflop), fmt::format("{:.1f}", t.implied_tflops),
                          ms(t.arithmetic_ms)});
  }
  return out;
}

std::string thor_sentence(const Published& p) {
  double low = 1e9, high = 0, total = p.thor.back().measured_ms, datasheet = 0, arithmetic = 0;
  for (std::size_t i = 0; i < 3; ++i) {
    low = std::min(low, p.thor[i].implied_gbs);
    high = std::max(high, p.thor[i].implied_gbs);
    total += p.thor[i].measured_ms;
    datasheet += std::max(p.thor[i].at_datasheet_ms, p.thor[i].arithmetic_ms);
    arithmetic += p.thor[i].arithmetic_ms;
  }
  return fmt::format(
      "Thor: in all three stages weights arrive at {:.0f} to {:.0f} GB/s, a quarter of the datasheet and the "
      "low end of "
      "what was measured there; arithmetic at the datasheet's rate would take {:.0f} ms of the {:.0f}, and "
      "the floor at "
      "273 GB/s is {:.0f} ms. The memory explains the table, and a planner that believes the datasheet does "
      "not.",
      low, high, arithmetic, total, datasheet);
}

Json tables_to_json(const std::vector<HtmlTable>& tables) {
  Json out = Json::array();
  for (const HtmlTable& t : tables)
    out.push_back({{"caption", t.caption}, {"header", t.header}, {"rows", t.rows}});
  return out;
}

}  // namespace servoflow::toolkit
