#include "toolkit/compare_gates.h"

#include <algorithm>
#include <cmath>
#include <random>

#include "core/status_macros.h"
#include "ops/host_rows.h"
#include "quant/checkpoint.h"
#include "quant/matrix.h"
#include "quant/precision_plan.h"
#include "toolkit/linears.h"

namespace servoflow::toolkit {
namespace {

bool known_metric(const std::string& metric) {
  for (const char* exact :
       {"actions.cosine", "actions.cosine.all", "actions.relative", "velocity.cosine", "velocity.cosine.all",
        "prefix.cosine", "layers.cosine", "dead_outputs", "not_finite", "cases.calibrated_on"})
    if (metric == exact) return true;
  for (const char* family :
       {"velocity.cosine.step", "velocity.cosine.all.step", "actions.mae.", "actions.max."})
    if (metric.starts_with(family) && metric.size() > std::string(family).size()) return true;
  return false;
}

std::uint64_t mix(std::uint64_t z) {  // splitmix64
  z += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

class NoisySource : public weights::WeightSource {
 public:
  NoisySource(std::shared_ptr<const weights::WeightSource> base, std::map<std::string, double> power,
              std::uint64_t seed)
      : base_(std::move(base)), power_(std::move(power)), seed_(seed) {}
  bool has(const std::string& name) const override { return base_->has(name); }
  Result<weights::TensorData> get(const std::string& name) const override {
    SF_ASSIGN_OR_RETURN(weights::TensorData out, base_->get(name));
    const auto it = name.ends_with(".weight") ? power_.find(name.substr(0, name.size() - 7)) : power_.end();
    if (it == power_.end() || it->second <= 0) return out;
    const std::int64_t rows = out.shape[0], cols = out.shape.elements() / rows;
    auto values = std::make_shared<std::vector<float>>(static_cast<std::size_t>(out.shape.elements()));
    const ops::HostMatrix host{out.dtype, static_cast<int>(rows), static_cast<int>(cols), out.bytes, name};
    std::uint64_t state = seed_;
    for (const char c : name) state = mix(state ^ static_cast<unsigned char>(c));
    double square = 0;
    for (std::int64_t r = 0; r < rows; ++r) {
      float* row = values->data() + r * cols;
      SF_RETURN_IF_ERROR(ops::read_row(host, static_cast<int>(r), row));
      for (std::int64_t c = 0; c < cols; ++c)
        square += static_cast<double>(row[c]) * static_cast<double>(row[c]);
    }
    const double sigma = std::sqrt(it->second * square / static_cast<double>(values->size()));
    std::mt19937_64 random(state);
    std::normal_distribution<float> draw(0, static_cast<float>(sigma));
    for (float& v : *values) v += draw(random);
    out.dtype = DType::kF32;
    out.bytes = std::as_bytes(std::span(*values));
    out.owner = values;
    out.sequence.reset();
    return out;
  }
  void release(const std::string& name) const override { base_->release(name); }
  Status token_rows(std::span<const std::int32_t> ids, std::span<float> out) const override {
    return base_->token_rows(ids, out);
  }
  std::string stored_dtype() const override { return base_->stored_dtype(); }

 private:
  std::shared_ptr<const weights::WeightSource> base_;
  std::map<std::string, double> power_;
  std::uint64_t seed_;
};

}  // namespace

Result<std::vector<Bound>> bounds_from_json(const Json& json, const std::string& where) {
  std::vector<Bound> out;
  std::string problems;
  const auto problem = [&](const std::string& text) {
    problems += (problems.empty() ? "" : "\n") + where + ": " + text;
  };
  if (!json.is_object() || json.size() != 1 || !json.contains("gates") || !json["gates"].is_object())
    return Status::invalid(where + R"(: expected {"gates": {METRIC: {"min": NUMBER, "max": NUMBER}, …}})");
  for (const auto& [metric, bound] : json["gates"].items()) {
    if (!known_metric(metric)) problem("gates." + metric + ": no such metric");
    if (!bound.is_object() || bound.empty()) {
      problem("gates." + metric + ": expected min, max or both");
      continue;
    }
    Bound one{.metric = metric, .why = where};
    for (const auto& [key, value] : bound.items()) {
      if ((key != "min" && key != "max") || !value.is_number()) {
        problem("gates." + metric + "." + key + ": only min and max, as numbers");
      } else {
        (key == "min" ? one.least : one.most) = value.get<double>();
      }
    }
    if (one.least && one.most && *one.least > *one.most) problem("gates." + metric + ": min is above max");
    out.push_back(std::move(one));
  }
  if (out.empty() && problems.empty()) problem("gates: empty: nothing would be judged");
  if (!problems.empty()) return Status::invalid(problems);
  return out;
}

Result<std::vector<Bound>> trained_bounds(const std::string& recipe) {
  double least = 0;
  if (recipe.starts_with("fp8-")) {
    least = 0.9998;
  } else if (recipe == "nvfp4-w4a16" || recipe.starts_with("nvfp4-w4a8") || recipe == "mlp-nvfp4") {
    least = 0.9997;
  } else {
    return Status::invalid("--gates trained: no gate is published for \"" + recipe +
                           "\"; fp8-*, nvfp4-w4a16, nvfp4-w4a8* and mlp-nvfp4 have one, others need a file");
  }
  const std::string why = "published gate of trained pi0.5 checkpoints";
  return std::vector<Bound>{{.metric = "actions.cosine", .least = least, .why = why},
                            {.metric = "velocity.cosine", .least = least, .why = why},
                            {.metric = "not_finite", .most = 0, .why = "every value is a number"}};
}

Bound noise_bound(const std::string& metric, double predicted, double factor) {
  Bound out{.metric = metric};
  const double distance = 1 - predicted;
  if (!(distance > 0) || !std::isfinite(distance)) {
    // A prediction without noise bounds nothing: the gate fails closed.
    out.least = 2;
    out.why = "the predicted noise changes nothing: no band follows from it";
    return out;
  }
  out.least = 1 - distance * factor;
  out.most = 1 - distance / factor;
  char text[96];
  std::snprintf(text, sizeof(text), "noise of the format's power gives 1 - %.3g, within a factor of %g",
                distance, factor);
  out.why = text;
  return out;
}

std::vector<GateResult> judge_bounds(const std::vector<Bound>& bounds,
                                     const std::map<std::string, double>& metrics) {
  std::vector<GateResult> out;
  for (const Bound& b : bounds) {
    GateResult g{.metric = b.metric, .least = b.least, .most = b.most, .why = b.why};
    const auto it = metrics.find(b.metric);
    if (it == metrics.end()) {
      g.why = "the comparison has no such value; " + b.why;
    } else if (!std::isfinite(it->second)) {
      g.why = "not a finite number; " + b.why;
    } else {
      g.value = it->second;
      g.pass =
          (b.least || b.most) && (!b.least || it->second >= *b.least) && (!b.most || it->second <= *b.most);
    }
    out.push_back(std::move(g));
  }
  return out;
}

Result<std::map<std::string, quant::LinearFormat>> formats_of(const weights::Checkpoint& checkpoint,
                                                              const std::string& precision) {
  std::map<std::string, quant::LinearFormat> out;
  const std::vector<quant::Linear> linears = linear_layers(checkpoint.architecture);
  SF_ASSIGN_OR_RETURN(const auto config,
                      quant::find_quant_config(checkpoint.config, checkpoint.path + "/config.json"));
  if (precision == "fp32" || precision == "bf16") return out;
  if (config) {
    for (const quant::Linear& l : linears)
      if (const quant::ConfigGroup* group = config->group_of(l.name)) out[l.name] = group->format;
    return out;
  }
  if (precision == "auto") return out;
  SF_ASSIGN_OR_RETURN(const quant::PrecisionPlan plan, quant::load_plan(precision));
  SF_ASSIGN_OR_RETURN(const std::vector<quant::LinearFormat> formats, plan.resolve(linears));
  for (std::size_t i = 0; i < linears.size(); ++i)
    if (formats[i].quantized()) out[linears[i].name] = formats[i];
  return out;
}

std::shared_ptr<const weights::WeightSource> noisy_source(std::shared_ptr<const weights::WeightSource> base,
                                                          std::map<std::string, double> power,
                                                          std::uint64_t seed) {
  return std::make_shared<NoisySource>(std::move(base), std::move(power), seed);
}

Result<double> weight_noise(const weights::WeightSource& source, const std::string& linear,
                            const quant::LinearFormat& format, int rows) {
  SF_ASSIGN_OR_RETURN(const weights::TensorData tensor, source.get(linear + ".weight"));
  const std::int64_t all = tensor.shape[0], cols = tensor.shape.elements() / all;
  const std::int64_t n = std::min<std::int64_t>(all, rows);
  std::vector<float> w(static_cast<std::size_t>(n * cols));
  const ops::HostMatrix host{tensor.dtype, static_cast<int>(all), static_cast<int>(cols), tensor.bytes,
                             linear};
  for (std::int64_t i = 0; i < n; ++i)
    SF_RETURN_IF_ERROR(ops::read_row(host, static_cast<int>(i * all / n), w.data() + i * cols));
  SF_ASSIGN_OR_RETURN(const quant::QuantizedMatrix m, quant::quantize(w, n, cols, format));
  const std::vector<float> rounded = quant::dequantize(m);
  double error = 0, whole = 0;
  for (std::size_t i = 0; i < w.size(); ++i) {
    const double d = static_cast<double>(rounded[i]) - static_cast<double>(w[i]);
    error += d * d;
    whole += static_cast<double>(w[i]) * static_cast<double>(w[i]);
  }
  return whole > 0 ? error / whole : 0.0;
}

}  // namespace servoflow::toolkit
