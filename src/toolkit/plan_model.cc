#include "toolkit/plan_model.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "core/status_macros.h"
#include "ops/backend.h"
#include "policy/plan.h"
#include "toolkit/memory_plan.h"

namespace servoflow::toolkit {
namespace {

// Blocks of 16 with an 8-bit scale; groups of 128 with a 16-bit one. Scales of whole rows are less than a
// hundredth.
constexpr double kBlocksOf16 = 4 + 8.0 / 16, kGroupsOf128 = 4 + 16.0 / 128;
constexpr std::array<PlanPrecision, 12> kPrecisions = {{
    {"fp32", 32, "fp32", nullptr, 0, "everything in float32"},
    {"bf16", 16, "bf16", nullptr, 0, "as trained"},
    {"mlp-int8", 8, "int8", "prefix/mlp", 1, "the prefix's MLPs in INT8, the rest BF16"},
    {"int8-w8a8", 8, "int8", nullptr, 2, "INT8 weights and activations"},
    {"fp8-w8a8", 8, "fp8", nullptr, 2, "E4M3 weights and activations"},
    {"int8-w8a16", 8, "bf16", nullptr, 1, "INT8 weights, BF16 arithmetic"},
    {"mlp-nvfp4", kBlocksOf16, "bf16", "prefix/mlp", 2, "the prefix's MLPs in 4 bits, the rest BF16"},
    {"mlp-int4", kGroupsOf128, "bf16", "prefix/mlp", 2, "the same with integers"},
    {"nvfp4-w4a16", kBlocksOf16, "bf16", nullptr, 4, "E2M1 weights in blocks of 16, BF16 arithmetic"},
    {"int4-g128-w4a16", kGroupsOf128, "bf16", nullptr, 4, "4-bit integers in groups of 128, BF16 arithmetic"},
    {"nvfp4-w4a8", kBlocksOf16, "fp8", nullptr, 5, "E2M1 weights, FP8 arithmetic"},
    {"nvfp4-w4a4", kBlocksOf16, "fp4", nullptr, 6, "E2M1 weights and activations"},
}};

struct Stage {
  const StageParts* parts;
  double passes = 1, share = 1, latency_ms = 0;
};

StagePrediction stage(const std::string& name, const Stage& s, const PlanPrecision& precision,
                      const UsedRates& used, const DeviceProfile& device) {
  const char* plain = precision.compute == std::string("fp32") ? "fp32" : "bf16";
  const auto rate = [&](const char* p) {
    const auto found = used.tflops.find(p);
    return found != used.tflops.end() ? found->second : used.tflops.at("fp32");
  };
  // The best known: measured, the upper end of a range, else the datasheet's.
  const auto best = [&](const char* p) {
    if (device.measured && device.measured->tflops.count(p) > 0) return device.measured->tflops.at(p);
    const auto found = device.datasheet.tflops.find(p);
    return found != device.datasheet.tflops.end() ? found->second : rate(p);
  };
  double bandwidth =
      device.measured ? std::max(device.measured->bandwidth_gbs, device.measured->bandwidth_high_gbs) : 0;
  if (bandwidth <= 0) bandwidth = device.datasheet.bandwidth_gbs;

  // What the precision is about, and what stays as it was.
  double changed = 0, changed_weights = 0;
  for (const ComponentWork& c : s.parts->components)
    if (precision.only == nullptr || c.name == precision.only) {
      changed += s.passes * c.products;
      changed_weights += s.passes * static_cast<double>(c.weights);
    }
  const double plain_bits = plain == std::string("fp32") ? 32 : 16;
  const double kept = s.passes * s.parts->products() - changed,
               kept_weights = s.passes * static_cast<double>(s.parts->weights()) - changed_weights;

  StagePrediction out{.name = name};
  const double products = changed + kept, attention = s.passes * s.parts->attention();
  out.gflop = (products + attention) / 1e9;
  out.weight_gb = (changed_weights * precision.weight_bits + kept_weights * plain_bits) / 8e9;
  out.cache_gb = s.passes * s.parts->cached() * (plain == std::string("fp32") ? 4 : 2) / 1e9;
  const double bytes = out.weight_gb + out.cache_gb;
  out.compute_ms = (changed / rate(precision.compute) + (kept + attention) / rate(plain)) / s.share / 1e9;
  out.memory_ms = bytes / used.bandwidth_gbs * 1e3;
  out.latency_ms = s.latency_ms;
  out.ms = std::hypot(out.compute_ms, out.memory_ms) + out.latency_ms;
  out.floor_ms = std::max((changed / best(precision.compute) + (kept + attention) / best(plain)) / 1e9,
                          bytes / bandwidth * 1e3);
  out.bound = out.latency_ms > std::max(out.compute_ms, out.memory_ms) ? "latency"
              : out.compute_ms > out.memory_ms                         ? "compute"
                                                                       : "memory";
  return out;
}

}  // namespace

std::span<const PlanPrecision> plan_precisions() { return kPrecisions; }

Result<PlanPrecision> plan_precision(const std::string& asked) {
  // Whether scales are known beforehand changes neither what is stored nor what multiplies.
  std::string name = asked, names;
  for (const char* suffix : {"-static", "-dynamic"})
    if (name.ends_with(suffix)) name.resize(name.size() - std::string(suffix).size());
  for (const PlanPrecision& p : kPrecisions) {
    if (name == p.name) return p;
    names += (names.empty() ? "" : ", ") + std::string(p.name);
  }
  return Status::invalid("precision \"" + asked + "\": the planner knows " + names);
}

bool has_arithmetic(const UsedRates& rates, const PlanPrecision& precision) {
  return rates.tflops.count(precision.compute) > 0 ||
         (precision.compute == std::string("bf16") && rates.tflops.count("fp32") > 0);
}

Result<PlanMemory> predict_memory(const weights::Architecture& a, const PlanPrecision& precision,
                                  int requests, int pictures) {
  PlanMemory out;
  if (precision.only == nullptr) {
    out.weights = static_cast<double>(packed_weight_bytes(a, precision.weight_bits / 8));
  } else {
    out.weights = static_cast<double>(packed_weight_bytes(a, 2));
    const PlanWork work = count_components(a, WorkShape{});
    for (const StageParts* s : {&work.vision, &work.prefix, &work.step})
      for (const ComponentWork& c : s->components)
        if (c.name == precision.only)
          out.weights -= static_cast<double>(c.weights) * (16 - precision.weight_bits) / 8;
  }
  out.token_table = 2.0 * a.vocab * a.prefix.width;
  // The engine's own plan of activations, on memory that nobody touches.
  SF_ASSIGN_OR_RETURN(
      const ops::BackendChoice backend,
      ops::make_backend({.device = "cpu",
                         .precision = precision.compute == std::string("fp32") ? "fp32" : "bf16",
                         .threads = 1}));
  SF_ASSIGN_OR_RETURN(const policy::Workspace workspace,
                      policy::plan_workspace(*backend.backend, a, {requests, pictures}));
  out.workspace = static_cast<double>(workspace.bytes);
  return out;
}

Result<Prediction> predict(const PlanCase& plan, const DeviceProfile& device, const UsedRates& used) {
  SF_ASSIGN_OR_RETURN(const PlanPrecision precision, plan_precision(plan.precision));
  if (!has_arithmetic(used, precision))
    return Status::invalid("device " + device.name + " has no rate for " + precision.compute +
                           ", which precision " + precision.name + " computes in");
  if (plan.requests.empty() || plan.reuse < 1)
    return Status::invalid("a plan needs a request, and a prefix is used at least once");
  const PlanWork work = count_components(plan.architecture, plan.requests);
  const EngineFactors& e = used.engine;
  int requests = 0;
  for (const WorkShape& shape : plan.requests) requests += shape.batch;
  const double steps = plan.requests[0].steps, layers = work.step.layers;
  const double per_layer = requests > e.loop_requests ? e.composition_us : e.phase_us * e.phases * requests;

  Prediction out{.precision = plan.precision};
  out.vision =
      stage("vision", {&work.vision, 1, e.vision, e.kernel_us * e.kernels * work.vision.layers / 1e3},
            precision, used, device);
  out.prefix =
      stage("prefix", {&work.prefix, 1, e.prefix, e.kernel_us * e.kernels * work.prefix.layers / 1e3},
            precision, used, device);
  out.denoise = stage("denoise", {&work.step, steps, e.step, per_layer * layers * steps / 1e3}, precision,
                      used, device);
  if (plan.requests[0].views == 0) out.vision = {.name = "vision", .bound = "-"};
  out.host_ms = e.host_ms;
  out.ms = out.vision.ms + out.prefix.ms + out.denoise.ms + out.host_ms;
  out.average_ms = (out.vision.ms + out.prefix.ms) / plan.reuse + out.denoise.ms + out.host_ms;
  out.floor_ms = out.vision.floor_ms + out.prefix.floor_ms + out.denoise.floor_ms;
  out.hz = 1000 / out.average_ms;
  return out;
}

Json prediction_to_json(const Prediction& p) {
  Json stages = Json::object();
  for (const StagePrediction* s : {&p.vision, &p.prefix, &p.denoise})
    stages[s->name] = {{"gflop", s->gflop},
                       {"weight_gb", s->weight_gb},
                       {"cache_gb", s->cache_gb},
                       {"floor_ms", s->floor_ms},
                       {"compute_ms", s->compute_ms},
                       {"memory_ms", s->memory_ms},
                       {"latency_ms", s->latency_ms},
                       {"ms", s->ms},
                       {"bound", s->bound}};
  return {{"precision", p.precision},
          {"stages", std::move(stages)},
          {"host_ms", p.host_ms},
          {"ms", p.ms},
          {"average_ms", p.average_ms},
          {"floor_ms", p.floor_ms},
          {"hz", p.hz}};
}

}  // namespace servoflow::toolkit
