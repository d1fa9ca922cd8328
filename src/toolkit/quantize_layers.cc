#include "toolkit/quantize_layers.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "core/status_macros.h"
#include "quant/matrix.h"
#include "quant/methods/gptq.h"
#include "quant/methods/smoothing.h"
#include "quant/methods/weight_grid.h"
#include "quant/patterns.h"
#include "weights/manifest.h"

namespace servoflow::toolkit {
namespace {

constexpr int kSearchRows = 256;  // of each weight in searches for multipliers, evenly spread

double squared_error(std::span<const float> a, std::span<const float> b) {
  double error = 0, whole = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double d = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    error += d * d;
    whole += static_cast<double>(a[i]) * static_cast<double>(a[i]);
  }
  return whole > 0 ? error / whole : 0;
}

// Outputs' error with uncorrelated inputs: Σ (δw)² E[x²] over Σ w² E[x²].
double diagonal_error(std::span<const float> mean_square, std::span<const float> w,
                      std::span<const float> changed) {
  double error = 0, whole = 0;
  for (std::size_t i = 0; i < w.size(); ++i) {
    const double x = static_cast<double>(mean_square[i % mean_square.size()]);
    const double d = static_cast<double>(changed[i]) - static_cast<double>(w[i]);
    error += d * d * x;
    whole += static_cast<double>(w[i]) * static_cast<double>(w[i]) * x;
  }
  return whole > 0 ? error / whole : 0;
}

double error_of(const std::optional<quant::SecondMoment>& moment, std::span<const float> mean_square,
                std::span<const float> w, std::span<const float> changed) {
  return moment ? quant::output_error(*moment, w, changed) : diagonal_error(mean_square, w, changed);
}

}  // namespace

Result<std::unique_ptr<LayerQuantizer>> LayerQuantizer::prepare(
    const weights::Checkpoint& checkpoint, const QuantizeOptions& options,
    const CalibrationStatistics* statistics, std::map<std::string, quant::LinearFormat> formats) {
  std::unique_ptr<LayerQuantizer> q(new LayerQuantizer(options));
  q->formats_ = std::move(formats);
  q->sites_ = sites(checkpoint.architecture);
  q->source_ = std::make_shared<EditedSource>(checkpoint.source);
  for (const auto& [name, format] : q->formats_) q->states_[name] = {};
  std::map<std::string, SiteState> states;  // by a site's first layer
  for (const Site& site : q->sites_) {
    SiteState& state = states[site.linears.front()];
    state.site = &site;
    if (statistics == nullptr) continue;
    const auto it = statistics->sites.find(site.linears.front());
    if (it == statistics->sites.end()) continue;
    if (it->second.width != site.width)
      return Status::invalid(options.statistics + ": " + site.linears.front() + " has " +
                             std::to_string(it->second.width) + " input channels there, " +
                             std::to_string(site.width) + " in the checkpoint");
    state.statistics = &it->second;
  }
  const std::vector<quant::Linear> all = linear_layers(checkpoint.architecture);
  SF_RETURN_IF_ERROR(q->choose_clipped(all, states));
  for (const Site& site : q->sites_) {
    // The expert's output projection, which comes later, decides for the prefix's as well.
    const bool shared = !site.other_linear.empty();
    if (shared && !site.linears.front().starts_with(weights::kExpertPrefix)) continue;
    SF_RETURN_IF_ERROR(
        q->smooth(states[site.linears.front()], shared ? &states[site.other_linear] : nullptr));
  }
  for (const auto& [name, state] : states)
    for (const std::string& linear : state.site->linears)
      if (q->states_.contains(linear)) q->states_[linear] = state;
  for (const std::string& name : q->clipped_)
    if (!options.clip.empty() && !q->states_.at(name).m.empty())
      return Status::invalid("--clip: the inputs of " + name +
                             " are smoothed, and what is known of their distribution is from before; leave "
                             "the layer out or pass --smooth none");
  std::vector<quant::Linear> linears;
  for (const quant::Linear& l : all)
    if (q->formats_.contains(l.name)) linears.push_back(l);
  for (const std::vector<std::size_t>& set : quant::fused_sets(linears)) {
    std::vector<std::string> names;
    for (const std::size_t i : set) names.push_back(linears[i].name);
    for (const std::string& name : names) q->fused_[name] = names;
  }
  return q;
}

Status LayerQuantizer::choose_clipped(std::span<const quant::Linear> linears,
                                      const std::map<std::string, SiteState>& states) {
  if (options_.clip.empty()) {
    for (const auto& [name, format] : formats_) clipped_.insert(name);
    return {};
  }
  if (options_.calibrator.kind == quant::Calibrator::kMinMax)
    return Status::invalid(
        "--clip: the calibrator minmax keeps the whole range; choose --calibrator "
        "percentile, mse or kl");
  std::map<std::string, const SiteState*> reads;  // what a layer's inputs are
  for (const auto& [first, state] : states)
    for (const std::string& linear : state.site->linears) reads[linear] = &state;
  for (const std::string& glob : options_.clip) {
    int named = 0, clipped = 0;
    for (const quant::Linear& l : linears) {
      if (!quant::glob_matches(glob, l.name)) continue;
      ++named;
      const auto site = reads.find(l.name);
      if (site == reads.end() || site->second->statistics == nullptr) continue;
      for (const std::string& linear : site->second->site->linears) {
        const auto format = formats_.find(linear);
        if (format == formats_.end() || !format->second.input.needs_calibration()) continue;
        clipped_.insert(linear);
        ++clipped;
      }
    }
    if (named == 0) return Status::invalid("--clip " + glob + ": matches no linear layer of the checkpoint");
    if (clipped == 0)
      return Status::invalid("--clip " + glob +
                             ": no layer that it matches has a calibrated input scale in " + options_.recipe +
                             ", so that there is nothing to clip");
  }
  return {};
}

Result<std::vector<float>> LayerQuantizer::shared_rows(const std::string& linear, int rows,
                                                       std::int64_t cols) const {
  SF_ASSIGN_OR_RETURN(std::vector<float> all, source_->values(linear + ".weight"));
  const std::int64_t have = static_cast<std::int64_t>(all.size()) / cols,
                     n = std::min<std::int64_t>(have, rows);
  std::vector<float> out;
  for (std::int64_t i = 0; i < n; ++i) {
    const auto row = all.begin() + i * have / n * cols;
    out.insert(out.end(), row, row + cols);
  }
  return out;
}

std::vector<float> LayerQuantizer::mean_square(const SiteState& state, bool folded) const {
  std::vector<float> out;
  if (state.statistics == nullptr) return out;
  for (std::size_t c = 0; c < state.statistics->channel_square.size(); ++c) {
    const double m = state.m.empty() || !folded ? 1 : static_cast<double>(state.m[c]);
    out.push_back(static_cast<float>(state.statistics->channel_square[c] * m * m /
                                     static_cast<double>(state.statistics->rows)));
  }
  return out;
}

std::optional<quant::SecondMoment> LayerQuantizer::moment(const SiteState& state) const {
  if (state.statistics == nullptr || !state.statistics->moment) return std::nullopt;
  return state.m.empty() ? *state.statistics->moment : state.statistics->moment->scaled(state.m);
}

namespace {

// What is needed to judge multipliers at one site.
struct Judged {
  const SiteStatistics* statistics = nullptr;
  std::vector<float> w;  // of all consumers, below each other, thinned out
  std::int64_t rows = 0, cols = 0;
  quant::LinearFormat format;
  std::optional<quant::SecondMoment> moment;
  std::vector<float> mean_square;
};

// What the weights lose on these inputs, and, where `inputs_too`, what 8-bit inputs lose: a token's step is
// its largest magnitude over 127, here the largest of the statistics, and rounding leaves a twelfth of its
// square in each channel.
Result<double> loss_of(const Judged& j, std::span<const float> m, bool inputs_too) {
  const auto k = static_cast<std::size_t>(j.cols);
  const std::vector<float> divided = quant::divide_columns(j.w, m);
  SF_ASSIGN_OR_RETURN(const quant::QuantizedMatrix matrix,
                      quant::quantize(divided, j.rows, j.cols, j.format));
  std::vector<float> back = quant::dequantize(matrix);
  for (std::size_t i = 0; i < back.size(); ++i) back[i] *= m[i % k];
  const double out = error_of(j.moment, j.mean_square, j.w, back);
  if (!inputs_too) return out;
  float amax = 0;
  for (std::size_t c = 0; c < k; ++c) amax = std::max(amax, j.statistics->channel_amax[c] * m[c]);
  const double step = static_cast<double>(amax) / 127;
  double inputs = 0, whole = 0;
  for (std::size_t i = 0; i < j.w.size(); ++i) {
    const double d = static_cast<double>(divided[i]), x = static_cast<double>(j.w[i]);
    inputs += d * d;
    whole += x * x * static_cast<double>(j.mean_square[i % k]);
  }
  return whole > 0 ? out + inputs * step * step / 12 / whole : out;
}

}  // namespace

Status LayerQuantizer::smooth(SiteState& state, SiteState* other) {
  const Site& site = *state.site;
  const auto format_of = [&](const SiteState& s) -> const quant::LinearFormat* {
    const auto it = formats_.find(s.site->linears.front());
    return it == formats_.end() || !it->second.quantized() ? nullptr : &it->second;
  };
  if (site.producer == Producer::kNone) return {};
  std::vector<Judged> judged;
  Smoothing kind = options_.smoothing;
  for (SiteState* one : {&state, other}) {
    if (one == nullptr || one->statistics == nullptr) continue;
    const quant::LinearFormat* format = format_of(*one);
    if (format == nullptr) continue;
    if (options_.smoothing == Smoothing::kAuto && kind == Smoothing::kAuto &&
        format->input.code == quant::Code::kInt8)
      kind = Smoothing::kSmoothQuant;
    Judged j{.statistics = one->statistics,
             .cols = site.width,
             .format = *format,
             .moment = moment(*one),
             .mean_square = mean_square(*one)};
    for (const std::string& linear : one->site->linears) {
      SF_ASSIGN_OR_RETURN(const std::vector<float> rows, shared_rows(linear, kSearchRows, site.width));
      j.w.insert(j.w.end(), rows.begin(), rows.end());
    }
    j.rows = static_cast<std::int64_t>(j.w.size()) / site.width;
    judged.push_back(std::move(j));
  }
  if (judged.empty() || (kind != Smoothing::kSmoothQuant && kind != Smoothing::kAwq)) return {};
  const auto k = static_cast<std::size_t>(site.width);
  Status broken;
  const auto loss = [&](std::span<const float> m) {
    double sum = 0;
    for (const Judged& j : judged) {
      const Result<double> one = loss_of(j, m, kind == Smoothing::kSmoothQuant);
      if (!one.ok()) broken = one.status();
      sum += one.ok() ? *one : 0;
    }
    return sum;
  };
  std::vector<float> amax(k), mean(k), weight_amax(k);
  for (const Judged& j : judged) {
    quant::raise_column_amax(j.statistics->channel_amax, amax);
    quant::raise_column_amax(j.w, weight_amax);
    for (std::size_t c = 0; c < k; ++c)
      mean[c] += static_cast<float>(j.statistics->channel_abs[c] / static_cast<double>(j.statistics->rows));
  }
  const quant::Smoothing best = kind == Smoothing::kSmoothQuant
                                    ? quant::search_smoothquant(amax, weight_amax, loss, site.tie)
                                    : quant::search_awq(mean, loss, site.tie);
  if (!broken.ok()) return broken.with_context(site.linears.front());
  const bool nothing = std::all_of(best.input.begin(), best.input.end(), [](float m) { return m == 1; });
  if (!nothing) SF_RETURN_IF_ERROR(source_->fold(site, best.input));
  for (SiteState* one : {&state, other}) {
    if (one == nullptr) continue;
    one->method = fmt::format("{}({})", kind == Smoothing::kAwq ? "awq" : "smoothquant",
                              nothing ? std::string("none better") : fmt::format("{:.2f}", best.alpha));
    one->error = best.loss / static_cast<double>(judged.size());
    one->error_unsmoothed = best.loss_unchanged / static_cast<double>(judged.size());
    if (!nothing) one->m = best.input;
  }
  return {};
}

Result<std::optional<float>> LayerQuantizer::shared_amax(const std::string& linear, bool folded) const {
  const auto it = fused_.find(linear);
  if (it == fused_.end()) return std::optional<float>();
  float out = 0;
  for (const std::string& name : it->second) {
    SF_ASSIGN_OR_RETURN(const std::vector<float> w,
                        folded ? source_->values(name + ".weight") : source_->original(name + ".weight"));
    out = std::max(out, quant::max_magnitude(w));
  }
  return std::optional<float>(out);
}

Status LayerQuantizer::set_input_scale(const SiteState& state, const quant::LinearFormat& format,
                                       quant::QuantizedMatrix& matrix, LayerReport& report) const {
  if (!format.input.needs_calibration()) return {};
  float threshold = 1;
  if (state.statistics == nullptr) {
    report.note = "never computed by the network: its input scale is for a range of 1";
  } else if (state.m.empty()) {
    const quant::Histogram inputs = state.statistics->all_steps();
    Result<float> clipped = quant::clipping_threshold(
        inputs, quant::lattice_of(format.input.code),
        clipped_.contains(report.name) ? options_.calibrator : quant::CalibratorOptions());
    if (!clipped.ok()) return clipped.status().with_context(report.name);
    threshold = *clipped;
    if (threshold < inputs.amax()) report.input_clip = threshold;
    for (const quant::Histogram& h : state.statistics->steps) report.step_input_amax.push_back(h.amax());
  } else {  // histograms are of the inputs before smoothing; the channels' ranges carry over
    threshold = 0;
    for (std::size_t c = 0; c < state.m.size(); ++c)
      threshold = std::max(threshold, state.statistics->channel_amax[c] * state.m[c]);
    if (options_.calibrator.kind != quant::Calibrator::kMinMax)
      report.note = "smoothed inputs: minmax was used for the input scale";
  }
  if (threshold <= 0) threshold = 1;
  const bool two_levels = format.input.code == quant::Code::kE2M1;
  matrix.input_scale = two_levels ? threshold / 2688.0f : threshold / quant::code_max(format.input.code);
  report.input_scale = matrix.input_scale;
  return {};
}

namespace {

struct Errors {
  double weights = 0;
  std::optional<double> outputs;  // where there are statistics
  bool operator<(const Errors& other) const {
    return outputs ? *outputs < *other.outputs : weights < other.weights;
  }
};

// What changed weights of one layer lose, in the checkpoint's own units.
class ErrorMeter {
 public:
  // `mean_square` of the unsmoothed inputs; `moment`, where there is one, in its place.
  ErrorMeter(std::span<const float> original, std::vector<float> mean_square,
             const quant::SecondMoment* moment)
      : original_(original), mean_square_(std::move(mean_square)), moment_(moment) {
    if (moment_ != nullptr) whole_ = quant::output_square(*moment_, original_);
  }

  Errors of(std::span<const float> changed) const {
    Errors e{.weights = squared_error(original_, changed)};
    if (!mean_square_.empty()) e.outputs = outputs(changed);
    return e;
  }
  // With `mean`, that of the inputs: once the biases have taken out each output's mean error.
  double outputs(std::span<const float> changed, std::span<const float> mean = {}) const {
    if (moment_ == nullptr) return diagonal_error(mean_square_, original_, changed);
    std::vector<float> difference(changed.begin(), changed.end());
    for (std::size_t i = 0; i < difference.size(); ++i) difference[i] -= original_[i];
    return whole_ > 0 ? quant::output_square(*moment_, difference, mean) / whole_ : 0;
  }

 private:
  std::span<const float> original_;
  std::vector<float> mean_square_;
  const quant::SecondMoment* moment_;
  double whole_ = 0;  // squared size of the outputs
};

}  // namespace

Result<LayerQuantizer::Layer> LayerQuantizer::quantize(const quant::Linear& linear, bool has_bias) const {
  const quant::LinearFormat& format = formats_.at(linear.name);
  const SiteState& state = states_.at(linear.name);
  const std::string weight = linear.name + ".weight";
  SF_ASSIGN_OR_RETURN(const std::vector<float> w, source_->values(weight));
  const bool folded = source_->edits(weight);
  std::vector<float> unfolded;  // the checkpoint's own, where multipliers are folded into w
  if (folded) {
    SF_ASSIGN_OR_RETURN(unfolded, source_->original(weight));
  }
  const std::vector<float>& original = folded ? unfolded : w;
  quant::ScaleOptions scale{.convention = options_.layout};
  if (format.weight.global_scale) {
    SF_ASSIGN_OR_RETURN(scale.amax, shared_amax(linear.name, true));
  }
  Layer out;
  LayerReport& r = out.report;
  r.name = linear.name;
  r.format = quant::name(format);
  r.rows = linear.rows;
  r.cols = linear.cols;
  r.bits = quant::bits_per_weight(format.weight, linear.rows, linear.cols);
  r.method = state.method;
  r.smoothing_error = state.error;
  r.smoothing_error_nearest = state.error_unsmoothed;
  const auto add_method = [&](const std::string& name) { r.method += (r.method.empty() ? "" : " ") + name; };

  const quant::SecondMoment* seen =
      state.statistics != nullptr && state.statistics->moment ? &*state.statistics->moment : nullptr;
  const ErrorMeter meter(original, mean_square(state, false), seen);
  const auto in_own_units = [&](std::vector<float> changed) {
    source_->unfold(weight, changed);
    return changed;
  };

  Result<quant::QuantizedMatrix> nearest = quant::quantize(w, linear.rows, linear.cols, format, scale);
  if (!nearest.ok()) return nearest.status().with_context(linear.name);
  out.matrix = std::move(*nearest);
  std::vector<float> values = quant::dequantize(out.matrix);
  Errors errors = meter.of(in_own_units(values)), errors_nearest = errors;
  if (folded) {
    quant::ScaleOptions plain = scale;
    if (format.weight.global_scale) {
      SF_ASSIGN_OR_RETURN(plain.amax, shared_amax(linear.name, false));
    }
    Result<quant::QuantizedMatrix> reference =
        quant::quantize(original, linear.rows, linear.cols, format, plain);
    if (!reference.ok()) return reference.status().with_context(linear.name);
    errors_nearest = meter.of(quant::dequantize(*reference));
  }

  // Takes the candidate if it is better than what is there.
  const auto improve = [&](const quant::Grid& grid, const std::vector<float>& candidate) -> Result<bool> {
    const Errors e = meter.of(in_own_units(candidate));
    if (!(e < errors)) return false;
    SF_ASSIGN_OR_RETURN(quant::QuantizedMatrix encoded, quant::encode_on_grid(grid, candidate, format));
    encoded.convention = out.matrix.convention;
    encoded.file_global_scale = out.matrix.file_global_scale;  // bit for bit, whichever direction it has
    out.matrix = std::move(encoded);
    values = quant::dequantize(out.matrix);
    errors = values == candidate ? e : meter.of(in_own_units(values));
    return true;
  };
  quant::Grid grid = quant::grid_of(out.matrix);
  if (options_.scales == ScaleChoice::kLeastSquares) {
    const quant::Grid searched = quant::least_squares(grid, w, mean_square(state));
    SF_ASSIGN_OR_RETURN(const bool better, improve(searched, quant::round_to_grid(searched, w)));
    if (better) {
      grid = searched;
      add_method("least-squares");
    } else {
      r.note = "round-to-nearest beats least-squares scales";
    }
  }
  if (options_.rounding == Rounding::kGptq && seen != nullptr) {
    // Not copied where nothing is folded: it has 8 K² bytes.
    const std::optional<quant::SecondMoment> scaled =
        state.m.empty() ? std::nullopt : std::optional(seen->scaled(state.m));
    Result<std::vector<float>> candidate = quant::gptq(grid, w, scaled ? *scaled : *seen);
    if (!candidate.ok()) return candidate.status().with_context(linear.name);
    SF_ASSIGN_OR_RETURN(const bool better, improve(grid, *candidate));
    if (better) {
      add_method("gptq");
    } else {
      r.note = "round-to-nearest beats gptq";
    }
  }
  if (r.method.empty()) r.method = "nearest";
  if (options_.correct_bias && has_bias && state.statistics != nullptr) {
    SF_ASSIGN_OR_RETURN(std::vector<float> bias, source_->values(linear.name + ".bias"));
    std::vector<float> mean, folded_mean;
    for (std::size_t c = 0; c < state.statistics->channel_sum.size(); ++c) {
      mean.push_back(
          static_cast<float>(state.statistics->channel_sum[c] / static_cast<double>(state.statistics->rows)));
      folded_mean.push_back(mean.back() * (state.m.empty() ? 1 : state.m[c]));
    }
    quant::correct_bias(w, values, folded_mean, bias);
    if (seen != nullptr) errors.outputs = meter.outputs(in_own_units(values), mean);
    out.bias = std::move(bias);
    add_method("bias");
  }
  r.weight_error = errors.weights;
  r.output_error = errors.outputs;
  r.weight_error_nearest = errors_nearest.weights;
  r.output_error_nearest = errors_nearest.outputs;
  if (!state.m.empty() && r.note.empty() && r.output_error > r.output_error_nearest)
    r.note =
        "round-to-nearest without multipliers has the smaller output error here; they were chosen for all "
        "layers that share them";
  SF_RETURN_IF_ERROR(set_input_scale(state, format, out.matrix, r));
  return out;
}

}  // namespace servoflow::toolkit
