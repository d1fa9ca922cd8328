#include "quant/methods/smoothing.h"

#include <algorithm>
#include <cmath>
#include <map>

namespace servoflow::quant {
namespace {

// A multiplier stays within 2^-8 … 2^8. A norm that stores w for 1 + w holds (1 + w) m - 1, which for a small
// m loses as many bits as m has below 1, and for a tiny one everything.
constexpr double kMaxPower = 8;

// The largest value of each tie, in every channel of it.
std::vector<float> tied(std::span<const float> values, const Tie& tie) {
  std::vector<float> out(values.begin(), values.end());
  if (tie.empty()) return out;
  std::map<int, float> most;
  for (std::size_t c = 0; c < out.size(); ++c) {
    float& m = most.try_emplace(tie[c], 0.0f).first->second;
    m = std::max(m, out[c]);
  }
  for (std::size_t c = 0; c < out.size(); ++c) out[c] = most[tie[c]];
  return out;
}

std::vector<float> ones(std::size_t n) { return std::vector<float>(n, 1.0f); }

}  // namespace

Smoothing smoothquant(std::span<const float> input_amax, std::span<const float> weight_amax, double alpha,
                      const Tie& tie, bool powers_of_two) {
  const std::vector<float> x = tied(input_amax, tie), w = tied(weight_amax, tie);
  std::vector<double> s(x.size(), 0);
  double logs = 0;
  int live = 0;
  for (std::size_t c = 0; c < s.size(); ++c) {
    if (!(x[c] > 0) || !(w[c] > 0)) continue;
    s[c] = alpha * std::log2(static_cast<double>(x[c])) - (1 - alpha) * std::log2(static_cast<double>(w[c]));
    logs += s[c];
    ++live;
  }
  const double mean = live > 0 ? logs / live : 0;
  Smoothing out{.input = ones(x.size()), .alpha = alpha};
  for (std::size_t c = 0; c < s.size(); ++c) {
    if (!(x[c] > 0) || !(w[c] > 0)) continue;
    const double power = std::clamp(s[c] - mean, -kMaxPower, kMaxPower);
    out.input[c] = static_cast<float>(std::exp2(-(powers_of_two ? std::nearbyint(power) : power)));
  }
  return out;
}

Smoothing search_smoothquant(std::span<const float> input_amax, std::span<const float> weight_amax,
                             const Loss& loss, const Tie& tie, int steps) {
  Smoothing best{.input = ones(input_amax.size()), .alpha = 0};
  const double unchanged = loss(best.input);
  double least = unchanged;
  for (int i = 0; i <= steps; ++i) {
    Smoothing candidate = smoothquant(input_amax, weight_amax, static_cast<double>(i) / steps, tie);
    if (const double l = loss(candidate.input); l < least) {
      least = l;
      best = std::move(candidate);
    }
  }
  best.loss = least;
  best.loss_unchanged = unchanged;
  return best;
}

Smoothing search_awq(std::span<const float> input_mean, const Loss& loss, const Tie& tie, int steps) {
  const std::vector<float> x = tied(input_mean, tie);
  Smoothing best{.input = ones(x.size()), .alpha = 0};
  const double unchanged = loss(best.input);
  double least = unchanged;
  for (int i = 1; i <= steps; ++i) {
    const double alpha = static_cast<double>(i) / steps;
    std::vector<double> s(x.size(), 1);
    double high = 0, low = INFINITY;
    for (std::size_t c = 0; c < s.size(); ++c) {
      s[c] = std::max(1e-4, std::pow(static_cast<double>(x[c]), alpha));
      high = std::max(high, s[c]);
      low = std::min(low, s[c]);
    }
    Smoothing candidate{.input = ones(x.size()), .alpha = alpha};
    const double middle = std::sqrt(high * low);
    for (std::size_t c = 0; c < s.size(); ++c)
      candidate.input[c] =
          static_cast<float>(std::exp2(std::clamp(std::log2(middle / s[c]), -kMaxPower, kMaxPower)));
    if (const double l = loss(candidate.input); l < least) {
      least = l;
      best = std::move(candidate);
    }
  }
  best.loss = least;
  best.loss_unchanged = unchanged;
  return best;
}

void raise_column_amax(std::span<const float> w, std::span<float> amax) {
  const std::size_t cols = amax.size();
  for (std::size_t i = 0; i < w.size(); ++i) amax[i % cols] = std::max(amax[i % cols], std::fabs(w[i]));
}

std::vector<float> divide_columns(std::span<const float> w, std::span<const float> m) {
  std::vector<float> out(w.size());
  for (std::size_t i = 0; i < w.size(); ++i) out[i] = w[i] / m[i % m.size()];
  return out;
}

}  // namespace servoflow::quant
