// What a comparison must hold. Bounds have two sides: on random weights a result far better than the format's
// own noise is as suspicious as one far worse, because then the format did not run.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "quant/formats.h"
#include "toolkit/compare.h"
#include "weights/checkpoint.h"

namespace servoflow::toolkit {

struct Bound {
  std::string metric;
  std::optional<double> least, most;
  std::string why;
};

// {"gates": {"velocity.cosine": {"min": 0.999, "max": 0.9999999}, …}}. Unknown keys and metrics nobody knows
// are errors.
Result<std::vector<Bound>> bounds_from_json(const Json& json, const std::string& where);

// The gate on a trained policy of published size, by the name of a recipe: the cosine of its actions that
// published engines gate with (FlashRT: 0.9997 for NVFP4 weights, 0.9998 for FP8), and the same for each
// step's velocity, since the noise that actions begin with hides errors. Fails for a recipe without a
// published gate.
Result<std::vector<Bound>> trained_bounds(const std::string& recipe);

// Bounds from a noise of the same power: `predicted` is what Gaussian noise of the format's own strength did
// to this metric. The factor allows for the noise's shape: rounding errors are neither independent nor
// normal.
inline constexpr double kNoiseFactor = 4;
Bound noise_bound(const std::string& metric, double predicted_cosine, double factor = kNoiseFactor);

// Every bound against the metrics; a bound whose metric is missing or not finite fails.
std::vector<GateResult> judge_bounds(const std::vector<Bound>& bounds,
                                     const std::map<std::string, double>& metrics);

// Formats of all linear layers of a side: of a recipe or plan that a float checkpoint runs, or of a quantized
// checkpoint. Empty for plain fp32 and bf16.
Result<std::map<std::string, quant::LinearFormat>> formats_of(const weights::Checkpoint& checkpoint,
                                                              const std::string& precision);

// The checkpoint's weights with Gaussian noise: of each layer's weight the share `power[layer]` of its mean
// square. Deterministic in `seed` and the layer's name.
std::shared_ptr<const weights::WeightSource> noisy_source(std::shared_ptr<const weights::WeightSource> base,
                                                          std::map<std::string, double> power,
                                                          std::uint64_t seed);
// Mean square of (rounded - w) over that of w, by round-to-nearest, over at most `rows` evenly spread rows.
Result<double> weight_noise(const weights::WeightSource& source, const std::string& linear,
                            const quant::LinearFormat& format, int rows);

}  // namespace servoflow::toolkit
