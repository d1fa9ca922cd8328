#include "toolkit/compare_noise.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "core/status_macros.h"
#include "quant/matrix.h"
#include "toolkit/case_runner.h"

namespace servoflow::toolkit {
namespace {

class VelocityTap : public CaseTap {
 public:
  bool wants(std::string_view stage) const override {
    return stage.starts_with("step") && stage.ends_with("/v");
  }
  void record(std::string_view, std::span<const float> values, const Shape&) override {
    steps.emplace_back(values.begin(), values.end());
  }
  std::vector<std::vector<float>> steps;
};

}  // namespace

Result<std::map<std::string, double>> noise_powers(
    const weights::WeightSource& source, const KeepingTap& tap,
    const std::map<std::string, quant::LinearFormat>& formats) {
  std::map<std::string, double> out;
  std::map<std::string, std::pair<double, double>> inputs;  // first linear -> (error, whole)
  for (const KeepingTap::One& one : tap.all) {
    if (!one.input) continue;
    for (std::size_t begin = 0; begin < one.name.size();) {
      const std::size_t end = std::min(one.name.find(' ', begin), one.name.size());
      std::string linear = one.name.substr(begin, end - begin);
      begin = end + 1;
      if (linear.ends_with(".weight")) linear.resize(linear.size() - 7);
      const auto it = formats.find(linear);
      if (it == formats.end() || !it->second.input.quantized()) continue;
      std::vector<float> rounded = one.kept.values;
      std::optional<float> scale;
      if (it->second.input.needs_calibration()) {
        const float amax = quant::max_magnitude(rounded);
        scale = it->second.input.code == quant::Code::kE2M1 ? amax / 2688.0f
                                                            : amax / quant::code_max(it->second.input.code);
      }
      if (scale && *scale == 0) continue;
      quant::fake_quantize_rows(it->second.input, rounded.data(), one.kept.rows, one.kept.cols, one.kept.cols,
                                scale);
      auto& [error, whole] = inputs[linear];
      for (std::size_t i = 0; i < rounded.size(); ++i) {
        const double x = static_cast<double>(one.kept.values[i]);
        error += (static_cast<double>(rounded[i]) - x) * (static_cast<double>(rounded[i]) - x);
        whole += x * x;
      }
    }
  }
  for (const auto& [linear, format] : formats) {
    if (!format.quantized() || !source.has(linear + ".weight")) continue;
    SF_ASSIGN_OR_RETURN(double power, weight_noise(source, linear, format, 64));
    if (const auto it = inputs.find(linear); it != inputs.end() && it->second.second > 0)
      power += it->second.first / it->second.second;
    out[linear] = power;
  }
  return out;
}

Result<std::vector<Bound>> noise_bounds(const CompareOptions& options, const weights::Checkpoint& checkpoint,
                                        const std::vector<CaseFile>& cases,
                                        const std::vector<CaseVelocities>& originals,
                                        const std::map<std::string, double>& powers) {
  Difference actions, velocity;
  std::map<std::size_t, Difference> steps;
  for (std::uint64_t draw = 0; draw < 2; ++draw) {
    // A's own precision: what it rounds besides is on both sides.
    CaseRunnerOptions noisy{.device = options.a.device,
                            .precision = options.a.precision,
                            .tokenizer = options.tokenizer,
                            .assets = options.assets,
                            .threads = options.threads,
                            .loading = options.loading,
                            .source = noisy_source(checkpoint.source, powers, draw)};
    SF_ASSIGN_OR_RETURN(const auto runner, CaseRunner::open(checkpoint, cases, noisy));
    for (std::size_t i = 0; i < cases.size(); ++i) {
      VelocityTap tap;
      SF_ASSIGN_OR_RETURN(const CaseOutcome out, runner->run(cases[i], &tap));
      const CaseVelocities& original = originals[i];
      for (std::size_t k = 0; k < out.normalized.size(); ++k)
        actions.add(static_cast<double>(original.normalized[k]), static_cast<double>(out.normalized[k]));
      for (std::size_t j = 0; j < tap.steps.size() && j < original.steps.size(); ++j) {
        const Kept kept =
            thin(tap.steps[j], {checkpoint.architecture.horizon, checkpoint.architecture.action_dim});
        for (std::size_t k = 0; k < kept.values.size(); ++k)
          steps[j].add(static_cast<double>(original.steps[j][k]), static_cast<double>(kept.values[k]));
      }
    }
  }
  std::vector<Bound> out;
  for (const auto& [j, d] : steps) {
    velocity.add(d);
    out.push_back(noise_bound("velocity.cosine.all.step" + std::to_string(j), d.cosine(), 2 * kNoiseFactor));
  }
  out.insert(out.begin(), {noise_bound("velocity.cosine.all", velocity.cosine()),
                           noise_bound("actions.cosine.all", actions.cosine())});
  out.push_back({.metric = "not_finite", .most = 0, .why = "every value is a number"});
  return out;
}

}  // namespace servoflow::toolkit
