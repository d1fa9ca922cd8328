#include "toolkit/judge.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace servoflow::toolkit {
namespace {

Values row(std::vector<double> data) {
  const auto n = static_cast<std::int64_t>(data.size());
  return {Shape{n}, std::move(data)};
}
StageName stage(const std::string& name) { return *parse_stage_name(name); }

TEST(Judge, ReportsTheDocumentedNumbers) {
  // Difference (0, 0, 0.2, 0); expectation rms = sqrt((1 + 4 + 4 + 1) / 4).
  const Record r = judge_stage(stage("step0/v"), row({1, 2, -2, 1}), row({1, 2, -1.8, 1}), {.max = 0.2});
  const double rms = std::sqrt(2.5);
  EXPECT_DOUBLE_EQ(r.rms, rms);
  EXPECT_NEAR(r.max_abs, 0.2, 1e-15);
  EXPECT_NEAR(r.relative, 0.2 / rms, 1e-15);
  EXPECT_NEAR(r.rms_error, 0.1 / rms, 1e-15);
  EXPECT_NEAR(r.cosine, (1 + 4 + 3.6 + 1) / (std::sqrt(10) * std::sqrt(6 + 3.24)), 1e-15);
  EXPECT_NEAR(r.headroom, 0.2 * rms / 0.2, 1e-12);
  EXPECT_TRUE(r.judged && r.pass);
  EXPECT_EQ(r.group, "velocity");
}

TEST(Judge, EachGateCanFailAlone) {
  const Values want = row({1, 2, -2, 1}), got = row({1, 2, -1.8, 1});
  EXPECT_FALSE(judge_stage(stage("t"), want, got, {.max = 0.12}).pass);
  EXPECT_FALSE(judge_stage(stage("t"), want, got, {.max = 0.2, .rms = 0.06}).pass);
  EXPECT_FALSE(judge_stage(stage("t"), want, got, {.rms = 0.07, .cosine = 0.9995}).pass);
  EXPECT_TRUE(judge_stage(stage("t"), want, got, {.max = 0.13, .rms = 0.07, .cosine = 0.998}).pass);
  EXPECT_LT(judge_stage(stage("t"), want, got, {.max = 0.12}).headroom, 1);
}

TEST(Judge, ZeroToleranceMeansEqual) {
  EXPECT_TRUE(judge_stage(stage("t"), row({1, 0.5}), row({1, 0.5}), {.max = 0}).pass);
  EXPECT_EQ(judge_stage(stage("t"), row({1, 0.5}), row({1, 0.5}), {.max = 0}).headroom, kMaxHeadroom);
  EXPECT_FALSE(judge_stage(stage("t"), row({1, 0.5}), row({1, std::nextafter(0.5, 1)}), {.max = 0}).pass);
  // An expectation of zeros allows no error at all.
  EXPECT_TRUE(judge_stage(stage("t"), row({0, 0}), row({0, 0}), {.max = 1e-3}).pass);
  EXPECT_FALSE(judge_stage(stage("t"), row({0, 0}), row({0, 1e-30}), {.max = 1e-3}).pass);
}

TEST(Judge, ValuesThatAreNotFiniteFailEvenWithoutAGate) {
  for (double bad : std::initializer_list<double>{NAN, INFINITY, -INFINITY}) {
    for (const Gates& gates : {Gates{}, Gates{.max = 1e9}, Gates{.cosine = -1.0}}) {
      const Record got = judge_stage(stage("t"), row({1, 2}), row({1, bad}), gates);
      EXPECT_TRUE(got.judged);
      EXPECT_FALSE(got.pass);
      EXPECT_EQ(got.note, "1 of 2 values are not finite");
      EXPECT_FALSE(judge_stage(stage("t"), row({1, bad}), row({1, bad}), gates).pass);
    }
  }
}

TEST(Judge, ShapesMustAgree) {
  const Record r =
      judge_stage(stage("vision/top"), {Shape{2, 2}, {1, 2, 3, 4}}, {Shape{4}, {1, 2, 3, 4}}, {});
  EXPECT_TRUE(r.judged);
  EXPECT_FALSE(r.pass);
  EXPECT_EQ(r.note, "shape [4] instead of [2, 2]");
}

TEST(Judge, ActionsAreJudgedColumnByColumn) {
  const Values want{Shape{2, 2}, {10, 1e-4, -10, 2e-4}};
  const std::vector<double> scale = {10, 1e-4};
  const auto with = [&](double wide, double narrow) {
    Values got = want;
    got.data[2] += wide;
    got.data[3] += narrow;
    return judge_actions(want, got, {.max = 1e-3}, scale, 1.0);
  };
  EXPECT_TRUE(with(9e-3, 9e-8).pass);
  EXPECT_FALSE(with(1.1e-2, 0).pass);
  EXPECT_FALSE(with(0, 1.1e-7).pass) << "an error that is tiny beside the wide column must not hide";
  EXPECT_NEAR(with(5e-3, 0).headroom, 2, 1e-3);
  // A column without any range still allows for float32 rounding of its value.
  EXPECT_TRUE(judge_actions(row({1}), row({1 + 0x1p-23}), {.max = 1e-3}, std::vector<double>{0.0}, 1.0).pass);
  EXPECT_FALSE(
      judge_actions(row({1}), row({1 + 0x1p-21}), {.max = 1e-3}, std::vector<double>{0.0}, 1.0).pass);
}

TEST(Judge, TokensAreExactAndTheFirstDifferenceIsNamed) {
  EXPECT_TRUE(judge_exact(stage("tokens"), row({2, 17, 0}), row({2, 17, 0})).pass);
  const Record r = judge_exact(stage("tokens"), row({2, 17, 0}), row({2, 18, 0}));
  EXPECT_FALSE(r.pass);
  EXPECT_EQ(r.note, "first difference at [1]: 18 instead of 17");
  EXPECT_FALSE(judge_exact(stage("tokens"), row({2, 17}), row({2, 17, 5})).pass);
}

TEST(Judge, ScaleFollowsTheStatistics) {
  using namespace contract;
  Normalization n;
  n.stats = {.mean = {0, 0}, .std = {2, 3}, .q01 = {-1, 5}, .q99 = {1, 5}};
  EXPECT_EQ(action_scale(n, 3), (std::vector<double>{(2 + 1e-6) / 2, 1e-6 / 2, 1}));
  n.style = NormStyle::kLerobot;
  EXPECT_EQ(action_scale(n, 2), (std::vector<double>{1, 1e-8 / 2}));
  n.kind = NormKind::kMeanStd;
  EXPECT_EQ(action_scale(n, 3), (std::vector<double>{2, 3, 1}));
  n.style = NormStyle::kOpenpi;
  EXPECT_EQ(action_scale(n, 1), (std::vector<double>{2 + 1e-6}));
}

TEST(Judge, JsonHasTheDocumentedKeysAndNoNumberThatJsonLacks) {
  Record r =
      judge_stage(stage("vision/top"), row({1, 2}), row({1, std::nan("")}), {.rms = 0.04, .cosine = 0.9995});
  r.case_name = "libero";
  const Json failed = record_to_json(r);
  for (const char* key : {"case", "stage", "max_abs", "rms", "relative", "rms_error", "cosine", "tolerance",
                          "headroom", "pass"})
    EXPECT_TRUE(failed.contains(key)) << key;
  EXPECT_TRUE(failed["max_abs"].is_null());
  EXPECT_EQ(failed["tolerance"], 0.04);
  EXPECT_EQ(failed["gates"], (Json{{"rms", 0.04}, {"cosine", 0.9995}}));
  EXPECT_EQ(failed["pass"], false);
  const Json reported = record_to_json(judge_stage(stage("vision/top"), row({1, 2}), row({1, 2}), {}));
  EXPECT_TRUE(reported["tolerance"].is_null() && reported["headroom"].is_null() &&
              reported["pass"].is_null());
}

}  // namespace
}  // namespace servoflow::toolkit
