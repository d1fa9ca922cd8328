#include "toolkit/plan_fit.h"

#include <gtest/gtest.h>

#include <filesystem>

#include "toolkit/plan_compare.h"

namespace servoflow::toolkit {
namespace {

std::string result(const std::string& source) {
  return "bench/results/" + std::filesystem::path(source).filename().string();
}

// The factors in profiles/ are those that the named results give, and nothing else.
TEST(PlanFit, ProfilesHoldTheFactorsOfTheResultsTheyName) {
  for (const char* name : {"h200", "cpu"}) {
    const Result<DeviceProfile> device = load_device_profile(name);
    ASSERT_TRUE(device.ok() && device->engine);
    const EngineFactors& have = *device->engine;
    const Result<MeasuredCase> single = read_measured(result(have.source));
    ASSERT_TRUE(single.ok()) << single.status().message();
    Result<MeasuredCase> composition = Status::invalid("none");
    if (!have.composition_source.empty()) {
      composition = read_measured(result(have.composition_source));
      ASSERT_TRUE(composition.ok()) << composition.status().message();
    }
    const Result<EngineFactors> want =
        fit_engine(*device, *single, composition.ok() ? &*composition : nullptr, have);
    ASSERT_TRUE(want.ok()) << want.status().message();
    const auto near = [&](const char* what, double a, double b) {
      EXPECT_NEAR(a, b, 0.002 * b + 1e-4) << name << ": " << what << " is not what " << have.source
                                          << " gives; `make plan-fit` writes it anew";
    };
    near("vision", have.vision, want->vision);
    near("prefix", have.prefix, want->prefix);
    near("step", have.step, want->step);
    near("phase_us", have.phase_us, want->phase_us);
    near("composition_us", have.composition_us, want->composition_us);
    near("host_ms", have.host_ms, want->host_ms);
  }
}

TEST(PlanFit, PredictsTheCommittedResultsItWasNotFittedOn) {
  const Result<Accuracy> a = check_accuracy("bench/results");
  ASSERT_TRUE(a.ok()) << a.status().message();
  EXPECT_GE(a->predicted, 5);
  EXPECT_LE(a->mape, 0.15) << "end to end";
  RecordProperty("mape_percent", std::to_string(100 * a->mape));
  int cpu = 0, gpu = 0, fitted = 0;
  for (const AccuracyRow& r : a->rows) {
    if (!r.left_out.empty()) continue;
    fitted += r.fitted;
    if (r.fitted) {
      EXPECT_LT(std::abs(r.error()), 0.005) << r.file;
    }
    (r.device == "cpu" ? cpu : gpu) += !r.fitted && !r.same_work;
    EXPECT_GE(r.measured_ms, r.floor_ms) << r.file << " is faster than its floor: a rate is wrong";
    EXPECT_NEAR(r.predicted_gb, r.measured_gb, 0.1 * r.measured_gb) << r.file;
  }
  EXPECT_EQ(fitted, 2);
  EXPECT_GE(cpu, 1);
  EXPECT_GE(gpu, 4);
}

// A device that is exactly the model gives its own factors back.
TEST(PlanFit, RecoversFactorsOfASyntheticDevice) {
  const Result<DeviceProfile> h200 = load_device_profile("h200");
  ASSERT_TRUE(h200.ok());
  DeviceProfile device = *h200;
  device.engine->vision = 0.31;
  device.engine->prefix = device.engine->step = 0.62;
  device.engine->phase_us = 4.5;
  device.engine->host_ms = 0.2;
  const UsedRates rates = *used_rates(device);
  const PlanCase plan{.architecture = weights::pi05_architecture()};
  const Prediction p = *predict(plan, device, rates);
  MeasuredCase m{.file = "synthetic.json",
                 .precision = "bf16",
                 .backend = "cuda/x",
                 .hardware = "NVIDIA H200",
                 .requests = {WorkShape{}},
                 .ms = p.ms,
                 .vision_ms = p.vision.ms,
                 .prefix_ms = p.prefix.ms,
                 .denoise_ms = p.denoise.ms};
  const Result<EngineFactors> got = fit_engine(device, m, nullptr, *device.engine);
  ASSERT_TRUE(got.ok()) << got.status().message();
  EXPECT_NEAR(got->vision, 0.31, 1e-9);
  EXPECT_NEAR(got->prefix, 0.62, 1e-9);
  EXPECT_NEAR(got->phase_us, 4.5, 1e-9);
  EXPECT_NEAR(got->host_ms, 0.2, 1e-9);

  m.vision_ms = 0.1;  // faster than the device can be
  const Result<EngineFactors> broken = fit_engine(device, m, nullptr, *device.engine);
  ASSERT_FALSE(broken.ok());
  EXPECT_NE(broken.status().message().find("do not explain"), std::string::npos);
  m.requests.assign(2, WorkShape{});
  EXPECT_FALSE(fit_engine(device, m, nullptr, *device.engine).ok());
}

TEST(PlanFit, WhatIsNoBenchResultIsAnError) {
  EXPECT_FALSE(measured_from_json(Json::array(), "x").ok());
  EXPECT_FALSE(measured_from_json({{"end_to_end_ms", {{"p50", -1}}}}, "x").ok());
  Json good = {
      {"work", {{"views", 2}, {"tokens", 200}, {"horizon", 50}, {"steps", 10}, {"batch", 1}}},
      {"end_to_end_ms", {{"p50", 10.0}}},
      {"stages_ms", {{"vision", {{"p50", 1.0}}}, {"prefix", {{"p50", 1.0}}}, {"denoise", {{"p50", 1.0}}}}},
      {"precision", "bf16"},
      {"backend", "cuda/x"}};
  EXPECT_TRUE(measured_from_json(good, "x").ok());
  Json bad = good;
  bad["work"]["steps"] = 1000000;
  const Result<MeasuredCase> steps = measured_from_json(bad, "x");
  ASSERT_FALSE(steps.ok());
  EXPECT_NE(steps.status().message().find("x: work.steps: must lie between"), std::string::npos);
  bad = good;
  bad["stages_ms"]["prefix"]["p50"] = "slow";
  EXPECT_FALSE(measured_from_json(bad, "x").ok());
  bad = good;
  bad["rates"] = {{"prefix", {{"weights", 17}}}};
  EXPECT_EQ(measured_from_json(bad, "x")->left_out, "another network than pi05");
  bad = good;
  bad["batches"] = {1, "x", {{"batch", 1}}};
  EXPECT_TRUE(measured_from_json(bad, "x").ok());
  EXPECT_FALSE(read_measured("/nowhere.json").ok());
  EXPECT_FALSE(check_accuracy("/nowhere").ok());
}

TEST(PlanCompare, OthersFiguresStandAboveTheFloor) {
  const Result<Published> p = compare_published();
  ASSERT_TRUE(p.ok()) << p.status().message();
  EXPECT_GE(p->figures.size(), 8u);
  for (const PublishedFigure& f : p->figures) {
    EXPECT_FALSE(f.source.empty());
    EXPECT_GE(f.ms, f.prediction.floor_ms) << f.device << " " << f.engine << ": below what we call a floor";
  }
}

TEST(PlanCompare, ThorsTableAddsUpAndItsBandwidthsAreThoseMeasuredThere) {
  const Result<Published> p = compare_published();
  ASSERT_TRUE(p.ok());
  ASSERT_EQ(p->thor.size(), 5u);
  double total = 0;
  for (std::size_t i : {0u, 1u, 2u, 4u}) total += p->thor[i].measured_ms;
  EXPECT_NEAR(total, 176.5, 1e-9);  // the 5.7 Hz
  EXPECT_NEAR(p->thor[2].weight_gb, 6.22985216 + 0.13123584, 1e-9);
  EXPECT_NEAR(p->thor[2].implied_gbs, 6.361088 / 0.1023, 0.01);
  for (std::size_t i = 0; i < 3; ++i) EXPECT_LT(p->thor[i].implied_gbs, 273.0 / 3);
}

TEST(PlanCompare, BadFilesAreErrors) {
  const auto error = [](const std::string& toml) {
    const Result<Published> p = compare_published(toml, "f.toml");
    return p.ok() ? std::string() : p.status().message();
  };
  const std::string thor = "[thor]\nsource=\"s\"\nvision_ms=1\nprefix_ms=1\ndenoise_ms=1\nother_ms=1\n";
  EXPECT_EQ(error("figure = []\n" + thor), "");
  EXPECT_NE(error(thor).find("figure: missing"), std::string::npos);
  EXPECT_NE(error("figure = [{}]\n" + thor).find("figure[0].device: missing"), std::string::npos);
  EXPECT_NE(error("figure = []\n[thor]\n").find("thor.vision_ms: missing"), std::string::npos);
  EXPECT_NE(error("figure = [{device=\"x\", engine=\"e\", precision=\"bf16\", ms=1, source=\"s\"}]\n" + thor)
                .find("no such profile"),
            std::string::npos);
}

}  // namespace
}  // namespace servoflow::toolkit
