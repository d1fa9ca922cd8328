#include "toolkit/device_profile.h"

#include <gtest/gtest.h>

#include "core/file.h"

namespace servoflow::toolkit {
namespace {

constexpr const char* kGood = R"(
name = "mine"
title = "My GPU"
kind = "gpu"
memory_gb = 16
power_w = 100
borrow = "h200"
[datasheet]
source = "its box"
bandwidth_gbs = 500
tflops = { bf16 = 100, fp8 = 200 }
)";

std::string with(std::string text, const std::string& from, const std::string& to) {
  const std::size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return text.replace(at, from.size(), to);
}

std::string error_of(const std::string& text) {
  const Result<DeviceProfile> p = parse_device_profile(text, "mine.toml");
  return p.ok() ? "" : p.status().message();
}

void expect_error(const std::string& text, const std::string& what) {
  const std::string error = error_of(text);
  EXPECT_NE(error.find(what), std::string::npos) << "wanted: " << what << "\ngot: " << error;
}

TEST(DeviceProfile, EveryBuiltInOneIsRightAndHasItsSources) {
  const std::vector<std::string> names = list_device_profiles();
  for (const char* name : {"thor", "orin", "rtx4090", "rtx5090", "a100", "h100", "h200", "b200", "cpu"})
    EXPECT_NE(std::find(names.begin(), names.end(), name), names.end()) << name;
  for (const std::string& name : names) {
    const Result<DeviceProfile> p = load_device_profile(name);
    ASSERT_TRUE(p.ok()) << p.status().message();
    EXPECT_EQ(p->name, name);
    const Result<UsedRates> rates = used_rates(*p);
    ASSERT_TRUE(rates.ok()) << rates.status().message();
    EXPECT_GE(rates->sources.size(), 3u);
    EXPECT_GT(rates->bandwidth_gbs, 0);
    EXPECT_GT(rates->tflops.at("bf16"), 0);
    // A measured rate above the datasheet's is a mistake in one of the two.
    if (p->measured)
      for (const auto& [precision, rate] : p->measured->tflops)
        if (p->datasheet.tflops.count(precision) > 0) {
          EXPECT_LE(rate, p->datasheet.tflops.at(precision)) << name << " " << precision;
        }
  }
}

TEST(DeviceProfile, MissingMeasurementsAreTheLendersShareOfTheDatasheet) {
  const Result<DeviceProfile> p = parse_device_profile(kGood, "mine.toml");
  ASSERT_TRUE(p.ok()) << p.status().message();
  const Result<UsedRates> rates = used_rates(*p);
  ASSERT_TRUE(rates.ok());
  // H200: 4286 of 4800 GB/s, 723 of 989 and 1340 of 1979 TFLOP/s.
  EXPECT_NEAR(rates->bandwidth_gbs, 500 * 4286.0 / 4800, 1e-9);
  EXPECT_NEAR(rates->tflops.at("bf16"), 100 * 723.0 / 989, 1e-9);
  EXPECT_NEAR(rates->tflops.at("fp8"), 200 * 1340.0 / 1979, 1e-9);
  EXPECT_EQ(rates->tflops.count("int8"), 0u);
  EXPECT_TRUE(rates->rates_borrowed && rates->engine_borrowed);
  EXPECT_NE(rates->sources.back().find("a guess here"), std::string::npos);
}

TEST(DeviceProfile, WhatWasMeasuredComesFirst) {
  const std::string text =
      std::string(kGood) + "[measured]\nsource = \"here\"\nbandwidth_gbs = 321\ntflops = { bf16 = 77 }\n";
  const Result<DeviceProfile> p = parse_device_profile(text, "mine.toml");
  ASSERT_TRUE(p.ok()) << p.status().message();
  const Result<UsedRates> rates = used_rates(*p);
  ASSERT_TRUE(rates.ok());
  EXPECT_DOUBLE_EQ(rates->bandwidth_gbs, 321);
  EXPECT_DOUBLE_EQ(rates->tflops.at("bf16"), 77);
}

TEST(DeviceProfile, WithoutTheOneLaunchTheCompositionServesSingleRequests) {
  const Result<DeviceProfile> p =
      parse_device_profile(with(kGood, "power_w", "one_launch = false\npower_w"), "mine.toml");
  ASSERT_TRUE(p.ok());
  EXPECT_EQ(used_rates(*p)->engine.loop_requests, 0);
}

TEST(DeviceProfile, BadFilesNameFieldAndCause) {
  expect_error(with(kGood, "kind = \"gpu\"", "kind = \"tpu\""),
               "mine.toml: kind: must be \"gpu\" or \"cpu\"");
  expect_error(with(kGood, "memory_gb = 16", ""), "memory_gb: missing");
  expect_error(with(kGood, "memory_gb = 16", "memory_gb = -1"), "memory_gb: must lie between");
  expect_error(with(kGood, "bandwidth_gbs = 500", "bandwidth_gbs = \"fast\""),
               "datasheet.bandwidth_gbs: must be a number, is string");
  expect_error(with(kGood, "bandwidth_gbs = 500", "bandwidth_gbs = 0"), "datasheet.bandwidth_gbs: must lie");
  expect_error(with(kGood, "bf16 = 100", "bf17 = 100"), "datasheet.tflops.bf17: unknown key");
  expect_error(with(kGood, "source = \"its box\"", ""), "datasheet.source: missing");
  expect_error(with(kGood, "source = \"its box\"", "source = \"\""), "a rate without its source is hearsay");
  expect_error(with(kGood, "borrow = \"h200\"", ""), "has no [engine] and no `borrow");
  expect_error(with(kGood, "{ bf16 = 100, fp8 = 200 }", "{ fp8 = 200 }"), "needs bf16 or fp32");
  expect_error("name = \"x\"", "has neither [datasheet] nor [measured]");
  expect_error(std::string(kGood) + "[engine]\nsource = \"s\"\nvision = 2\nprefix = 0.5\nstep = 0.5\n",
               "engine.vision: must lie between");
  expect_error(
      std::string(kGood) + "[measured]\nsource = \"s\"\nbandwidth_low_gbs = 9\nbandwidth_high_gbs = 8\n",
      "is above bandwidth_high_gbs");
  expect_error("name = [", "not valid TOML");
  // All problems at once.
  const std::string both = error_of(with(with(kGood, "memory_gb = 16", ""), "kind = \"gpu\"", "kind = 3"));
  EXPECT_NE(both.find("memory_gb"), std::string::npos);
  EXPECT_NE(both.find("kind"), std::string::npos);
}

TEST(DeviceProfile, UnknownNamesAndLendersAreErrors) {
  const Result<DeviceProfile> p = load_device_profile("h201");
  ASSERT_FALSE(p.ok());
  EXPECT_NE(p.status().message().find("there are a100, b200, cpu"), std::string::npos)
      << p.status().message();
  EXPECT_FALSE(load_device_profile("/nowhere/x.toml").ok());
  const Result<DeviceProfile> mine = parse_device_profile(with(kGood, "\"h200\"", "\"h201\""), "m");
  ASSERT_TRUE(mine.ok());
  EXPECT_FALSE(used_rates(*mine).ok());
  const Result<DeviceProfile> chain = parse_device_profile(with(kGood, "\"h200\"", "\"h100\""), "m");
  ASSERT_TRUE(chain.ok());
  const Result<UsedRates> rates = used_rates(*chain);
  ASSERT_FALSE(rates.ok());
  EXPECT_NE(rates.status().message().find("borrows from h100, which has no [engine]"), std::string::npos);
}

TEST(DeviceProfile, AProbesResultIsADevice) {
  const auto load = [](const Json& json) {
    const std::string path = testing::TempDir() + "/sf_probe.json";
    EXPECT_TRUE(write_file_atomically(path, json.dump()).ok());
    return load_device_profile(path);
  };
  const Json median = {{"median", 120.0}, {"spread", 0.01}, {"samples", 5}};
  const Json cpu = {
      {"device", "cpu"},
      {"name", "a CPU"},
      {"memory_bytes", 8e9},
      {"bandwidth",
       {{{"level", "L2"}, {"read_gbs", {{"median", 900.0}}}}, {{"level", "memory"}, {"read_gbs", median}}}},
      {"products",
       {{{"precision", "bf16"}, {"m", 1000}, {"n", 1000}, {"k", 500}, {"us", {{"median", 2000.0}}}},
        {{"precision", "something"}, {"m", 1}, {"n", 1}, {"k", 1}, {"us", {{"median", 1.0}}}}}}};
  const Result<DeviceProfile> p = load({{"devices", {cpu}}});
  ASSERT_TRUE(p.ok()) << p.status().message();
  EXPECT_EQ(p->kind, "cpu");
  EXPECT_DOUBLE_EQ(p->measured->bandwidth_gbs, 120);
  EXPECT_DOUBLE_EQ(p->measured->tflops.at("bf16"), 0.5);  // 1e9 operations in 2 ms
  EXPECT_EQ(p->measured->tflops.size(), 1u);
  const Result<UsedRates> rates = used_rates(*p);
  ASSERT_TRUE(rates.ok()) << rates.status().message();
  EXPECT_TRUE(rates->engine_borrowed);

  // A CPU's instruction peaks stand before its products.
  Json peaks = cpu;
  peaks["peaks"] = {{"bf16_gflops", {{"all_threads", 437.0}}}, {"read_gbs", {{"all_threads", 33.0}}}};
  peaks["bandwidth"] = Json::array();
  const Result<DeviceProfile> by_peaks = load({{"devices", {peaks}}});
  ASSERT_TRUE(by_peaks.ok()) << by_peaks.status().message();
  EXPECT_DOUBLE_EQ(by_peaks->measured->tflops.at("bf16"), 0.437);
  EXPECT_DOUBLE_EQ(by_peaks->measured->bandwidth_gbs, 33);
  // A GPU beside it is what was meant, and its copies are what counts.
  Json gpu = cpu;
  gpu["device"] = "cuda:0";
  gpu["bandwidth"] = {{{"level", "memory"}, {"read_gbs", median}, {"copy_gbs", {{"median", 4000.0}}}}};
  const Result<DeviceProfile> second = load({{"devices", {cpu, gpu}}});
  ASSERT_TRUE(second.ok()) << second.status().message();
  EXPECT_EQ(second->kind, "gpu");
  EXPECT_DOUBLE_EQ(second->measured->bandwidth_gbs, 4000);

  Json broken = cpu;
  broken["products"] = Json::array();
  EXPECT_FALSE(load({{"devices", {broken}}}).ok());
  broken = cpu;
  broken["bandwidth"] = 3;
  EXPECT_FALSE(load({{"devices", {broken}}}).ok());
  EXPECT_FALSE(load({{"devices", Json::array()}}).ok());
  EXPECT_FALSE(load({{"devices", {1, 2}}}).ok());
  EXPECT_FALSE(load(Json::array()).ok());
}

}  // namespace
}  // namespace servoflow::toolkit
