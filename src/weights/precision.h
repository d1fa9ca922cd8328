// What --precision means for one network: which layers are rounded, to what, and what the rest computes in.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "ops/backend.h"
#include "quant/precision_plan.h"
#include "weights/architecture.h"
#include "weights/weight_source.h"

namespace servoflow::weights {

struct Precision {
  std::string base = "auto";  // of everything that is not quantized: ops::BackendOptions::precision
  std::string name;           // for reports: the recipe, or what the checkpoint holds; empty: the base's own
  // Layers rounded to nearest while they are loaded, by name without ".weight".
  std::map<std::string, quant::LinearFormat> rounding;
  bool dequantize = false;  // a quantized checkpoint runs in the base's precision
};

// `option` (empty is auto): auto, fp32, bf16, the name of a recipe, or a plan's file. A quantized checkpoint
// runs as it is with auto and dequantized with fp32 and bf16; it cannot be rounded again. A plan with static
// input scales needs a calibrated checkpoint. Errors list everything wrong with a plan.
Result<Precision> choose_precision(const std::string& option, const Architecture& architecture,
                                   const WeightSource& source);

// The network's linear layers: what a plan may name.
std::vector<quant::Linear> linear_layers(const Architecture& architecture);

// Every format that a network opened so will ask its backend for. Fails, naming format, backend and what to
// do instead, if the backend has no kernel for one.
Status check_kernels(const ops::Backend& backend, const Precision& precision, const WeightSource& source);

// Rounds a matrix of floats to nearest by blocks of rows on `threads` threads: what quant::quantize gives,
// without a float32 copy of the whole. `amax`: shared with other matrices (ScaleOptions).
Result<quant::QuantizedMatrix> round_matrix(const ops::HostMatrix& host, const quant::LinearFormat& format,
                                            std::optional<float> amax, int threads);
// Largest magnitude of all.
Result<float> shared_amax(const std::vector<ops::HostMatrix>& parts);

}  // namespace servoflow::weights
