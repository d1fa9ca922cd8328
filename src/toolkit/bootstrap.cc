#include "toolkit/bootstrap.h"

#include <algorithm>
#include <cmath>
#include <random>

namespace servoflow::toolkit {
namespace {

// The same draws from every standard library, which std::uniform_int_distribution does not promise.
std::size_t draw(std::mt19937_64& random, std::size_t count) {
  return static_cast<std::size_t>(random() % count);
}

std::vector<double> all_of(const Rounds& rounds) {
  std::vector<double> out;
  for (const auto& round : rounds) out.insert(out.end(), round.begin(), round.end());
  return out;
}

Rounds without_empty(const Rounds& rounds) {
  Rounds out;
  for (const auto& round : rounds)
    if (!round.empty()) out.push_back(round);
  return out;
}

void resample(const Rounds& rounds, std::mt19937_64& random, std::vector<double>& out) {
  out.clear();
  for (std::size_t r = 0; r < rounds.size(); ++r) {
    const std::vector<double>& round = rounds[rounds.size() > 1 ? draw(random, rounds.size()) : 0];
    for (std::size_t i = 0; i < round.size(); ++i) out.push_back(round[draw(random, round.size())]);
  }
}

double quantile_in_place(std::vector<double>& samples, double share) {
  if (samples.empty()) return 0;
  const double at = share * static_cast<double>(samples.size() - 1);
  const auto low = static_cast<std::ptrdiff_t>(at);
  std::nth_element(samples.begin(), samples.begin() + low, samples.end());
  const double below = samples[static_cast<std::size_t>(low)];
  if (at == static_cast<double>(low)) return below;
  const double above = *std::min_element(samples.begin() + low + 1, samples.end());
  return below + (above - below) * (at - static_cast<double>(low));
}

Interval interval_of(std::vector<double> statistics, double value, double level) {
  if (statistics.empty()) return {value, value, value};
  const double tail = (1 - level) / 2;
  return {quantile(statistics, tail), value, quantile(statistics, 1 - tail)};
}

}  // namespace

double quantile(std::vector<double> samples, double share) { return quantile_in_place(samples, share); }

Interval bootstrap_quantile(const Rounds& rounds, double share, const BootstrapOptions& o) {
  const Rounds used = without_empty(rounds);
  const double value = quantile(all_of(used), share);
  std::vector<double> statistics, again;
  std::mt19937_64 random(o.seed);
  for (int i = 0; i < o.resamples && !used.empty(); ++i) {
    resample(used, random, again);
    statistics.push_back(quantile_in_place(again, share));
  }
  return interval_of(std::move(statistics), value, o.level);
}

Interval bootstrap_ratio(const Rounds& now, const Rounds& before, double share, const BootstrapOptions& o) {
  const Rounds a = without_empty(now), b = without_empty(before);
  const double down = quantile(all_of(b), share);
  if (a.empty() || b.empty() || !(down > 0)) return {};
  std::vector<double> ratios, again;
  std::mt19937_64 random(o.seed);
  for (int i = 0; i < o.resamples; ++i) {
    resample(a, random, again);
    const double up = quantile_in_place(again, share);
    resample(b, random, again);
    if (const double base = quantile_in_place(again, share); base > 0) ratios.push_back(up / base);
  }
  return interval_of(std::move(ratios), quantile(all_of(a), share) / down, o.level);
}

Verdict judge_ratio(const Interval& ratio, double tolerance) {
  if (ratio.low > 1 + tolerance) return Verdict::kSlower;
  if (ratio.high < 1 - tolerance) return Verdict::kFaster;
  return Verdict::kWithinNoise;
}

const char* verdict_text(Verdict verdict) {
  return verdict == Verdict::kFaster ? "faster" : verdict == Verdict::kSlower ? "slower" : "within noise";
}

bool is_steady(std::span<const double> samples, int window, double tolerance) {
  const auto w = static_cast<std::size_t>(window);
  if (window < 1 || samples.size() < 2 * w) return false;
  const auto median = [&](std::span<const double> part) {
    return quantile(std::vector<double>(part.begin(), part.end()), 0.5);
  };
  const double last = median(samples.last(w)), before = median(samples.last(2 * w).first(w));
  return std::abs(last - before) <= tolerance * last;
}

}  // namespace servoflow::toolkit
