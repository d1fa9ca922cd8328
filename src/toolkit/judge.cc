#include "toolkit/judge.h"

#include <algorithm>
#include <cmath>

namespace servoflow::toolkit {
namespace {

// How many times `used` fits into `allowed`.
double fits(double used, double allowed) {
  if (!(used >= 0)) return 0;  // a NaN never fits
  if (used == 0) return kMaxHeadroom;
  return std::min(allowed / used, kMaxHeadroom);
}

void fail(Record& record, const std::string& note) {
  record.judged = true;
  record.pass = false;
  record.headroom = 0;
  record.note = note;
}

// The numbers every stage is reported with. False when they cannot be compared at all.
bool measure(const Values& expected, const Values& got, Record& record) {
  record.rms = root_mean_square(expected.data);
  if (!(expected.shape == got.shape) || expected.data.size() != got.data.size()) {
    record.max_abs = record.relative = record.rms_error = NAN;
    record.cosine = NAN;
    fail(record, "shape " + got.shape.to_string() + " instead of " + expected.shape.to_string());
    return false;
  }
  double square = 0, dot = 0, expected_square = 0, got_square = 0;
  std::size_t broken = 0;
  for (std::size_t i = 0; i < expected.data.size(); ++i) {
    const double w = expected.data[i], g = got.data[i], d = g - w;
    if (!std::isfinite(d)) {
      ++broken;
      continue;
    }
    record.max_abs = std::max(record.max_abs, std::abs(d));
    square += d * d;
    dot += w * g;
    expected_square += w * w;
    got_square += g * g;
  }
  const double n = static_cast<double>(std::max<std::size_t>(expected.data.size(), 1));
  const auto share = [&](double error) { return error == 0 ? 0 : error / record.rms; };
  record.relative = share(record.max_abs);
  record.rms_error = share(std::sqrt(square / n));
  const double norms = std::sqrt(expected_square) * std::sqrt(got_square);
  record.cosine = norms > 0 ? dot / norms : expected_square == got_square ? 1 : 0;
  if (broken == 0) return true;
  record.max_abs = record.relative = record.rms_error = record.cosine = NAN;
  fail(record,
       std::to_string(broken) + " of " + std::to_string(expected.data.size()) + " values are not finite");
  return false;
}

// Applies the gates that hold for a whole tensor.
void gate(Record& record, std::optional<double> max_headroom) {
  const Gates& g = record.gates;
  double headroom = kMaxHeadroom;
  bool pass = true;
  if (max_headroom) {
    headroom = *max_headroom;
    pass = headroom >= 1;
  }
  if (g.rms) {
    headroom = std::min(headroom, fits(record.rms_error, *g.rms));
    pass = pass && record.rms_error <= *g.rms;
  }
  if (g.cosine) {
    // Rounding may leave a cosine a hair above 1.
    headroom = std::min(headroom, fits(std::max(1 - record.cosine, 0.0), 1 - *g.cosine));
    pass = pass && record.cosine >= *g.cosine;
  }
  record.judged = g.max || g.rms || g.cosine;
  record.headroom = record.judged ? headroom : 0;
  record.pass = pass;
}

Json number(double value) { return std::isfinite(value) ? Json(value) : Json(nullptr); }

}  // namespace

double root_mean_square(std::span<const double> values) {
  double square = 0;
  for (double x : values) square += x * x;
  return values.empty() ? 0 : std::sqrt(square / static_cast<double>(values.size()));
}

Record judge_stage(const StageName& stage, const Values& expected, const Values& got, const Gates& gates) {
  Record record{.stage = stage.name, .group = stage.group, .gates = gates};
  if (!measure(expected, got, record)) return record;
  gate(record, gates.max ? std::optional(fits(record.max_abs, *gates.max * record.rms)) : std::nullopt);
  return record;
}

Record judge_actions(const Values& expected, const Values& got, const Gates& gates,
                     std::span<const double> scale, double normalized_rms) {
  Record record{.stage = "actions", .group = "actions", .gates = gates};
  if (!measure(expected, got, record)) return record;
  std::optional<double> headroom;
  if (gates.max) {
    headroom = kMaxHeadroom;
    for (std::size_t i = 0; i < expected.data.size(); ++i) {
      const double w = expected.data[i];
      const double allowed =
          *gates.max * std::abs(scale[i % scale.size()]) * normalized_rms + std::abs(w) * 0x1p-22;
      headroom = std::min(*headroom, fits(std::abs(got.data[i] - w), allowed));
    }
  }
  gate(record, headroom);
  return record;
}

Record judge_exact(const StageName& stage, const Values& expected, const Values& got) {
  Record record{.stage = stage.name, .group = stage.group, .gates = {.max = 0}};
  if (!measure(expected, got, record)) return record;
  record.judged = true;
  record.headroom = kMaxHeadroom;
  for (std::size_t i = 0; i < expected.data.size(); ++i) {
    if (expected.data[i] == got.data[i]) continue;
    fail(record, "first difference at [" + std::to_string(i) +
                     "]: " + std::to_string(static_cast<long long>(got.data[i])) + " instead of " +
                     std::to_string(static_cast<long long>(expected.data[i])));
    break;
  }
  return record;
}

std::vector<double> action_scale(const contract::Normalization& norm, int width) {
  std::vector<double> out(static_cast<std::size_t>(std::max(width, 0)), 1.0);
  const contract::Statistics& s = norm.stats;
  const bool openpi = norm.style == contract::NormStyle::kOpenpi;
  for (std::size_t i = 0; i < out.size(); ++i) {
    if (norm.kind == contract::NormKind::kQuantile && i < s.q01.size() && i < s.q99.size()) {
      const double gap = s.q99[i] - s.q01[i];
      out[i] = (openpi ? gap + 1e-6 : gap == 0 ? 1e-8 : gap) / 2;
    } else if (norm.kind == contract::NormKind::kMeanStd && i < s.std.size()) {
      out[i] = openpi ? s.std[i] + 1e-6 : s.std[i];
    }
  }
  return out;
}

Json record_to_json(const Record& r) {
  Json out = {{"case", r.case_name},
              {"stage", r.stage},
              {"max_abs", number(r.max_abs)},
              {"rms", number(r.rms)},
              {"relative", number(r.relative)},
              {"rms_error", number(r.rms_error)},
              {"cosine", number(r.cosine)},
              {"tolerance", nullptr},
              {"headroom", nullptr},
              {"pass", nullptr}};
  const Gates& g = r.gates;
  const std::optional<double> first = g.max ? g.max : g.rms ? g.rms : g.cosine;
  if (first) {
    out["tolerance"] = *first;
    Json& gates = out["gates"] = Json::object();
    if (g.max) gates["max"] = *g.max;
    if (g.rms) gates["rms"] = *g.rms;
    if (g.cosine) gates["cosine"] = *g.cosine;
    out["headroom"] = number(r.headroom);
  }
  if (r.judged) out["pass"] = r.pass;
  if (!r.note.empty()) out["note"] = r.note;
  return out;
}

}  // namespace servoflow::toolkit
