#include "toolkit/plan_compare.h"

#include <cmath>

#include "contract/json_fields.h"
#include "core/status_macros.h"
#include "toolkit/plan_toml.h"

namespace servoflow::toolkit {
namespace {

using contract::JsonFields;
using contract::Problems;

double positive(JsonFields& fields, const std::string& key) {
  const Json* value = fields.get(key, true);
  if (value == nullptr) return 0;
  if (value->is_number() && std::isfinite(value->get<double>()) && value->get<double>() > 0)
    return value->get<double>();
  fields.problems().add(fields.field(key), "must be a positive number");
  return 0;
}

Result<std::vector<ThorTerm>> thor_terms(const double (&ms)[4]) {
  SF_ASSIGN_OR_RETURN(const DeviceProfile thor, load_device_profile("thor"));
  if (!thor.measured) return Status::invalid("profile thor: needs [measured] with a range of bandwidths");
  const PlanWork work = count_components(weights::pi05_architecture(), WorkShape{});
  const double steps = WorkShape{}.steps, modulation = static_cast<double>(work.modulation_weights);
  const auto term = [&](const std::string& name, double measured, const StageParts& s, double passes,
                        double extra) {
    ThorTerm t{.name = name, .measured_ms = measured};
    t.weight_gb = passes * 2 * (static_cast<double>(s.weights()) + extra + s.cached()) / 1e9;
    t.gflop = passes * (s.products() + s.attention()) / 1e9;
    t.implied_gbs = t.weight_gb / measured * 1e3;
    t.implied_tflops = t.gflop / measured;
    t.at_datasheet_ms = t.weight_gb / thor.datasheet.bandwidth_gbs * 1e3;
    t.at_high_ms = t.weight_gb / thor.measured->bandwidth_high_gbs * 1e3;
    t.at_low_ms = t.weight_gb / thor.measured->bandwidth_low_gbs * 1e3;
    t.arithmetic_ms = t.gflop / thor.datasheet.tflops.at("bf16");
    return t;
  };
  std::vector<ThorTerm> out = {
      term("vision", ms[0], work.vision, 1, 0), term("prefix", ms[1], work.prefix, 1, 0),
      term("denoise, modulations once", ms[2], work.step, steps, 0),
      term("denoise, modulations in every step", ms[2], work.step, steps, modulation)};
  out.push_back({.name = "other", .measured_ms = ms[3]});
  return out;
}

}  // namespace

Result<Published> compare_published() {
  return compare_published(builtin_published(), "profiles/published.toml");
}

Result<Published> compare_published(std::string_view toml, const std::string& where) {
  SF_ASSIGN_OR_RETURN(const Json json, parse_toml(toml, where));
  Problems problems(where);
  JsonFields root(json, "", problems);
  Published out;
  for (const Json* item : root.elements("figure")) {
    JsonFields fields(*item, "figure[" + std::to_string(out.figures.size()) + "]", problems);
    PublishedFigure f;
    f.device = fields.text("device");
    f.engine = fields.text("engine");
    f.precision = fields.text("precision");
    f.source = fields.text("source");
    f.ms = positive(fields, "ms");
    f.work.views = fields.integer("views", 1, 64, 2);
    f.work.tokens = fields.integer("tokens", 1, weights::kMaxTokens, 200);
    f.work.horizon = fields.integer("horizon", 1, weights::kMaxHorizon, 50);
    f.work.steps = fields.integer("steps", 1, weights::kMaxSteps, 10);
    fields.refuse_unknown();
    out.figures.push_back(std::move(f));
  }
  double ms[4] = {};
  if (const Json* thor = root.get("thor", true)) {
    JsonFields fields(*thor, "thor", problems);
    out.thor_source = fields.text("source");
    int i = 0;
    for (const char* key : {"vision_ms", "prefix_ms", "denoise_ms", "other_ms"})
      ms[i++] = positive(fields, key);
    fields.refuse_unknown();
  }
  root.refuse_unknown();
  SF_RETURN_IF_ERROR(problems.status());
  for (PublishedFigure& f : out.figures) {
    SF_ASSIGN_OR_RETURN(const DeviceProfile device, load_device_profile(f.device));
    SF_ASSIGN_OR_RETURN(const UsedRates rates, used_rates(device));
    SF_ASSIGN_OR_RETURN(f.prediction, predict({.architecture = weights::pi05_architecture(),
                                               .requests = {f.work},
                                               .precision = f.precision},
                                              device, rates));
  }
  SF_ASSIGN_OR_RETURN(out.thor, thor_terms(ms));
  return out;
}

Json published_to_json(const Published& p) {
  Json figures = Json::array(), thor = Json::array();
  for (const PublishedFigure& f : p.figures)
    figures.push_back({{"device", f.device},
                       {"engine", f.engine},
                       {"precision", f.precision},
                       {"published_ms", f.ms},
                       {"floor_ms", f.prediction.floor_ms},
                       {"predicted_servoflow_ms", f.prediction.ms},
                       {"source", f.source}});
  for (const ThorTerm& t : p.thor)
    thor.push_back({{"term", t.name},
                    {"measured_ms", t.measured_ms},
                    {"gb", t.weight_gb},
                    {"gflop", t.gflop},
                    {"implied_gbs", t.implied_gbs},
                    {"implied_tflops", t.implied_tflops},
                    {"at_datasheet_bandwidth_ms", t.at_datasheet_ms},
                    {"at_high_bandwidth_ms", t.at_high_ms},
                    {"at_low_bandwidth_ms", t.at_low_ms},
                    {"arithmetic_ms", t.arithmetic_ms}});
  return {{"figures", std::move(figures)}, {"thor", {{"source", p.thor_source}, {"terms", std::move(thor)}}}};
}

}  // namespace servoflow::toolkit
