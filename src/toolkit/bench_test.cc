#include "toolkit/bench.h"

#include <gtest/gtest.h>

#include <numeric>

#include "toolkit/bench_robots.h"

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

TEST(Bench, ACheckpointsRobotSendsThePicturesItMust) {
  BenchOptions o = tiny();
  o.synthetic.clear();
  o.checkpoint = "models/metaworld-nano";
  o.work = {.tokens = 7, .horizon = 16, .steps = 1};
  o.repeat = o.warmup = 1;
  o.robot_views = true;
  const auto three = run_bench(o);
  ASSERT_TRUE(three.ok()) << three.status().message();
  EXPECT_EQ(three->work.views, 3);
  o.robot_views = false;
  const auto two = run_bench(o);
  ASSERT_FALSE(two.ok());
  EXPECT_EQ(two.status().message(), "--views 2: robot metaworld needs at least 3 pictures");
  o.work.views = 3;
  o.work.batch = 2;
  o.ragged = true;
  EXPECT_NE(run_bench(o).status().message().find("one less"), std::string::npos);
}

TEST(Bench, EveryBatchIsComparedWithItsRequestsAlone) {
  BenchOptions o = tiny();
  o.work.views = 2;
  o.work.batch = 3;
  o.ragged = o.batches = o.soak = true;
  const auto report = run_bench(o);
  ASSERT_TRUE(report.ok()) << report.status().message();
  ASSERT_EQ(report->batches.size(), 3u);
  for (const BatchBench& b : report->batches) EXPECT_TRUE(b.equals_alone) << b.size;
  EXPECT_EQ(report->compared_repeats, 0) << "fewer than a period";
  EXPECT_NE(report->actions_hash, 0u);
  EXPECT_TRUE(bench_outcome(*report).ok()) << bench_outcome(*report).message();
  const Json j = bench_to_json(*report);
  EXPECT_EQ(j["batches"][2]["batch"], 3);
  EXPECT_GT(j["memory"]["ended"]["resident_bytes"], 0);
  EXPECT_TRUE(j["gpu"].is_null());
  EXPECT_TRUE(j["device_ms"].is_null());
  EXPECT_NE(bench_text(*report).find("as alone"), std::string::npos);
}

TEST(Bench, RepeatsOfTheSameNoiseAreCompared) {
  BenchOptions o = tiny();
  o.work.steps = 1;
  o.repeat = 60;
  const auto report = run_bench(o);
  ASSERT_TRUE(report.ok()) << report.status().message();
  EXPECT_EQ(report->compared_repeats, 10);
  EXPECT_EQ(report->different_repeats, 0);
}

TEST(Bench, RaggedRequestsDiffer) {
  const WorkShape work{.views = 2, .tokens = 200, .batch = 8};
  EXPECT_EQ(request_shape(work, false, 5).tokens, 200);
  EXPECT_EQ(request_shape(work, true, 0).tokens, 200);
  EXPECT_EQ(request_shape(work, true, 0).views, 2);
  EXPECT_EQ(request_shape(work, true, 7).tokens, 113);
  EXPECT_EQ(request_shape(work, true, 7).views, 1);
  EXPECT_EQ(request_shape({.views = 1, .tokens = 1, .batch = 2}, true, 1).tokens, 1);
}

TEST(Bench, WhatMustNotHappenIsAFailure) {
  BenchReport r;
  r.settled = {std::uint64_t{100} << 20, 50};
  r.ended = {std::uint64_t{200} << 20, 60};
  EXPECT_TRUE(bench_outcome(r).ok()) << "memory counts in a soak alone";
  r.soak = true;
  r.compared_repeats = 5;
  r.different_repeats = 2;
  r.batches = {{.size = 4, .equals_alone = false}};
  const Status status = bench_outcome(r);
  EXPECT_EQ(status.code(), StatusCode::kCheckFailed);
  for (const char* part : {"2 of 5 repeats", "batch of 4", "host memory grew", "GPU memory grew by 10 bytes"})
    EXPECT_NE(status.message().find(part), std::string::npos) << status.message();
}

TEST(Bench, AGpusReportSaysItsStateAndItsShareOfThePeaks) {
  auto report = run_bench(tiny());
  ASSERT_TRUE(report.ok()) << report.status().message();
  report->hardware = "a GPU";
  report->device_ms = report->end_to_end;
  report->device_peaks = DevicePeaks{4000, 700, "ceilings.json"};
  report->gpu = GpuBench{.limits = {{"driver", "1"}}, .before = {.sm_mhz = 345}, .after = {.power_w = 400.0}};
  report->gpu->during = {{.sm_mhz = 1980, .held_down = 4}};
  const std::string text = bench_text(*report);
  for (const char* part :
       {"TFLOP/s", "on the GPU", "SM 345 MHz", "held down by power_cap", "400 W", "ceilings.json"})
    EXPECT_NE(text.find(part), std::string::npos) << part << "\n" << text;
  const Json j = bench_to_json(*report);
  EXPECT_EQ(j["gpu"]["during"][0]["sm_mhz"], 1980);
  EXPECT_EQ(j["device_peaks"]["copy_gbs"], 4000);
  EXPECT_GT(j["rates"]["prefix"]["arithmetic_percent"], 0.0);
  report->gpu->problem = "NVML: not here";
  EXPECT_NE(bench_text(*report).find("not read: NVML: not here"), std::string::npos);
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
  BenchOptions ceilings = tiny();
  ceilings.ceilings = "bench/ceilings/h200.json";
  EXPECT_NE(error(ceilings).find("--ceilings"), std::string::npos);
  BenchOptions prompt = tiny();
  prompt.prompt = "open";
  prompt.ragged = true;
  EXPECT_NE(error(prompt).find("--ragged"), std::string::npos);
}

}  // namespace
}  // namespace servoflow::toolkit
