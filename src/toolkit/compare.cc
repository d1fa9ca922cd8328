#include "toolkit/compare.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <limits>

#include "contract/action_labels.h"
#include "core/status_macros.h"
#include "quant/precision_plan.h"
#include "toolkit/case_runner.h"
#include "toolkit/compare_gates.h"
#include "toolkit/compare_noise.h"
#include "toolkit/compare_tensors.h"
#include "toolkit/digest.h"
#include "toolkit/quantize.h"
#include "toolkit/random_cases.h"

namespace servoflow::toolkit {
namespace {

using Clock = std::chrono::steady_clock;

double cosine_of(std::span<const float> a, std::span<const float> b) {
  Difference d;
  for (std::size_t i = 0; i < a.size(); ++i) d.add(static_cast<double>(a[i]), static_cast<double>(b[i]));
  return d.not_finite > 0 ? std::numeric_limits<double>::quiet_NaN() : d.cosine();
}

// Names and units are those of the robot's columns: normalised ones are the flow's, and more.
std::vector<ComparedAction> new_actions(int width, const contract::Actions* robot) {
  std::vector<ComparedAction> out;
  for (int d = 0; d < width; ++d) {
    out.push_back({.index = d});
    if (robot == nullptr) continue;
    if (!robot->names.empty()) out.back().name = contract::action_name(*robot, d);
    out.back().unit = contract::action_unit(*robot, d);
  }
  return out;
}

void add_actions(const std::vector<double>& a, const std::vector<double>& b, int width,
                 const std::string& case_name, std::vector<ComparedAction>& out) {
  for (std::size_t i = 0; i < a.size(); ++i) {
    ComparedAction& one = out[i % static_cast<std::size_t>(width)];
    const double before = one.total.largest;
    one.total.add(a[i], b[i]);
    if (one.worst_row >= 0 && one.total.largest <= before) continue;
    one.worst_case = case_name;
    one.worst_row = static_cast<int>(i / static_cast<std::size_t>(width));
    one.worst_a = a[i];
    one.worst_b = b[i];
  }
}

void fill_metrics(const std::vector<double>& action_cosines, CompareReport& r) {
  auto& m = r.metrics;
  const auto lower = [&](const std::string& name, double value) {
    const auto [it, fresh] = m.try_emplace(name, value);
    if (!fresh && (value < it->second || std::isnan(value))) it->second = value;
  };
  for (const double c : action_cosines) lower("actions.cosine", c);
  m["actions.cosine.all"] = r.normalized.cosine();
  m["actions.relative"] = r.normalized.relative();
  double not_finite = static_cast<double>(r.normalized.not_finite), dead = 0;
  Difference velocity;
  for (const ComparedTensor& t : r.tensors) {
    not_finite += static_cast<double>(t.total.not_finite);
    if (t.group == "velocity") {
      lower("velocity.cosine", t.worst_cosine);
      lower("velocity.cosine.step" + std::to_string(t.step), t.worst_cosine);
      velocity.add(t.total);
      m["velocity.cosine.all.step" + std::to_string(t.step)] = t.total.cosine();
    } else if (t.group == "input") {
      lower("layers.cosine", t.worst_cosine);
      dead += t.dead;
    } else if (t.group == "vision" || t.group == "k" || t.group == "v") {
      lower("prefix.cosine", t.worst_cosine);
    }
  }
  if (velocity.count > 0) m["velocity.cosine.all"] = velocity.cosine();
  m["not_finite"] = not_finite;
  if (r.layers) m["dead_outputs"] = dead;
  // By index, which every column has; then by name, unless a column is called what another's index is.
  for (const bool by_name : {false, true})
    for (const ComparedAction& a : r.actions) {
      if (by_name && a.name.empty()) continue;
      const std::string column = by_name ? a.name : "a" + std::to_string(a.index);
      m.try_emplace("actions.mae." + column, a.total.mae());
      m.try_emplace("actions.max." + column, a.total.largest);
    }
}

SideReport side_report(const CompareSide& side, const policy::NetworkInfo& info, std::vector<double> times) {
  std::sort(times.begin(), times.end());
  return {.checkpoint = side.checkpoint,
          .device = info.device,
          .backend = info.backend,
          .precision = info.precision,
          .weight_bytes = info.weight_bytes,
          .workspace_bytes = info.workspace_bytes,
          .milliseconds = times.empty() ? 0 : times[times.size() / 2]};
}

// Cases that a quantized checkpoint was calibrated on prove little.
void note_calibration(const std::string& checkpoint, const std::vector<CaseFile>& cases,
                      CompareReport& report) {
  const std::string path = (std::filesystem::path(checkpoint) / "quantization_report.json").string();
  std::error_code error;
  if (!std::filesystem::exists(path, error)) return;
  const Result<Json> json = read_json_file(path);
  if (!json.ok()) {
    report.notes.push_back(json.status().message());
    return;
  }
  int seen = 0;
  for (const CaseFile& c : cases) {
    const Result<std::string> digest = file_digest(c.file.path());
    if (!digest.ok() || !json->is_object() || !json->contains("calibration") ||
        !(*json)["calibration"].is_object())
      continue;
    const Json& calibration = (*json)["calibration"];
    if (!calibration.contains("cases") || !calibration["cases"].is_array()) continue;
    for (const Json& one : calibration["cases"])
      if (one.is_object() && one.contains("sha256") && one["sha256"] == *digest) ++seen;
  }
  report.metrics["cases.calibrated_on"] = seen;
  if (seen > 0)
    report.notes.push_back(std::to_string(seen) + " of " + std::to_string(cases.size()) +
                           " cases were used to calibrate " + checkpoint + ": judge it by others");
}

}  // namespace

Result<CompareReport> compare(const CompareOptions& options) {
  CompareReport report;
  SF_ASSIGN_OR_RETURN(weights::Checkpoint a_checkpoint, weights::open_checkpoint(options.a.checkpoint));
  SF_ASSIGN_OR_RETURN(weights::Checkpoint b_checkpoint, weights::open_checkpoint(options.b.checkpoint));
  report.cases = options.cases.empty() ? (std::filesystem::path(options.a.checkpoint) / "cases").string()
                                       : options.cases;
  RandomCases invented;
  std::vector<CaseFile> cases;
  if (options.random_cases > 0) {
    invented = random_cases(a_checkpoint, {.count = options.random_cases,
                                           .views = options.random_views,
                                           .tokens = options.random_tokens,
                                           .seed = options.seed});
    cases = std::move(invented.cases);
    report.cases = "random observations, seed " + std::to_string(options.seed);
  } else {
    SF_ASSIGN_OR_RETURN(cases, read_cases(report.cases));
  }
  if (options.limit > 0 && static_cast<std::size_t>(options.limit) < cases.size()) {
    std::vector<CaseFile> some;  // evenly spread
    for (int i = 0; i < options.limit; ++i)
      some.push_back(std::move(
          cases[static_cast<std::size_t>(i) * cases.size() / static_cast<std::size_t>(options.limit)]));
    cases = std::move(some);
  }
  // What the gates need is checked before any weight is packed.
  std::vector<Bound> bounds;
  std::map<std::string, quant::LinearFormat> formats;
  if (options.gates == "noise") {
    SF_ASSIGN_OR_RETURN(formats, formats_of(b_checkpoint, options.b.precision));
    if (formats.empty())
      return Status::invalid("--gates noise: B (" + options.b.precision +
                             ") has no quantized layer whose noise could be predicted");
  } else if (options.gates == "trained") {
    std::string recipe = options.b.precision;
    const std::string plan = (std::filesystem::path(options.b.checkpoint) / kPlanFile).string();
    if (std::error_code error; recipe == "auto" && std::filesystem::exists(plan, error)) {
      SF_ASSIGN_OR_RETURN(const quant::PrecisionPlan stored, quant::load_plan(plan));
      recipe = stored.name;
    }
    SF_ASSIGN_OR_RETURN(bounds, trained_bounds(recipe));
  } else if (!options.gates.empty()) {
    SF_ASSIGN_OR_RETURN(const Json json, read_json_file(options.gates));
    SF_ASSIGN_OR_RETURN(bounds, bounds_from_json(json, options.gates));
  }
  const std::shared_ptr<const weights::WeightSource> a_source = a_checkpoint.source;
  const weights::Checkpoint a_again = a_checkpoint;

  const auto open = [&](weights::Checkpoint checkpoint, const CompareSide& side) {
    return CaseRunner::open(std::move(checkpoint), cases,
                            {.device = side.device,
                             .precision = side.precision,
                             .tokenizer = options.tokenizer,
                             .assets = options.assets,
                             .threads = options.threads,
                             .loading = options.loading});
  };
  SF_ASSIGN_OR_RETURN(auto a, open(std::move(a_checkpoint), options.a));
  SF_ASSIGN_OR_RETURN(auto b, open(std::move(b_checkpoint), options.b));
  report.layers =
      options.layers && !a->info().device.starts_with("cuda") && !b->info().device.starts_with("cuda");
  if (options.layers && !report.layers)
    report.notes.push_back("a GPU computes whole layers at once: compared by stages, not by layers");

  Comparison comparison(report);
  std::vector<double> a_times, b_times, action_cosines;
  std::vector<CaseVelocities> originals;
  std::map<std::string, double> powers;
  for (std::size_t i = 0; i < cases.size(); ++i) {
    const CaseFile& c = cases[i];
    if (options.running) options.running(static_cast<int>(i), static_cast<int>(cases.size()), c.name);
    report.case_names.push_back(c.name);
    KeepingTap a_tap(report.layers), b_tap(report.layers);
    const auto run = [&](CaseRunner& runner, KeepingTap& tap,
                         std::vector<double>& times) -> Result<CaseOutcome> {
      const Clock::time_point begin = Clock::now();
      Result<CaseOutcome> out = runner.run(c, &tap);
      times.push_back(std::chrono::duration<double, std::milli>(Clock::now() - begin).count());
      if (!out.ok()) return out.status().with_context(c.file.path().empty() ? c.name : c.file.path());
      return out;
    };
    SF_ASSIGN_OR_RETURN(const CaseOutcome x, run(*a, a_tap, a_times));
    SF_ASSIGN_OR_RETURN(const CaseOutcome y, run(*b, b_tap, b_times));
    SF_RETURN_IF_ERROR(comparison.add(a_tap, b_tap, c.name));
    for (std::size_t k = 0; k < x.normalized.size(); ++k)
      report.normalized.add(static_cast<double>(x.normalized[k]), static_cast<double>(y.normalized[k]));
    action_cosines.push_back(cosine_of(x.normalized, y.normalized));
    const bool units = x.width > 0;
    const int width = units ? x.width : a->checkpoint().architecture.action_dim;
    std::vector<ComparedAction> columns = new_actions(width, units ? &x.contract.actions : nullptr);
    const bool same = std::equal(columns.begin(), columns.end(), report.actions.begin(), report.actions.end(),
                                 [](const auto& p, const auto& q) { return p.label() == q.label(); });
    if (report.actions.empty()) {
      report.actions = std::move(columns);
      report.robot_units = units;
    }
    if ((same || i == 0) && units == report.robot_units) {
      const std::vector<double> xa =
          units ? x.actions : std::vector<double>(x.normalized.begin(), x.normalized.end());
      const std::vector<double> ya =
          units ? y.actions : std::vector<double>(y.normalized.begin(), y.normalized.end());
      add_actions(xa, ya, width, c.name, report.actions);
    } else {
      report.notes.push_back(c.name + ": its actions have other columns than " + cases.front().name +
                             "'s; they are in no table of columns");
    }
    if (options.gates != "noise") continue;
    CaseVelocities original{.normalized = x.normalized};
    for (const KeepingTap::One& one : a_tap.all)
      if (!one.input && stage_group(one.name) == "velocity") original.steps.push_back(one.kept.values);
    originals.push_back(std::move(original));
    if (i == 0) {
      SF_ASSIGN_OR_RETURN(powers, noise_powers(*a_source, a_tap, formats));
    }
  }
  comparison.finish();
  report.a = side_report(options.a, a->info(), a_times);
  report.b = side_report(options.b, b->info(), b_times);
  fill_metrics(action_cosines, report);
  note_calibration(options.b.checkpoint, cases, report);

  if (options.gates == "noise") {
    b.reset();
    a.reset();  // one network at a time
    SF_ASSIGN_OR_RETURN(bounds, noise_bounds(options, a_again, cases, originals, powers));
  }
  report.gates = judge_bounds(bounds, report.metrics);
  return report;
}

Status compare_outcome(const CompareReport& report) {
  std::string failed;
  for (const GateResult& g : report.gates)
    if (!g.pass) failed += (failed.empty() ? "" : ", ") + g.metric;
  const auto it = report.metrics.find("not_finite");
  if (it == report.metrics.end() || it->second != 0)
    failed += failed.empty() ? "values that are not finite" : ", not_finite";
  if (report.case_names.empty()) failed += "no case was compared";
  if (failed.empty()) return {};
  return Status::check_failed("compare: outside its gates: " + failed);
}

const ComparedTensor* first_beyond(const CompareReport& report, double tolerance) {
  for (const ComparedTensor& t : report.tensors)
    if (!(t.total.relative() <= tolerance) || t.total.not_finite > 0) return &t;
  return nullptr;
}

}  // namespace servoflow::toolkit
