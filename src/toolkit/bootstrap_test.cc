#include "toolkit/bootstrap.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

namespace servoflow::toolkit {
namespace {

// Normal numbers by Box and Muller, the same from every standard library.
class Normal {
 public:
  explicit Normal(std::uint64_t seed) : random_(seed) {}
  double next() {
    const auto uniform = [&] { return (static_cast<double>(random_() >> 11) + 0.5) / 9007199254740992.0; };
    return std::sqrt(-2 * std::log(uniform())) * std::cos(2 * M_PI * uniform());
  }
  std::vector<double> many(int n, double mean, double std) {
    std::vector<double> out;
    for (int i = 0; i < n; ++i) out.push_back(mean + std * next());
    return out;
  }

 private:
  std::mt19937_64 random_;
};

TEST(Bootstrap, QuantilesAreNumPys) {
  // numpy.quantile([3, 1, 2, 10], [0, .25, .5, .95, 1])
  const std::vector<double> x = {3, 1, 2, 10};
  EXPECT_DOUBLE_EQ(quantile(x, 0), 1);
  EXPECT_DOUBLE_EQ(quantile(x, 0.25), 1.75);
  EXPECT_DOUBLE_EQ(quantile(x, 0.5), 2.5);
  EXPECT_DOUBLE_EQ(quantile(x, 0.95), 8.95);
  EXPECT_DOUBLE_EQ(quantile(x, 1), 10);
  EXPECT_DOUBLE_EQ(quantile({}, 0.5), 0);
}

// 300 experiments of 60 normal samples: the interval must hold the true median in about 95 % of them. The
// standard error of that share is 1.3 %; four of them to either side, so that an interval that is too wide
// fails as well.
TEST(Bootstrap, TheIntervalOfTheMedianHoldsTheTruthAsOftenAsItSays) {
  Normal normal(11);
  int inside = 0;
  const int experiments = 300;
  for (int i = 0; i < experiments; ++i) {
    const Interval interval = bootstrap_quantile({normal.many(60, 10, 1)}, 0.5,
                                                 {.resamples = 400, .seed = static_cast<std::uint64_t>(i)});
    inside += interval.low <= 10 && 10 <= interval.high;
  }
  const double share = static_cast<double>(inside) / experiments;
  EXPECT_GE(share, 0.90);
  EXPECT_LE(share, 0.995);
}

// For n normal samples the standard error of the median is sqrt(pi / 2n); a 95 % interval is 2 * 1.96 of them
// wide.
TEST(Bootstrap, TheIntervalIsAsWideAsTheorySays) {
  Normal normal(5);
  const int n = 2000;
  const Interval interval = bootstrap_quantile({normal.many(n, 10, 1)}, 0.5);
  const double want = 2 * 1.96 * std::sqrt(M_PI / (2.0 * n));
  EXPECT_NEAR(interval.high - interval.low, want, 0.35 * want);
  EXPECT_LT(interval.low, interval.value);
  EXPECT_LT(interval.value, interval.high);
}

// Rounds that differ among themselves make the interval wider than their samples alone would.
TEST(Bootstrap, RoundsThatDriftMakeTheIntervalWider) {
  Normal normal(3);
  Rounds rounds;
  std::vector<double> flat;
  for (int r = 0; r < 8; ++r) {
    rounds.push_back(normal.many(50, 10 + r * 0.5, 0.1));
    flat.insert(flat.end(), rounds.back().begin(), rounds.back().end());
  }
  const Interval by_round = bootstrap_quantile(rounds, 0.5), as_one = bootstrap_quantile({flat}, 0.5);
  EXPECT_GT(by_round.high - by_round.low, 2 * (as_one.high - as_one.low));
}

TEST(Bootstrap, TheSameSeedGivesTheSameInterval) {
  Normal normal(7);
  const Rounds rounds = {normal.many(30, 1, 0.1), {}};
  const Interval a = bootstrap_quantile(rounds, 0.95), b = bootstrap_quantile(rounds, 0.95),
                 c = bootstrap_quantile(rounds, 0.95, {.seed = 2});
  EXPECT_EQ(a.low, b.low);
  EXPECT_EQ(a.high, b.high);
  EXPECT_TRUE(a.low != c.low || a.high != c.high);
}

TEST(Bootstrap, JudgesEqualSlowerAndFasterBuilds) {
  Normal normal(19);
  const auto rounds = [&](double mean) {
    Rounds out;
    for (int r = 0; r < 5; ++r) out.push_back(normal.many(20, mean, 0.2));
    return out;
  };
  const Rounds old = rounds(10);
  EXPECT_EQ(judge_ratio(bootstrap_ratio(rounds(10), old, 0.5), 0.02), Verdict::kWithinNoise);
  const Interval slower = bootstrap_ratio(rounds(11), old, 0.5);
  EXPECT_EQ(judge_ratio(slower, 0.02), Verdict::kSlower);
  EXPECT_NEAR(slower.value, 1.1, 0.02);
  EXPECT_EQ(judge_ratio(bootstrap_ratio(rounds(9), old, 0.5), 0.02), Verdict::kFaster);
  // 1 % slower, surely, is not more than the 2 % that matter.
  EXPECT_EQ(judge_ratio({1.005, 1.01, 1.015}, 0.02), Verdict::kWithinNoise);
  // Nothing to compare with is no verdict.
  EXPECT_EQ(bootstrap_ratio(rounds(10), {}, 0.5).value, 0);
  EXPECT_EQ(bootstrap_ratio(rounds(10), {{0, 0}}, 0.5).value, 0);
}

// Two equal builds must not be called different more often than the level says: 200 comparisons at 95 %
// without a tolerance may give 10 of them; 22 is four standard errors more.
TEST(Bootstrap, EqualBuildsAreRarelyCalledDifferent) {
  Normal normal(23);
  int wrong = 0;
  for (int i = 0; i < 200; ++i) {
    const Interval ratio = bootstrap_ratio({normal.many(40, 10, 1)}, {normal.many(40, 10, 1)}, 0.5,
                                           {.resamples = 400, .seed = static_cast<std::uint64_t>(i)});
    wrong += judge_ratio(ratio, 0) != Verdict::kWithinNoise;
  }
  EXPECT_LE(wrong, 22);
}

TEST(Bootstrap, WarmUpEndsWhenTimesStopFalling) {
  EXPECT_FALSE(is_steady(std::vector<double>{10, 10, 10}));
  EXPECT_FALSE(is_steady(std::vector<double>{50, 30, 20, 15, 12, 11}));
  EXPECT_TRUE(is_steady(std::vector<double>{50, 30, 20, 15, 12, 11, 10.1, 10, 10, 10.1, 9.9, 10}));
  // One outlier in a window does not matter: its median does not see it.
  EXPECT_TRUE(is_steady(std::vector<double>{10, 90, 10, 10, 10, 10}));
  EXPECT_FALSE(is_steady({}, 0));
}

}  // namespace
}  // namespace servoflow::toolkit
