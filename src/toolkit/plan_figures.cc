// The figures of plans and of their accuracy, as Plotly takes them.
#include <fmt/format.h>

#include "core/status_macros.h"
#include "toolkit/plan_tables.h"

namespace servoflow::toolkit {
namespace {

Json axis(const std::string& title, bool from_zero = false) {
  Json out = {{"title", {{"text", title}}}};
  if (from_zero) out["rangemode"] = "tozero";
  return out;
}

Json layout(const std::string& title, Json x, Json y) {
  return {{"title", {{"text", title}}},
          {"xaxis", std::move(x)},
          {"yaxis", std::move(y)},
          {"legend", {{"orientation", "h"}, {"y", -0.2}}}};
}

struct Bars {
  Json names = Json::array(), vision = Json::array(), prefix = Json::array(), denoise = Json::array(),
       host = Json::array();
  void add(const std::string& name, const Prediction& p) {
    names.push_back(name);
    vision.push_back(p.vision.ms);
    prefix.push_back(p.prefix.ms);
    denoise.push_back(p.denoise.ms);
    host.push_back(p.host_ms);
  }
  Json traces() const {
    const auto bar = [&](const char* name, const Json& values) {
      return Json{{"type", "bar"}, {"name", name}, {"x", names}, {"y", values}};
    };
    return Json::array(
        {bar("vision", vision), bar("prefix", prefix), bar("denoise", denoise), bar("host", host)});
  }
};

}  // namespace

Result<std::vector<PlanFigure>> plan_figures(const PlanContext& c) {
  std::vector<PlanFigure> out;
  Bars bars;
  Json floors = Json::array();
  for (const PlanPrecision& precision : plan_precisions()) {
    if (!has_arithmetic(c.rates, precision)) continue;
    PlanCase plan = c.base;
    plan.precision = precision.name;
    SF_ASSIGN_OR_RETURN(const Prediction p, predict(plan, c.device, c.rates));
    bars.add(precision.name, p);
    floors.push_back(p.floor_ms);
  }
  Json traces = bars.traces();
  traces.push_back({{"type", "scatter"},
                    {"mode", "markers"},
                    {"name", "floor"},
                    {"x", bars.names},
                    {"y", floors},
                    {"marker", {{"symbol", "line-ew-open"}, {"size", 26}, {"color", "#111"}}}});
  Json stacked = layout("Latency by stage and precision", axis("precision"), axis("ms", true));
  stacked["barmode"] = "stack";
  out.push_back({"Latency by stage for each precision this device multiplies in; the mark is the floor.",
                 std::move(traces), std::move(stacked)});

  Json lines = Json::array();
  for (int reuse = 1; reuse <= 4; ++reuse) {
    Json x = Json::array(), y = Json::array();
    for (int steps = 1; steps <= 10; ++steps) {
      PlanCase plan = c.base;
      plan.reuse = reuse;
      for (WorkShape& r : plan.requests) r.steps = steps;
      SF_ASSIGN_OR_RETURN(const Prediction p, predict(plan, c.device, c.rates));
      x.push_back(steps);
      y.push_back(p.hz);
    }
    lines.push_back({{"type", "scatter"},
                     {"mode", "lines+markers"},
                     {"name", reuse == 1 ? "prefix each time" : fmt::format("prefix every {}", reuse)},
                     {"x", x},
                     {"y", y}});
  }
  out.push_back({"Inferences a second by denoise steps, for a prefix that is computed each time or reused.",
                 std::move(lines), layout("Steps and reuse", axis("denoise steps"), axis("Hz", true))});

  Json rows = Json::array();
  for (const int horizon : {10, 25, 50}) {
    Json x = Json::array(), y = Json::array();
    for (int views = 1; views <= 4; ++views)
      for (const int tokens : {48, 200}) {
        PlanCase plan = c.base;
        for (WorkShape& r : plan.requests) {
          r.views = views;
          r.tokens = tokens;
          r.horizon = horizon;
        }
        SF_ASSIGN_OR_RETURN(const Prediction p, predict(plan, c.device, c.rates));
        x.push_back(views * c.base.architecture.vision.tokens() + tokens);
        y.push_back(p.average_ms);
      }
    rows.push_back({{"type", "scatter"},
                    {"mode", "lines+markers"},
                    {"name", fmt::format("horizon {}", horizon)},
                    {"x", x},
                    {"y", y}});
  }
  out.push_back({"Latency by the rows of the prefix: 1 to 4 views with 48 or 200 prompt tokens.",
                 std::move(rows), layout("Sequence length", axis("rows of the prefix"), axis("ms", true))});

  Json batch_x = Json::array(), batch_y = Json::array();
  for (int batch = 1; batch <= 16; ++batch) {
    PlanCase plan = c.base;
    plan.requests.assign(static_cast<std::size_t>(batch), c.base.requests[0]);
    SF_ASSIGN_OR_RETURN(const Prediction p, predict(plan, c.device, c.rates));
    batch_x.push_back(batch);
    batch_y.push_back(p.average_ms / batch);
  }
  out.push_back({"Time per request when several are computed together.",
                 Json::array({{{"type", "scatter"},
                               {"mode", "lines+markers"},
                               {"name", "ms per request"},
                               {"x", batch_x},
                               {"y", batch_y}}}),
                 layout("Batches", axis("requests"), axis("ms per request", true))});
  return out;
}

std::vector<PlanFigure> accuracy_figures(const Accuracy& a, const Published& p) {
  std::vector<PlanFigure> out;
  Json names = Json::array(), measured = Json::array(), predicted = Json::array(), floors = Json::array();
  for (const AccuracyRow& r : a.rows) {
    if (!r.left_out.empty()) continue;
    names.push_back(r.file);
    measured.push_back(r.measured_ms);
    predicted.push_back(r.predicted_ms);
    floors.push_back(r.floor_ms);
  }
  const auto bar = [&](const char* name, const Json& values) {
    return Json{{"type", "bar"}, {"name", name}, {"x", names}, {"y", values}};
  };
  Json log = layout("Predicted and measured", axis(""), axis("ms"));
  log["yaxis"]["type"] = "log";
  out.push_back({"Each committed result beside its prediction and the floor; logarithmic.",
                 Json::array({bar("floor", floors), bar("measured", measured), bar("predicted", predicted)}),
                 std::move(log)});
  Json terms = Json::array(), have = Json::array(), low = Json::array(), most = Json::array();
  for (const ThorTerm& t : p.thor) {
    if (t.weight_gb <= 0) continue;
    terms.push_back(t.name);
    have.push_back(t.implied_gbs);
    low.push_back(t.weight_gb / t.at_low_ms * 1e3);
    most.push_back(t.weight_gb / t.at_datasheet_ms * 1e3);
  }
  const auto line = [&](const char* name, const Json& y) {
    return Json{{"type", "scatter"}, {"mode", "lines"}, {"name", name}, {"x", terms}, {"y", y}};
  };
  out.push_back({"The bandwidth that each term of the Thor table implies, if nothing else had taken time.",
                 Json::array({Json{{"type", "bar"}, {"name", "implied"}, {"x", terms}, {"y", have}},
                              line("lowest measured", low), line("datasheet", most)}),
                 layout("Thor", axis(""), axis("GB/s", true))});
  return out;
}

}  // namespace servoflow::toolkit
