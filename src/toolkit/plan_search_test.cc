#include "toolkit/plan_search.h"

#include <gtest/gtest.h>

#include "toolkit/plan_report.h"
#include "toolkit/plan_tables.h"

namespace servoflow::toolkit {
namespace {

struct On {
  DeviceProfile device;
  UsedRates rates;
};
On on(const std::string& name) {
  const Result<DeviceProfile> d = load_device_profile(name);
  EXPECT_TRUE(d.ok());
  return {*d, *used_rates(*d)};
}

const PlanCase kBase{.architecture = weights::pi05_architecture()};

TEST(PlanSearch, ChangesNothingWhereNothingIsNeeded) {
  const On h200 = on("h200");
  const TargetResult t = *find_target(kBase, h200.device, h200.rates, 20);
  EXPECT_TRUE(t.reached);
  EXPECT_TRUE(t.smallest.changes.empty());
  EXPECT_EQ(t.smallest.risk, 0);
}

// Against every combination tried by hand: none of less risk reaches the rate.
TEST(PlanSearch, NoPlanOfLessRiskReachesTheTarget) {
  const On thor = on("thor");
  for (const double hz : {8.5, 12.0, 20.0, 40.0}) {
    const TargetResult t = *find_target(kBase, thor.device, thor.rates, hz);
    ASSERT_TRUE(t.reached) << hz;
    EXPECT_GE(t.smallest.prediction.hz, hz);
    int tried = 0;
    for (const PlanPrecision& precision : plan_precisions()) {
      if (precision.weight_bits > 16 || precision.name == std::string("fp32") ||
          !has_arithmetic(thor.rates, precision))
        continue;
      for (int s = -1; s < static_cast<int>(step_risks().size()); ++s)
        for (int r = -1; r < static_cast<int>(reuse_risks().size()); ++r) {
          PlanCase plan = kBase;
          plan.precision = precision.name;
          int risk = precision.risk;
          if (s >= 0) plan.requests[0].steps = step_risks()[static_cast<std::size_t>(s)].steps;
          if (s >= 0) risk += step_risks()[static_cast<std::size_t>(s)].risk;
          if (r >= 0) plan.reuse = reuse_risks()[static_cast<std::size_t>(r)].reuse;
          if (r >= 0) risk += reuse_risks()[static_cast<std::size_t>(r)].risk;
          ++tried;
          if (predict(plan, thor.device, thor.rates)->hz >= hz) {
            EXPECT_GE(risk, t.smallest.risk);
          }
        }
    }
    EXPECT_GT(tried, 100);
  }
}

TEST(PlanSearch, SaysWhenTheTargetIsOutOfReach) {
  const On cpu = on("cpu");
  const TargetResult t = *find_target(kBase, cpu.device, cpu.rates, 1000);
  EXPECT_FALSE(t.reached);
  EXPECT_GT(t.smallest.prediction.hz, 1);
  const PlanContext context{kBase, cpu.device, cpu.rates};
  EXPECT_NE(target_sentence(context, t).find("out of reach"), std::string::npos);
  for (const double bad : {0.0, -1.0, std::nan("")})
    EXPECT_FALSE(find_target(kBase, cpu.device, cpu.rates, bad).ok());
}

TEST(PlanSearch, LeversAloneComeInOrderOfRisk) {
  const On thor = on("thor");
  const TargetResult t = *find_target(kBase, thor.device, thor.rates, 15);
  ASSERT_GE(t.by_lever.size(), 4u);
  for (std::size_t i = 1; i < t.by_lever.size(); ++i) EXPECT_LE(t.by_lever[i - 1].risk, t.by_lever[i].risk);
  for (const TargetOption& o : t.by_lever) EXPECT_EQ(o.changes.size(), 1u);
}

TEST(PlanSearch, StudentsAreNetworksThatCouldBeTrained) {
  const weights::Architecture a = weights::pi05_architecture();
  for (const Student& s : students()) {
    const weights::Architecture small = student_of(a, s.layers, s.width);
    EXPECT_TRUE(weights::check_architecture(small).empty());
    EXPECT_EQ(small.prefix.depth, s.layers);
    EXPECT_EQ(small.expert.depth, small.prefix.depth);
    EXPECT_EQ(small.prefix.head_dim, a.prefix.head_dim);
  }
  EXPECT_EQ(student_of(a, 18, 1).prefix.mlp, a.prefix.mlp);
  EXPECT_EQ(student_of(a, 9, 0.5).expert.width, 512);
}

TEST(PlanReport, HoldsEveryTableAndReadsBackAsHtmlAndJson) {
  const Result<PlanReport> r = make_plan({.device = "thor", .target_hz = 20});
  ASSERT_TRUE(r.ok()) << r.status().message();
  EXPECT_EQ(r->tables.size(), 8u);
  EXPECT_EQ(r->figures.size(), 4u);
  const std::string text = plan_text(*r);
  for (const char* part :
       {"prefix/mlp", "a denoise step", "nvfp4-w4a4", "2 / 200", "every 2nd", "requests", "18 / 1", "20 Hz"})
    EXPECT_NE(text.find(part), std::string::npos) << part;
  for (const HtmlTable& t : r->tables)
    for (const auto& row : t.rows) EXPECT_EQ(row.size(), t.header.size()) << t.caption;
  EXPECT_EQ(r->json["tables"].size(), r->tables.size());
  EXPECT_TRUE(r->json["target"]["reached"].get<bool>());
  if (!plotly_blob().compressed.empty()) {
    EXPECT_TRUE(plan_html(*r).html().ok());
  }
  EXPECT_FALSE(make_plan({.device = "h201"}).ok());
  EXPECT_FALSE(make_plan({.model = "pi06"}).ok());
}

TEST(PlanReport, AccuracyShowsFittedRowsAsSuch) {
  const Result<PlanReport> r = make_accuracy("bench/results");
  ASSERT_TRUE(r.ok()) << r.status().message();
  EXPECT_NE(plan_text(*r).find("fitted on this"), std::string::npos);
  for (const HtmlTable& t : r->tables)
    for (const auto& row : t.rows) EXPECT_EQ(row.size(), t.header.size()) << t.caption;
  EXPECT_FALSE(make_accuracy("/nowhere").ok());
}

TEST(PlanReport, MarkdownColumnsLineUp) {
  EXPECT_EQ(markdown_table({.header = {"a", "π"}, .rows = {{"xyz", "1"}, {"b"}}}),
            "| a   | π |\n|-----|--:|\n| xyz | 1 |\n| b   |   |\n");
}

}  // namespace
}  // namespace servoflow::toolkit
