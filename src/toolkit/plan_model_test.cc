#include "toolkit/plan_model.h"

#include <gtest/gtest.h>

#include <cmath>

namespace servoflow::toolkit {
namespace {

DeviceProfile device(const std::string& engine) {
  const Result<DeviceProfile> p = parse_device_profile(R"(
name = "mine"
title = "My GPU"
kind = "gpu"
memory_gb = 16
[datasheet]
source = "its box"
bandwidth_gbs = 2000
tflops = { bf16 = 200, fp8 = 400 }
[measured]
source = "here"
bandwidth_gbs = 1000
tflops = { bf16 = 100, fp8 = 150 }
[engine]
source = "result.json"
)" + engine,
                                                       "mine.toml");
  EXPECT_TRUE(p.ok()) << p.status().message();
  return *p;
}

Prediction plan(const DeviceProfile& d, const PlanCase& c) {
  const Result<Prediction> p = predict(c, d, *used_rates(d));
  EXPECT_TRUE(p.ok()) << p.status().message();
  return *p;
}

const PlanCase kBase{.architecture = weights::pi05_architecture()};

// By hand: 2737.40464128 GFLOP and 3.745513472 + 0.013123584 GB of the prefix (work_test.cc), at 100 TFLOP/s
// halved and 1000 GB/s, plus 18 x 4 kernels of 10 us.
TEST(PlanModel, IsTheFormulaOfItsHeader) {
  const DeviceProfile d = device(
      "vision = 0.25\nprefix = 0.5\nstep = 0.8\nkernel_us = 10\nkernels = 4\nphase_us = 2\nphases = 5\n"
      "loop_requests = 1\ncomposition_us = 70\nhost_ms = 0.5\n");
  const Prediction p = plan(d, kBase);
  const double compute = 2737.40464128 / 100 / 0.5, memory = 3.745513472 + 0.013123584;
  EXPECT_NEAR(p.prefix.compute_ms, compute, 1e-6);
  EXPECT_NEAR(p.prefix.memory_ms, memory, 1e-6);
  EXPECT_NEAR(p.prefix.latency_ms, 0.72, 1e-9);
  EXPECT_NEAR(p.prefix.ms, std::sqrt(compute * compute + memory * memory) + 0.72, 1e-6);
  EXPECT_NEAR(p.prefix.floor_ms, 27.3740464128, 1e-6);  // measured rates, no factor
  EXPECT_NEAR(p.denoise.latency_ms, 10 * 18 * 5 * 2e-3, 1e-9);
  EXPECT_NEAR(p.ms, p.vision.ms + p.prefix.ms + p.denoise.ms + 0.5, 1e-9);
  EXPECT_NEAR(p.hz, 1000 / p.ms, 1e-9);
  EXPECT_STREQ(p.prefix.bound, "compute");
  EXPECT_STREQ(p.denoise.bound, "memory");
}

TEST(PlanModel, FactorsOfOneAndNoLatencyLieBetweenTheFloorAndTheSum) {
  const DeviceProfile d = device("vision = 1\nprefix = 1\nstep = 1\n");
  for (const char* precision : {"bf16", "fp8-w8a8", "mlp-nvfp4", "nvfp4-w4a16", "nvfp4-w4a8"}) {
    PlanCase c = kBase;
    c.precision = precision;
    const Prediction p = plan(d, c);
    for (const StagePrediction* s : {&p.vision, &p.prefix, &p.denoise}) {
      EXPECT_GE(s->ms, s->floor_ms * (1 - 1e-12)) << precision << " " << s->name;
      EXPECT_LE(s->ms, std::sqrt(2.0) * std::max(s->compute_ms, s->memory_ms) * (1 + 1e-12));
    }
  }
}

TEST(PlanModel, ReuseSparesVisionAndPrefix) {
  const DeviceProfile d = device("vision = 1\nprefix = 1\nstep = 1\n");
  PlanCase c = kBase;
  c.reuse = 3;
  const Prediction p = plan(d, c);
  EXPECT_NEAR(p.average_ms, (p.vision.ms + p.prefix.ms) / 3 + p.denoise.ms, 1e-9);
  EXPECT_NEAR(p.hz, 1000 / p.average_ms, 1e-9);
}

TEST(PlanModel, ManyRequestsTakeTheComposition) {
  const DeviceProfile d = device(
      "vision = 1\nprefix = 1\nstep = 1\nphase_us = 2\nphases = 5\nloop_requests = 2\ncomposition_us = 70\n");
  PlanCase c = kBase;
  c.requests.assign(2, WorkShape{});
  EXPECT_NEAR(plan(d, c).denoise.latency_ms, 10 * 18 * 5 * 2 * 2e-3, 1e-9);
  c.requests.assign(3, WorkShape{});
  EXPECT_NEAR(plan(d, c).denoise.latency_ms, 10 * 18 * 70e-3, 1e-9);
}

TEST(PlanModel, PrecisionsStoreWhatTheySay) {
  const DeviceProfile d = device("vision = 1\nprefix = 1\nstep = 1\n");
  PlanCase c = kBase;
  const double bf16 = plan(d, c).prefix.weight_gb;
  for (const auto& [name, share] : {std::pair("fp8-w8a8", 0.5), std::pair("nvfp4-w4a16", 4.5 / 16)}) {
    c.precision = name;
    EXPECT_NEAR(plan(d, c).prefix.weight_gb, bf16 * share, 1e-12) << name;
    EXPECT_DOUBLE_EQ(plan(d, c).prefix.cache_gb, 0.013123584);  // K and V stay in BF16
  }
  // 4-bit weights with BF16 arithmetic: the products' time of BF16, the memory's of 4 bits.
  c.precision = "nvfp4-w4a16";
  EXPECT_NEAR(plan(d, c).prefix.compute_ms, 27.3740464128, 1e-6);
}

// The prefix's MLPs in 4 bits and the rest as it was: 17 of 18 layers' gate, up and down.
TEST(PlanModel, APrecisionOfOneComponentLeavesTheOthers) {
  const DeviceProfile d = device("vision = 1\nprefix = 1\nstep = 1\n");
  PlanCase c = kBase;
  const Prediction bf16 = plan(d, c);
  c.precision = "mlp-nvfp4";
  const Prediction mixed = plan(d, c);
  EXPECT_DOUBLE_EQ(mixed.vision.ms, bf16.vision.ms);
  EXPECT_DOUBLE_EQ(mixed.denoise.ms, bf16.denoise.ms);
  const double mlp = 17.0 * 3 * 2048 * 16384;
  EXPECT_NEAR(bf16.prefix.weight_gb - mixed.prefix.weight_gb, mlp * 11.5 / 8e9, 1e-9);
  EXPECT_NEAR(mixed.prefix.compute_ms, bf16.prefix.compute_ms, 1e-9);
  const weights::Architecture a = weights::pi05_architecture();
  EXPECT_NEAR(predict_memory(a, *plan_precision("bf16"), 1, 3)->weights -
                  predict_memory(a, *plan_precision("mlp-nvfp4"), 1, 3)->weights,
              mlp * 11.5 / 8, 1e3);
  EXPECT_STREQ(plan_precision("fp8-w8a8-static")->name, "fp8-w8a8");
  EXPECT_STREQ(plan_precision("nvfp4-w4a4-dynamic")->name, "nvfp4-w4a4");
}

TEST(PlanModel, WhatTheDeviceCannotMultiplyIsAnError) {
  const DeviceProfile d = device("vision = 1\nprefix = 1\nstep = 1\n");
  PlanCase c = kBase;
  c.precision = "nvfp4-w4a4";
  Result<Prediction> p = predict(c, d, *used_rates(d));
  ASSERT_FALSE(p.ok());
  EXPECT_NE(p.status().message().find("has no rate for fp4"), std::string::npos);
  c.precision = "bf15";
  p = predict(c, d, *used_rates(d));
  ASSERT_FALSE(p.ok());
  EXPECT_NE(p.status().message().find("the planner knows fp32, bf16, mlp-int8"), std::string::npos);
  c.precision = "bf16";
  c.requests.clear();
  EXPECT_FALSE(predict(c, d, *used_rates(d)).ok());
}

TEST(PlanModel, MemoryFollowsBitsAndRequests) {
  const weights::Architecture a = weights::pi05_architecture();
  const PlanMemory bf16 = *predict_memory(a, *plan_precision("bf16"), 1, 3),
                   four = *predict_memory(a, *plan_precision("nvfp4-w4a16"), 1, 3),
                   eight = *predict_memory(a, *plan_precision("bf16"), 8, 3);
  // Matrices of vision, prefix and expert, from 16 to 4.5 bits.
  const double matrices = 414e6 + 1873e6 + 311.5e6;
  EXPECT_NEAR(bf16.weights - four.weights, matrices * 11.5 / 8, 0.01 * bf16.weights);
  EXPECT_LT(four.total(false), 3e9);  // 3 GiB in 4 bits is what the product must fit into
  EXPECT_DOUBLE_EQ(bf16.token_table, 2.0 * 257152 * 2048);
  EXPECT_GT(eight.workspace, 4 * bf16.workspace);
}

}  // namespace
}  // namespace servoflow::toolkit
