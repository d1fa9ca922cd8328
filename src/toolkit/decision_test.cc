#include "toolkit/decision.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "toolkit/probe_parts.h"

namespace servoflow::toolkit {
namespace {

// A device with every product of the model at one rate per precision.
ProbedDevice device(const std::string& name, double gbs, const std::map<std::string, double>& gops) {
  ProbedDevice d{.device = name, .memory_bytes = 200'000'000'000, .available_bytes = 100'000'000'000};
  const bool cpu = name == "cpu";
  d.bandwidth.push_back({.bytes = 1 << 30,
                         .workers = cpu ? 2 : 132,
                         .level = "memory",
                         .read = {gbs, 0.01, 7},
                         .copy = {gbs, 0.01, 7},
                         .write = {gbs, 0.01, 7}});
  for (const auto& [precision, rate] : gops)
    for (const ProductSite& s : model_sites(weights::pi05_architecture()))
      for (const int m : s.rows)
        d.products.push_back({.stage = s.stage,
                              .site = s.name,
                              .m = m,
                              .n = s.n,
                              .k = s.k,
                              .precision = precision,
                              .cold = true,
                              .by = cpu ? "cpu/some" : "cuda/some",
                              .weight_bytes = 1,
                              .us = {2e-3 * m * s.n * s.k / rate, 0.01, 5}});
  if (cpu) {
    d.latencies.push_back({"pool_wakeup", "", {2, 0.1, 200}});
    d.threads = {{1, {2000, 0, 3}, {20000, 0, 3}}, {2, {1000, 0, 3}, {10000, 0, 3}}};
  } else {
    d.latencies.push_back({"graph_900", "", {930, 0.1, 50}});
    d.latencies.push_back({"grid_barrier", "", {1.24, 0.1, 9}});
  }
  return d;
}

ProbedDevice quiet_cpu() { return device("cpu", 80, {{"bf16", 850}, {"fp32", 450}}); }

std::set<std::string> fired(const std::vector<ProbedDevice>& devices) {
  MachineProfile profile;
  profile.devices = devices;
  decide(builtin_rules(), profile);
  std::set<std::string> out;
  for (const Json& d : profile.decisions) out.insert(d["rule"].get<std::string>());
  return out;
}

TEST(Decision, EveryRuleIsFiredByItsProfile) {
  ASSERT_GT(builtin_rules().size(), 20u);
  std::set<std::string> seen;
  const auto expect = [&](const ProbedDevice& d, const std::vector<std::string>& rules) {
    const std::set<std::string> got = fired({d});
    for (const std::string& rule : rules) EXPECT_EQ(got.count(rule), 1u) << rule;
    seen.insert(got.begin(), got.end());
  };
  const auto changed = [](ProbedDevice d, const std::function<void(ProbedDevice&)>& change) {
    change(d);
    return d;
  };
  expect(quiet_cpu(), {"quiet", "bf16-fits", "bf16-faster", "prefix-compute-bound", "denoise-compute-bound",
                       "all-threads", "quick-wakeup", "only-device"});
  expect(changed(quiet_cpu(), [](auto& d) { d.steadiness.throttled = true; }), {"throttled"});
  expect(changed(quiet_cpu(), [](auto& d) { d.steadiness.noisy = true; }), {"noisy", "threads-unclear"});
  // 3.25 billion weights: 7.2 GB in BF16, 3.6 in 8 bits, 2.0 in 4.
  expect(changed(quiet_cpu(), [](auto& d) { d.available_bytes = 1'000'000'000; }), {"nothing-fits"});
  expect(changed(quiet_cpu(), [](auto& d) { d.available_bytes = 3'000'000'000; }), {"4-bit-fits"});
  expect(changed(quiet_cpu(), [](auto& d) { d.available_bytes = 5'000'000'000; }), {"8-bit-fits"});
  expect(device("cpu", 80, {{"bf16", 400}, {"fp32", 450}}), {"fp32-not-slower"});
  expect(device("cpu", 80, {{"bf16", 850}}), {"bf16-by-default"});
  const ProbedDevice starved = device("cpu", 0.5, {{"bf16", 850}, {"fp32", 450}});
  expect(starved, {"prefix-bandwidth-bound", "denoise-bandwidth-bound"});
  expect(changed(starved,
                 [](auto& d) {
                   d.precisions = {"bf16", "int4-g128-w4a16"};
                 }),
         {"prefix-bandwidth-bound-4bit", "denoise-bandwidth-bound-4bit"});
  const ProbedDevice vnni = changed(quiet_cpu(), [](auto& d) { d.features = {"avx512_vnni"}; });
  expect(vnni, {"prefix-compute-bound-int8-hardware"});
  ProbedDevice int8 = device("cpu", 80, {{"bf16", 850}, {"fp32", 450}, {"int8-w8a8", 1700}});
  int8.precisions = {"bf16", "fp32", "int8-w8a8"};
  expect(int8, {"prefix-compute-bound-int8", "denoise-compute-bound-int8"});
  const ProbedDevice gpu = device("cuda:0", 4286, {{"bf16", 723000}, {"fp32", 40000}, {"fp8", 1340000}});
  expect(gpu, {"prefix-compute-bound-fp8-hardware", "denoise-bandwidth-bound"});
  expect(changed(gpu, [](auto& d) { d.precisions = {"fp8-w8a8"}; }), {"prefix-compute-bound-fp8"});
  expect(changed(gpu,
                 [](auto& d) {
                   d.latencies = {{"graph_900", "", {9000, 0, 9}}};
                 }),
         {"denoise-overhead-bound"});
  expect(changed(quiet_cpu(), [](auto& d) { d.threads[1].expert_us.median = 9000; }), {"fewer-threads"});
  expect(changed(quiet_cpu(), [](auto& d) { d.latencies[0].us.median = 500; }), {"slow-wakeup"});
  for (const auto& pair : {std::vector{quiet_cpu(), gpu}, std::vector<ProbedDevice>(2, {.device = "cpu"})}) {
    const std::set<std::string> got = fired(pair);
    seen.insert(got.begin(), got.end());
  }
  for (const Rule& rule : builtin_rules())
    EXPECT_EQ(seen.count(rule.name), 1u) << rule.name << " never fired";
}

TEST(Decision, NoiseKeepsARuleFromFiring) {
  ProbedDevice d = quiet_cpu();
  d.threads[1].expert_us.median = 9000;
  EXPECT_EQ(fired({d}).count("fewer-threads"), 1u);
  d.steadiness.noisy = true;
  EXPECT_EQ(fired({d}).count("fewer-threads"), 0u);
}

TEST(Decision, TheChoiceIsTheFastestDeviceAndItsReasonsAreToldWithFigures) {
  MachineProfile profile;
  profile.devices = {quiet_cpu(), device("cuda:0", 4286, {{"bf16", 723000}, {"fp32", 40000}})};
  decide(builtin_rules(), profile);
  EXPECT_EQ(profile.choice.device, "cuda:0");
  EXPECT_EQ(profile.choice.precision, "bf16");
  EXPECT_EQ(profile.choice.threads, 0);
  for (const char* part : {"fastest-device", "best_ms = ", "second_ms = ", "bf16-faster"})
    EXPECT_NE(profile.choice.why.find(part), std::string::npos) << profile.choice.why;

  profile.devices = {device("cpu", 80, {{"bf16", 100}, {"fp32", 450}})};
  profile.devices[0].threads[1].vision_us.median = 90000;
  decide(builtin_rules(), profile);
  EXPECT_EQ(profile.choice.device, "cpu");
  EXPECT_EQ(profile.choice.precision, "fp32");
  EXPECT_EQ(profile.choice.threads, 1);
  EXPECT_NE(profile.choice.why.find("threads_best = 1 < threads_usable = 2"), std::string::npos)
      << profile.choice.why;
}

// From the published counts (GFLOP and bytes of weights for 2 pictures, 200 tokens, horizon 50): vision 440
// and prefix 2737 GFLOP at 723 TFLOP/s, ten times 0.623 GB of weights and 13 MB of cache at 4286 GB/s.
TEST(Decision, FiguresFollowFromTheCounts) {
  const Figures f = device_figures(device("cuda:0", 4286, {{"bf16", 723000}}));
  EXPECT_NEAR(std::get<double>(f.at("floor_ms")), 440 / 723.0 + 2737 / 723.0 + 10 * 0.636 / 4.286, 0.02);
  EXPECT_NEAR(std::get<double>(f.at("step_bytes_ms")), 0.636 / 4.286, 0.001);
  EXPECT_NEAR(std::get<double>(f.at("step_flops_ms")), 36.8 / 723, 0.0005);
  // With every product at one rate, so is the whole: 3545 GFLOP.
  EXPECT_NEAR(std::get<double>(f.at("expected_bf16_ms")), 3545 / 723.0, 0.02);
  EXPECT_EQ(f.count("expected_fp32_ms"), 0u);
  for (const auto& [name, value] : f) EXPECT_EQ(figure_meanings().count(name), 1u) << name;
}

TEST(Decision, WhatWasNotMeasuredMakesConditionsFalse) {
  const auto rules = parse_rules(R"(
[[rule]]
topic = "a"
name = "needs-it"
when = ["memory_gbs != 1"]
verdict = "x"
advice = "x"
[[rule]]
topic = "a"
name = "other-kind"
when = ["kind != 3"]
verdict = "x"
advice = "x"
[[rule]]
topic = "a"
name = "otherwise"
when = []
verdict = "{kind}"
advice = "{kind} {memory_gbs}"
)",
                                 "test.toml");
  ASSERT_TRUE(rules.ok()) << rules.status().message();
  const auto decisions = decide(*rules, {{"kind", std::string("cpu")}}, false);
  ASSERT_EQ(decisions.size(), 1u);
  EXPECT_EQ(decisions[0].rule, "otherwise");
  EXPECT_EQ(decisions[0].advice, "cpu unmeasured");
}

TEST(Decision, ComparisonsMeanWhatTheySay) {
  const auto holds = [](const std::string& condition) {
    const auto rules =
        parse_rules("[[rule]]\ntopic = \"t\"\nname = \"n\"\nverdict = \"v\"\nadvice = \"a\"\nwhen = ['" +
                        condition + "']\n",
                    "test.toml");
    EXPECT_TRUE(rules.ok()) << condition << ": " << rules.status().message();
    const Figures figures = {
        {"memory_gbs", 2.0}, {"memory_one_gbs", 1.0}, {"noisy", true}, {"kind", std::string("cpu")}};
    return rules.ok() && decide(*rules, figures, false).size() == 1;
  };
  for (const char* yes :
       {"memory_gbs > 1.9", "memory_gbs >= 2", "memory_gbs <= 2", "memory_gbs == 2", "memory_gbs != 3",
        "memory_gbs > memory_one_gbs", "memory_gbs >= 2 * memory_one_gbs", "noisy == true", "noisy != false",
        "kind == \"cpu\"", "kind != \"cuda\"", "memory_one_gbs < memory_gbs"})
    EXPECT_TRUE(holds(yes)) << yes;
  for (const char* no : {"memory_gbs > 2", "memory_gbs < 2", "memory_gbs > 2 * memory_one_gbs",
                         "noisy == false", "kind == \"cuda\"", "memory_gbs == 1"})
    EXPECT_FALSE(holds(no)) << no;
}

TEST(Decision, BadRulesAreRefusedAllAtOnce) {
  const auto message = [](const std::string& text) {
    const auto rules = parse_rules(text, "bad.toml");
    EXPECT_FALSE(rules.ok()) << text;
    return rules.ok() ? std::string() : rules.status().message();
  };
  const std::string all = message(R"(
about = "x"
[[rule]]
topic = "t"
name = "twice"
when = ["nonsense > 1", "kind > true", "kind", "memory_gbs ~ 1", "memory_gbs > no_such", "memory_gbs > a * kind", 7]
verdict = "v"
advice = "{no_such_figure} {open"
scope = "galaxy"
colour = "red"
[[rule]]
topic = 3
name = "twice"
verdict = "v"
advice = "a"
)");
  for (const char* part :
       {"about", "nonsense", "when[1]", "when[2]", "when[3]", "when[4]", "when[5]", "when[6]",
        "no_such_figure", "never closed", "scope", "colour", "rule[1].topic", "used twice", "rule[1].when"})
    EXPECT_NE(all.find(part), std::string::npos) << part << "\n" << all;
  EXPECT_NE(message("[[rule]\n").find("line 1"), std::string::npos);
  EXPECT_NE(message("x = \"\xc3\xa9\"").find("only [[rule]]"), std::string::npos);
  EXPECT_NE(message("").find("there is none"), std::string::npos);
  message("rule = 3");
  message("rule = [1, 2]");
}

}  // namespace
}  // namespace servoflow::toolkit
