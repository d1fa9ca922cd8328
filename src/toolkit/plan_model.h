// How long an inference takes on a device, from exact counts, the device's rates and what the engine was seen
// to make of them:
//
//   compute = products / (rate of the precision x share) + attention / (rate of bf16 x share)
//   memory  = (weights + K and V) / bandwidth
//   stage   = sqrt(compute^2 + memory^2) + latency
//
// The root lies between perfect overlap (the larger of the two, which is the floor) and none (their sum).
// Latency is a time per kernel in vision and prefix, and per phase (or per layer, in the composition) in the
// denoise loop.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "core/json.h"
#include "toolkit/device_profile.h"
#include "toolkit/plan_work.h"

namespace servoflow::toolkit {

// A row of the table of precisions, by the names of the engine's recipes: what is stored and what multiplies.
// Attention, K and V stay in BF16 (FP32 in fp32).
struct PlanPrecision {
  const char* name;
  double weight_bits;   // with the scales of blocks
  const char* compute;  // "fp32", "bf16", "fp8", "int8", "fp4"
  const char* only;     // the component it is about, the others stay in bf16; null: all
  int risk;             // see plan_search.h
  const char* about;
};
std::span<const PlanPrecision> plan_precisions();
// A name may end in -static or -dynamic. An error lists the names.
Result<PlanPrecision> plan_precision(const std::string& name);
// Whether the device multiplies in this precision at all.
bool has_arithmetic(const UsedRates& rates, const PlanPrecision& precision);

struct PlanCase {
  weights::Architecture architecture;
  std::vector<WorkShape> requests = {{}};  // of one pass; steps are those of the first
  std::string precision = "bf16";
  int reuse = 1;  // inferences that share a prefix and its pictures: 1 computes it each time
};

struct StagePrediction {
  std::string name;
  double gflop = 0, weight_gb = 0, cache_gb = 0;  // of the stage in one inference, all steps
  double floor_ms = 0, compute_ms = 0, memory_ms = 0, latency_ms = 0, ms = 0;
  const char* bound = "";  // the largest of the three: "compute", "memory", "latency"
};

struct Prediction {
  StagePrediction vision, prefix, denoise;
  double host_ms = 0;
  double ms = 0;          // of an inference that computes everything
  double average_ms = 0;  // over `reuse` inferences
  double floor_ms = 0;    // of `ms`: the larger of arithmetic and memory per stage, at the best known rates
  double hz = 0;          // inferences a second, 1000 / average_ms
  std::string precision;
};

Result<Prediction> predict(const PlanCase& plan, const DeviceProfile& device, const UsedRates& rates);

Json prediction_to_json(const Prediction& prediction);

// Bytes of the packed weights and of everything a policy holds on the device.
struct PlanMemory {
  double weights = 0, workspace = 0, token_table = 0;
  double total(bool gpu) const { return weights + workspace + (gpu ? token_table : 0); }
};
Result<PlanMemory> predict_memory(const weights::Architecture& architecture, const PlanPrecision& precision,
                                  int requests, int pictures);

}  // namespace servoflow::toolkit
