#include "toolkit/bench.h"

#include <gtest/gtest.h>

#include <numeric>

namespace servoflow::toolkit {
namespace {

BenchOptions tiny() {
  BenchOptions o;
  o.synthetic = "tiny";
  o.work = {.views = 1, .tokens = 7, .horizon = 4, .steps = 3, .batch = 1};
  o.repeat = 3;
  o.warmup = 2;
  o.peaks = false;
  o.policy.threads = 1;
  return o;
}

TEST(Bench, ReportsTheDocumentedSchema) {
  const auto report = run_bench(tiny());
  ASSERT_TRUE(report.ok()) << report.status().message();
  const Json j = bench_to_json(*report);
  EXPECT_EQ(j["work"], (Json{{"views", 1}, {"tokens", 7}, {"horizon", 4}, {"steps", 3}, {"batch", 1}}));
  for (const char* key :
       {"precision", "device", "ready_s", "peak_rss_bytes", "device_bytes", "machine", "build"})
    EXPECT_TRUE(j.contains(key)) << key;
  for (const char* stage : {"preprocess", "vision", "prefix", "denoise", "step", "postprocess"})
    for (const char* key : {"min", "p50", "mean", "std", "p95", "p99", "samples"})
      EXPECT_TRUE(j["stages_ms"][stage].contains(key)) << stage << " " << key;
  EXPECT_EQ(j["end_to_end_ms"]["samples"].size(), 3u);
  EXPECT_EQ(j["stages_ms"]["step"]["samples"].size(), 9u);
  EXPECT_EQ(j["warmup_ms"].size(), 2u);
  EXPECT_GT(j["rates"]["prefix"]["gflops"], 0.0);
  EXPECT_FALSE(bench_text(*report).empty());
}

TEST(Bench, StagesAddUpToTheWhole) {
  const auto report = run_bench(tiny());
  ASSERT_TRUE(report.ok()) << report.status().message();
  double parts = 0;
  for (const StageBench& s : report->stages)
    if (s.name != "step") parts += std::accumulate(s.ms.samples.begin(), s.ms.samples.end(), 0.0);
  const double whole =
      std::accumulate(report->end_to_end.samples.begin(), report->end_to_end.samples.end(), 0.0);
  EXPECT_LE(parts, whole);
  EXPECT_GT(parts, 0.5 * whole);
}

TEST(Bench, TakesBatchesCheckpointsAndPrompts) {
  BenchOptions o = tiny();
  o.synthetic.clear();
  o.checkpoint = "tests/golden/openpi-tiny";
  o.robot = "libero";
  o.prompt = "open the drawer";
  o.work.views = o.work.batch = 2;
  o.components = true;
  o.repeat = 1;
  const auto report = run_bench(o);
  ASSERT_TRUE(report.ok()) << report.status().message();
  EXPECT_EQ(report->work.horizon, 10) << "the checkpoint's own";
  EXPECT_GT(report->work.tokens, 2) << "counted, not assumed";
  EXPECT_FALSE(report->components.empty());
}

TEST(Bench, ImpossibleWorkIsRefused) {
  const auto error = [](const BenchOptions& o) {
    const auto report = run_bench(o);
    return report.ok() ? "" : report.status().message();
  };
  BenchOptions views = tiny();
  views.work.views = 9;
  EXPECT_NE(error(views).find("--views 9"), std::string::npos);
  BenchOptions tokens = tiny();
  tokens.work.tokens = 60000;
  EXPECT_NE(error(tokens).find("--tokens 60000"), std::string::npos);
  BenchOptions model = tiny();
  model.synthetic = "huge";
  EXPECT_NE(error(model).find("pi05, tiny"), std::string::npos);
}

}  // namespace
}  // namespace servoflow::toolkit
