#include "toolkit/plan_fit.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <filesystem>

#include "contract/json_fields.h"
#include "core/status_macros.h"
#include "toolkit/bench_robots.h"

namespace servoflow::toolkit {
namespace {

std::string file_name(const std::string& path) { return std::filesystem::path(path).filename().string(); }

// A field deep in a result; null if it is not there.
const Json& at(const Json& json, std::initializer_list<const char*> keys) {
  static const Json kNull;
  const Json* here = &json;
  for (const char* key : keys) {
    if (!here->is_object()) return kNull;
    const auto found = here->find(key);
    if (found == here->end()) return kNull;
    here = &*found;
  }
  return *here;
}

double number(const Json& json, std::initializer_list<const char*> keys) {
  const Json& value = at(json, keys);
  if (!value.is_number()) return 0;
  const double x = value.get<double>();
  return std::isfinite(x) && x > 0 ? x : 0;
}

std::string lower(std::string text) {
  for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return text;
}

// What the run itself measured stands before the profile's.
UsedRates rates_of(const UsedRates& used, const MeasuredCase& m) {
  UsedRates out = used;
  if (m.bandwidth_gbs > 0) out.bandwidth_gbs = m.bandwidth_gbs;
  for (const auto& [precision, rate] : m.tflops) out.tflops[precision] = rate;
  return out;
}

// The profile a result belongs to; empty: none with factors of its own.
Result<std::string> profile_of(const MeasuredCase& m) {
  for (const std::string& name : list_device_profiles()) {
    SF_ASSIGN_OR_RETURN(const DeviceProfile p, load_device_profile(name));
    if (!p.engine) continue;
    if (p.kind == "cpu" ? m.backend.starts_with("cpu") : lower(m.hardware).find(name) != std::string::npos)
      return name;
  }
  return std::string();
}

std::string work_text(const std::vector<WorkShape>& requests) {
  const WorkShape& w = requests[0];
  std::string out =
      fmt::format("{} views, {} tokens, horizon {}, {} steps", w.views, w.tokens, w.horizon, w.steps);
  if (requests.size() > 1) {
    const bool ragged = std::any_of(requests.begin(), requests.end(), [&](const WorkShape& r) {
      return r.views != w.views || r.tokens != w.tokens;
    });
    out += fmt::format(", {} requests{}", requests.size(), ragged ? ", ragged" : "");
  }
  return out;
}

double mean_error(double measured, double predicted) { return std::abs(predicted / measured - 1); }

}  // namespace

Result<MeasuredCase> measured_from_json(const Json& json, const std::string& where) {
  MeasuredCase out{.file = where};
  for (const auto& keys : {std::initializer_list<const char*>{"end_to_end_ms", "p50"},
                           {"stages_ms", "vision", "p50"},
                           {"stages_ms", "prefix", "p50"},
                           {"stages_ms", "denoise", "p50"}})
    if (number(json, keys) <= 0)
      return Status::invalid(where + ": no result of `servoflow bench`: it lacks " +
                             std::string(*keys.begin()) + " with a positive median");
  contract::Problems problems(where);
  const Json& block = at(json, {"work"});
  contract::JsonFields work(block, "work", problems);
  WorkShape shape;
  if (work.is_object()) {
    shape.views = work.integer("views", 0, 64);
    shape.tokens = work.integer("tokens", 1, weights::kMaxTokens);
    shape.horizon = work.integer("horizon", 1, weights::kMaxHorizon);
    shape.steps = work.integer("steps", 1, weights::kMaxSteps);
    shape.batch = work.integer("batch", 1, 1024, 1);
  }
  SF_RETURN_IF_ERROR(problems.status());
  const bool ragged = at(json, {"ragged"}) == Json(true);
  for (int i = 0; i < shape.batch; ++i) out.requests.push_back(request_shape(shape, ragged, i));
  for (WorkShape& r : out.requests) r.batch = 1;
  const auto text = [&](const char* key) {
    return at(json, {key}).is_string() ? at(json, {key}).get<std::string>() : std::string();
  };
  out.precision = text("precision");
  out.backend = text("backend");
  out.hardware = text("hardware");
  out.ms = number(json, {"end_to_end_ms", "p50"});
  out.vision_ms = number(json, {"stages_ms", "vision", "p50"});
  out.prefix_ms = number(json, {"stages_ms", "prefix", "p50"});
  out.denoise_ms = number(json, {"stages_ms", "denoise", "p50"});
  out.device_bytes = number(json, {"device_bytes"});
  out.bandwidth_gbs = number(json, {"peaks", "read_gbs", "all_threads"});
  for (const auto& [precision, key] :
       {std::pair("bf16", "bf16_gflops"), std::pair("fp32", "fp32_gflops"), std::pair("int8", "int8_gops")})
    if (const double rate = number(json, {"peaks", key, "all_threads"}); rate > 0)
      out.tflops[precision] = rate / 1e3;
  if (const double copy = number(json, {"device_peaks", "copy_gbs"}); copy > 0) {
    out.bandwidth_gbs = copy;
    if (!out.precision.empty()) out.tflops[out.precision] = number(json, {"device_peaks", "product_tflops"});
  }
  for (const Json& batch : at(json, {"batches"}))
    if (batch.is_object() && batch.value("batch", 0) == 1)
      out.single_in_composition_ms = number(batch, {"end_to_end_ms", "p50"});

  const weights::Architecture pi05 = weights::pi05_architecture();
  const double prefix_weights = number(json, {"rates", "prefix", "weights"});
  const Work want = count_work(pi05, out.requests[0], 2, 2);
  if (prefix_weights > 0 && prefix_weights != static_cast<double>(want.prefix.weights))
    out.left_out = "another network than pi05";
  else if (out.backend.starts_with("cpu") && out.bandwidth_gbs <= 0)
    out.left_out = "no peaks were measured in that run, and a shared machine's change";
  else if (!plan_precision(out.precision).ok())
    out.left_out = "precision " + out.precision + " is none of the planner's";
  return out;
}

Result<MeasuredCase> read_measured(const std::string& path) {
  SF_ASSIGN_OR_RETURN(const Json json, read_json_file(path));
  return measured_from_json(json, path);
}

Result<EngineFactors> fit_engine(const DeviceProfile& device, const MeasuredCase& single,
                                 const MeasuredCase* composition, const EngineFactors& given) {
  if (!single.left_out.empty())
    return Status::invalid(single.file + ": cannot be fitted: " + single.left_out);
  if (single.requests.size() != 1)
    return Status::invalid(single.file + ": factors are fitted on a single request, this has " +
                           std::to_string(single.requests.size()));
  // Shares of one, no latency: the prediction is then the bare work.
  DeviceProfile bare = device;
  bare.engine = EngineFactors{.source = single.file, .vision = 1, .prefix = 1, .step = 1};
  SF_ASSIGN_OR_RETURN(const UsedRates used, used_rates(bare));
  PlanCase plan{.architecture = weights::pi05_architecture(),
                .requests = single.requests,
                .precision = single.precision};
  SF_ASSIGN_OR_RETURN(const Prediction work, predict(plan, bare, rates_of(used, single)));

  EngineFactors out = given;
  out.source = file_name(single.file);
  const auto share = [&](const StagePrediction& s, double measured, double latency,
                         double& factor) -> Status {
    const double left = measured - latency, squared = left * left - s.memory_ms * s.memory_ms;
    factor = left > 0 && squared > 0 ? s.compute_ms / std::sqrt(squared) : 0;
    if (factor > 0 && factor <= 1) return {};
    return Status::invalid(
        fmt::format("{}: {} took {:.4g} ms, which rates of {:.4g} ms arithmetic and {:.4g} ms memory do not "
                    "explain; were the "
                    "profile's rates measured on this device?",
                    single.file, s.name, measured, s.compute_ms, s.memory_ms));
  };
  const auto kernels = [&](int layers) { return given.kernel_us * given.kernels * layers / 1e3; };
  SF_RETURN_IF_ERROR(
      share(work.vision, single.vision_ms, kernels(plan.architecture.vision.depth), out.vision));
  SF_RETURN_IF_ERROR(
      share(work.prefix, single.prefix_ms, kernels(plan.architecture.prefix.depth), out.prefix));
  out.host_ms = std::max(0.0, single.ms - single.vision_ms - single.prefix_ms - single.denoise_ms);
  if (device.kind == "cpu") {
    SF_RETURN_IF_ERROR(share(work.denoise, single.denoise_ms, 0, out.step));
    out.phase_us = out.composition_us = 0;
    return out;
  }
  out.step = out.prefix;
  const double busy = std::hypot(work.denoise.compute_ms / out.step, work.denoise.memory_ms);
  const double layers = plan.architecture.expert.depth * single.requests[0].steps;
  if (out.phases > 0) out.phase_us = std::max(0.0, single.denoise_ms - busy) * 1e3 / (layers * out.phases);
  if (composition != nullptr) {
    if (composition->single_in_composition_ms <= 0)
      return Status::invalid(composition->file + ": holds no batch of one request (`bench --batches`)");
    const double rest = single.ms - single.denoise_ms + busy;
    out.composition_us = std::max(0.0, composition->single_in_composition_ms - rest) * 1e3 / layers;
    out.composition_source = file_name(composition->file);
  }
  return out;
}

std::string engine_toml(const EngineFactors& e) {
  std::string out = fmt::format("[engine]\nsource = \"bench/results/{}\"\n", e.source);
  if (!e.composition_source.empty())
    out += fmt::format("composition_source = \"bench/results/{}\"\n", e.composition_source);
  out += fmt::format("vision = {:.4f}\nprefix = {:.4f}\nstep = {:.4f}\nhost_ms = {:.4g}\n", e.vision,
                     e.prefix, e.step, e.host_ms);
  if (e.kernels > 0) out += fmt::format("kernel_us = {:.4g}\nkernels = {}\n", e.kernel_us, e.kernels);
  if (e.phases > 0)
    out += fmt::format("phase_us = {:.4g}\nphases = {}\nloop_requests = {}\ncomposition_us = {:.4g}\n",
                       e.phase_us, e.phases, e.loop_requests, e.composition_us);
  return out;
}

Result<Accuracy> check_accuracy(const std::string& folder) {
  std::error_code problem;
  std::vector<std::string> paths;
  for (const auto& entry : std::filesystem::directory_iterator(folder, problem))
    if (entry.path().extension() == ".json") paths.push_back(entry.path().string());
  if (problem) return Status::invalid(folder + ": cannot be listed: " + problem.message());
  std::sort(paths.begin(), paths.end());

  Accuracy out;
  double stages = 0, errors = 0, stage_errors = 0;
  for (const std::string& path : paths) {
    SF_ASSIGN_OR_RETURN(const Json json, read_json_file(path));
    if (!json.is_object() || !json.contains("stages_ms") || !json.contains("work")) continue;  // another kind
    SF_ASSIGN_OR_RETURN(const MeasuredCase m, measured_from_json(json, path));
    SF_ASSIGN_OR_RETURN(const std::string name, profile_of(m));
    if (name.empty()) continue;
    AccuracyRow row{
        .device = name, .file = file_name(path), .precision = m.precision, .work = work_text(m.requests)};
    row.left_out = m.left_out;
    row.measured_ms = m.ms;
    SF_ASSIGN_OR_RETURN(const DeviceProfile device, load_device_profile(name));
    SF_ASSIGN_OR_RETURN(const UsedRates used, used_rates(device));
    const UsedRates rates = rates_of(used, m);
    if (row.left_out.empty()) {
      SF_ASSIGN_OR_RETURN(const PlanPrecision precision, plan_precision(m.precision));
      if (!has_arithmetic(rates, precision)) row.left_out = "no rate of this precision is known";
    }
    if (!row.left_out.empty()) {
      out.rows.push_back(std::move(row));
      continue;
    }
    row.fitted = file_name(device.engine->source) == row.file;
    SF_ASSIGN_OR_RETURN(const Prediction p, predict({.architecture = weights::pi05_architecture(),
                                                     .requests = m.requests,
                                                     .precision = m.precision},
                                                    device, rates));
    row.predicted_ms = p.ms;
    row.floor_ms = p.floor_ms;
    const double measured[3] = {m.vision_ms, m.prefix_ms, m.denoise_ms},
                 predicted[3] = {p.vision.ms, p.prefix.ms, p.denoise.ms};
    for (int s = 0; s < 3; ++s) {
      row.stage_measured[s] = measured[s];
      row.stage_predicted[s] = predicted[s];
    }
    SF_ASSIGN_OR_RETURN(const PlanPrecision precision, plan_precision(m.precision));
    SF_ASSIGN_OR_RETURN(const PlanMemory memory, predict_memory(weights::pi05_architecture(), precision,
                                                                static_cast<int>(m.requests.size()), 3));
    row.measured_gb = m.device_bytes / 1e9;
    row.predicted_gb = memory.total(device.kind == "gpu") / 1e9;
    out.rows.push_back(std::move(row));
  }
  for (AccuracyRow& row : out.rows) {
    if (!row.left_out.empty() || row.fitted) continue;
    row.same_work = std::any_of(out.rows.begin(), out.rows.end(), [&](const AccuracyRow& other) {
      return other.fitted && other.device == row.device && other.work == row.work &&
             other.precision == row.precision;
    });
    if (row.same_work || row.precision != "bf16") continue;
    ++out.predicted;
    errors += mean_error(row.measured_ms, row.predicted_ms);
    for (int s = 0; s < 3; ++s, ++stages)
      stage_errors += mean_error(row.stage_measured[s], row.stage_predicted[s]);
  }
  if (out.predicted > 0) {
    out.mape = errors / out.predicted;
    out.stage_mape = stage_errors / stages;
  }
  return out;
}

Json accuracy_to_json(const Accuracy& a) {
  Json rows = Json::array();
  for (const AccuracyRow& r : a.rows) {
    Json row = {{"device", r.device},
                {"file", r.file},
                {"precision", r.precision},
                {"work", r.work},
                {"fitted", r.fitted},
                {"same_work_as_fitted", r.same_work},
                {"left_out", r.left_out.empty() ? Json() : Json(r.left_out)},
                {"measured_ms", r.measured_ms}};
    if (r.left_out.empty()) {
      row["predicted_ms"] = r.predicted_ms;
      row["error_percent"] = 100 * r.error();
      row["floor_ms"] = r.floor_ms;
      row["stages_measured_ms"] = Json(r.stage_measured);
      row["stages_predicted_ms"] = Json(r.stage_predicted);
      row["memory_measured_gb"] = r.measured_gb;
      row["memory_predicted_gb"] = r.predicted_gb;
    }
    rows.push_back(std::move(row));
  }
  return {{"rows", std::move(rows)},
          {"predicted_rows", a.predicted},
          {"mape_percent", 100 * a.mape},
          {"stage_mape_percent", 100 * a.stage_mape}};
}

}  // namespace servoflow::toolkit
