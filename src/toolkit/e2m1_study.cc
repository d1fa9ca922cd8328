#include "toolkit/e2m1_study.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <map>
#include <random>

#include "core/status_macros.h"
#include "quant/matrix.h"
#include "quant/methods/lattice.h"
#include "quant/patterns.h"
#include "toolkit/calibration.h"
#include "toolkit/linears.h"

namespace servoflow::toolkit {
namespace {

constexpr int kGroup = 16;

struct Sample {
  std::string name;
  std::int64_t rows = 0, cols = 0;
  std::vector<float> w;
};

double decibels(double signal, double noise) { return noise > 0 ? 10 * std::log10(signal / noise) : 300; }

// Adds a variant's result on one layer.
struct Tally {
  double signal = 0, noise = 0, worst = 1e9;
  void add(double s, double n) {
    signal += s;
    noise += n;
    worst = std::min(worst, decibels(s, n));
  }
};

using Magnitudes = std::vector<float>;

// Nearest of `values` (ascending from 0), ties to the even index.
float nearest(const Magnitudes& values, float x) {
  const float a = std::fabs(x);
  if (a >= values.back()) return std::copysign(values.back(), x);
  const auto high =
      static_cast<std::size_t>(std::upper_bound(values.begin(), values.end(), a) - values.begin());
  const std::size_t low = high - 1;
  const float middle = (values[low] + values[high]) / 2;
  return std::copysign(a > middle || (a == middle && low % 2 == 1) ? values[high] : values[low], x);
}

// Groups of 16 with scales amax / largest value; `scale_bits` 8: rounded to E4M3 under a global scale, as
// NVFP4's.
void round_groups(const Sample& s, const Magnitudes& values, bool e4m3_scales, Tally& tally) {
  static const quant::Lattice scales = quant::Lattice::e4m3();
  const float amax = quant::max_magnitude(s.w);
  const float global = amax > 0 ? amax / (values.back() * scales.max()) : 1;
  double signal = 0, noise = 0;
  for (std::int64_t r = 0; r < s.rows; ++r)
    for (std::int64_t begin = 0; begin < s.cols; begin += kGroup) {
      const std::int64_t size = std::min<std::int64_t>(kGroup, s.cols - begin);
      const std::span<const float> group = std::span(s.w).subspan(
          static_cast<std::size_t>(r * s.cols + begin), static_cast<std::size_t>(size));
      float scale = quant::max_magnitude(group) / values.back();
      if (e4m3_scales) scale = std::max(scales.snap(scale / global), scales.smallest()) * global;
      for (const float w : group) {
        const float rounded = scale > 0 ? scale * nearest(values, w / scale) : 0;
        signal += static_cast<double>(w) * static_cast<double>(w);
        noise += (static_cast<double>(w) - static_cast<double>(rounded)) *
                 (static_cast<double>(w) - static_cast<double>(rounded));
      }
    }
  tally.add(signal, noise);
}

// Magnitudes of a float of this shape: all codes below 2^(exponent + mantissa), with subnormals or with them
// flushed.
Magnitudes float_values(int exponent, int mantissa, int bias, bool subnormals) {
  Magnitudes out;
  for (int code = 0; code < 1 << (exponent + mantissa); ++code) {
    const int e = code >> mantissa, f = code & ((1 << mantissa) - 1);
    if (e == 0 && f != 0 && !subnormals) continue;
    if (e == 0 && f == 0 && code != 0) continue;
    const int significand = e > 0 ? f + (1 << mantissa) : f;
    out.push_back(std::ldexp(static_cast<float>(significand), std::max(e, 1) - bias - mantissa));
  }
  std::sort(out.begin(), out.end());
  return out;
}

Result<std::vector<Sample>> samples(const weights::Checkpoint& checkpoint, const StudyOptions& options) {
  std::vector<quant::Linear> chosen;
  for (const quant::Linear& l : linear_layers(checkpoint.architecture))
    if (!quant::is_protected(l.name) &&
        std::any_of(options.layers.begin(), options.layers.end(),
                    [&](const auto& glob) { return quant::glob_matches(glob, l.name); }))
      chosen.push_back(l);
  if (chosen.empty()) return Status::invalid("--layer: matches no linear layer of " + checkpoint.path);
  const EditedSource source(checkpoint.source);
  std::vector<Sample> out;
  const std::size_t count = std::min(chosen.size(), static_cast<std::size_t>(std::max(1, options.limit)));
  for (std::size_t i = 0; i < count; ++i) {
    const quant::Linear& l = chosen[i * chosen.size() / count];
    SF_ASSIGN_OR_RETURN(const std::vector<float> all, source.values(l.name + ".weight"));
    Sample s{
        .name = l.name, .rows = std::min<std::int64_t>(l.rows, std::max(1, options.rows)), .cols = l.cols};
    for (std::int64_t r = 0; r < s.rows; ++r) {
      const auto row = all.begin() + r * l.rows / s.rows * l.cols;
      s.w.insert(s.w.end(), row, row + l.cols);
    }
    out.push_back(std::move(s));
    checkpoint.source->release(l.name + ".weight");
  }
  return out;
}

// Sums of products of E2M1 codes in one row, the codes' scales applied per group.
struct Sums {
  double exact = 0;
  float sequential = 0, blocked = 0, kahan = 0, table = 0;
};

// E2M1 magnitudes doubled are integers of at most 12: a product is an integer of at most 144 quarters.
std::array<std::array<std::int16_t, 16>, 16> product_table() {
  std::array<std::array<std::int16_t, 16>, 16> out{};
  const quant::Lattice e2m1 = quant::Lattice::e2m1();
  const auto value = [&](std::size_t code) {
    const float m = 2 * e2m1.magnitudes()[code % 8];
    return static_cast<int>(code < 8 ? m : -m);
  };
  for (std::size_t a = 0; a < 16; ++a)
    for (std::size_t b = 0; b < 16; ++b) out[a][b] = static_cast<std::int16_t>(value(a) * value(b));
  return out;
}

std::size_t code_of(float value) {
  const quant::Lattice e2m1 = quant::Lattice::e2m1();
  const auto& m = e2m1.magnitudes();
  return static_cast<std::size_t>(std::find(m.begin(), m.end(), std::fabs(value)) - m.begin()) +
         (std::signbit(value) ? 8u : 0u);
}

Sums sum_row(const float* w, const float* x, const float* w_scale, const float* x_scale, std::int64_t cols) {
  static const auto table = product_table();
  Sums out;
  float carry = 0;
  for (std::int64_t begin = 0; begin < cols; begin += kGroup) {
    const float scale = w_scale[begin / kGroup] * x_scale[begin / kGroup];
    float block = 0;
    int integer = 0;
    const std::int64_t end = std::min<std::int64_t>(cols, begin + kGroup);
    for (std::int64_t c = begin; c < end; ++c) {
      const float product = w[c] * x[c];  // exact
      out.exact += static_cast<double>(product) * static_cast<double>(w_scale[begin / kGroup]) *
                   static_cast<double>(x_scale[begin / kGroup]);
      const float term = product * scale;
      out.sequential += term;
      const float y = term - carry, t = out.kahan + y;
      carry = (t - out.kahan) - y;
      out.kahan = t;
      block += product;
      integer += table[code_of(w[c])][code_of(x[c])];
    }
    out.blocked += block * scale;
    out.table += static_cast<float>(integer) * 0.25f * scale;
  }
  return out;
}

// Rounds a row to E2M1 in groups; values in units of the scale.
void encode_row(const float* from, std::int64_t cols, float* values, float* scales) {
  const quant::Lattice e2m1 = quant::Lattice::e2m1();
  for (std::int64_t begin = 0; begin < cols; begin += kGroup) {
    const std::int64_t size = std::min<std::int64_t>(kGroup, cols - begin);
    const float amax = quant::max_magnitude({from + begin, static_cast<std::size_t>(size)});
    const float scale = amax > 0 ? amax / e2m1.max() : 1;
    scales[begin / kGroup] = scale;
    for (std::int64_t c = begin; c < begin + size; ++c) values[c] = e2m1.snap(from[c] / scale);
  }
}

}  // namespace

Result<StudyReport> e2m1_study(const weights::Checkpoint& checkpoint, const StudyOptions& options) {
  SF_ASSIGN_OR_RETURN(const std::vector<Sample> layers, samples(checkpoint, options));
  StudyReport report;
  for (const Sample& s : layers) report.layers.push_back(s.name);
  const auto weights = [&](const std::string& table, const std::string& variant, double bits,
                           const Magnitudes& values, bool e4m3, const std::string& note = "") {
    Tally tally;
    for (const Sample& s : layers) round_groups(s, values, e4m3, tally);
    report.rows.push_back({table, variant, bits, decibels(tally.signal, tally.noise), tally.worst, note});
  };
  // With scales in float32 the bias is a factor that they absorb; with 8-bit scales it moves their range.
  for (int bias = -1; bias <= 3; ++bias)
    weights("exponent bias", fmt::format("bias {}, E4M3 scales", bias), 4.5, float_values(2, 1, bias, true),
            true, bias == 1 ? "the format as published" : "");
  weights("exponent bias", "bias 1, float32 scales", 6, float_values(2, 1, 1, true), false);
  weights("gradual underflow", "subnormal 0.5 kept", 4.5, float_values(2, 1, 1, true), true,
          "the format as published");
  weights("gradual underflow", "subnormal 0.5 flushed to zero", 4.5, float_values(2, 1, 1, false), true);
  weights("4-bit codes, groups of 16, E4M3 scales", "E2M1", 4.5, float_values(2, 1, 1, true), true);
  weights("4-bit codes, groups of 16, E4M3 scales", "E1M2 (INT4 without -8)", 4.5,
          float_values(1, 2, 1, true), true);
  weights("4-bit codes, groups of 16, E4M3 scales", "E3M0", 4.5, float_values(3, 0, 3, true), true);
  for (const char* name : {"nvfp4-w4a16", "mxfp4-w4a16", "int4-g128-w4a16", "int4-g128-sym-w4a16",
                           "int8-w8a16", "fp8-w8a16", "mxfp8-w8a16"}) {
    SF_ASSIGN_OR_RETURN(const quant::LinearFormat format, quant::parse_format(name));
    Tally tally;
    double bits = 0, elements = 0;
    for (const Sample& s : layers) {
      Result<quant::QuantizedMatrix> m = quant::quantize(s.w, s.rows, s.cols, format);
      if (!m.ok()) return m.status().with_context(s.name);
      const std::vector<float> back = quant::dequantize(*m);
      double signal = 0, noise = 0;
      for (std::size_t i = 0; i < back.size(); ++i) {
        const double w = static_cast<double>(s.w[i]), d = w - static_cast<double>(back[i]);
        signal += w * w;
        noise += d * d;
      }
      tally.add(signal, noise);
      bits += quant::bits_per_weight(format.weight, s.rows, s.cols) * static_cast<double>(s.w.size());
      elements += static_cast<double>(s.w.size());
    }
    report.rows.push_back(
        {"stored formats", name, bits / elements, decibels(tally.signal, tally.noise), tally.worst, ""});
  }

  std::map<std::string, Tally> sums;
  std::uint64_t table_differs = 0, products = 0;
  std::mt19937_64 random(options.seed);
  std::normal_distribution<float> draw;
  for (const Sample& s : layers) {
    const auto cols = static_cast<std::size_t>(s.cols), groups = (cols + kGroup - 1) / kGroup;
    std::map<std::string, std::pair<double, double>> one;
    for (int input = 0; input < 2; ++input) {
      std::vector<float> raw(cols), x(cols), w(cols), x_scale(groups), w_scale(groups);
      for (float& v : raw) v = draw(random);
      encode_row(raw.data(), s.cols, x.data(), x_scale.data());
      for (std::int64_t r = 0; r < s.rows; ++r) {
        encode_row(s.w.data() + r * s.cols, s.cols, w.data(), w_scale.data());
        const Sums y = sum_row(w.data(), x.data(), w_scale.data(), x_scale.data(), s.cols);
        table_differs += y.table != y.blocked;
        ++products;
        for (const auto& [name, value] : {std::pair<std::string, float>{"float32, one by one", y.sequential},
                                          {"float32 per group of 16, then scaled", y.blocked},
                                          {"float32 with Kahan's compensation", y.kahan},
                                          {"integers from a 16 x 16 table per group", y.table}}) {
          one[name].first += y.exact * y.exact;
          one[name].second += std::pow(static_cast<double>(value) - y.exact, 2);
        }
      }
    }
    for (const auto& [name, pair] : one) sums[name].add(pair.first, pair.second);
  }
  for (const auto& [name, tally] : sums)
    report.rows.push_back(
        {"accumulation of E2M1 products", name, 0, decibels(tally.signal, tally.noise), tally.worst,
         name.starts_with("integers")
             ? fmt::format("differs from the float group sum in {} of {} products", table_differs, products)
             : ""});
  return report;
}

std::string study_text(const StudyReport& report) {
  std::string out = fmt::format("{} layers. SNR: signal over rounding noise; worst: of the layers.\n",
                                report.layers.size()),
              table;
  for (const StudyRow& r : report.rows) {
    if (r.table != table)
      out += fmt::format("\n{}\n{:<44}{:>8}{:>10}{:>10}\n", table = r.table, "variant", "bits", "SNR dB",
                         "worst");
    out += fmt::format("{:<44}{:>8}{:>10.2f}{:>10.2f}{}\n", r.variant,
                       r.bits > 0 ? fmt::format("{:.2f}", r.bits) : "-", r.snr_db, r.worst_db,
                       r.note.empty() ? "" : "  " + r.note);
  }
  return out;
}

Json study_to_json(const StudyReport& report) {
  Json rows = Json::array();
  for (const StudyRow& r : report.rows)
    rows.push_back({{"table", r.table},
                    {"variant", r.variant},
                    {"bits", r.bits},
                    {"snr_db", r.snr_db},
                    {"worst_db", r.worst_db},
                    {"note", r.note}});
  return {{"layers", report.layers}, {"rows", rows}};
}

}  // namespace servoflow::toolkit
