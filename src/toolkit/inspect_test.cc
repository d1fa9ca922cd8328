#include "toolkit/inspect.h"

#include <gtest/gtest.h>

#include "policy/network.h"
#include "weights/checkpoint.h"

namespace servoflow::toolkit {
namespace {

TEST(Inspect, AGoodCheckpointHasNoProblems) {
  const InspectReport r = inspect("tests/golden/openpi-tiny", {.robot = "libero", .scan = true});
  EXPECT_TRUE(inspect_outcome(r).ok()) << inspect_text(r);
  EXPECT_EQ(r.contract_hash.size(), 64u);
  EXPECT_TRUE(r.scan && r.scan->empty());
  const Json json = inspect_to_json(r);
  EXPECT_EQ(json["layout"], "openpi");
  EXPECT_EQ(json["contract"]["name"], "libero");
  EXPECT_NE(inspect_text(r).find("x [0.05 m], y [0.05 m]"), std::string::npos);
  EXPECT_EQ(json["contract"]["actions"]["names"][6], "gripper");
  EXPECT_EQ(json["memory"].size(), 2u);
  EXPECT_TRUE(json["problems"].empty());
}

TEST(Inspect, WithoutARobotItSaysWhichThereAre) {
  const InspectReport r = inspect("tests/golden/openpi-tiny", {});
  EXPECT_TRUE(inspect_outcome(r).ok());
  EXPECT_FALSE(r.contract);
  EXPECT_NE(inspect_text(r).find("libero"), std::string::npos);
}

TEST(Inspect, WhatWasAskedForMustBeThere) {
  EXPECT_FALSE(inspect_outcome(inspect("tests/golden/openpi-tiny", {.robot = "toaster"})).ok());
  EXPECT_FALSE(inspect_outcome(inspect("tests/golden/openpi-tiny", {.tokenizer = "nowhere.model"})).ok());
  const InspectReport nothing = inspect("tests/golden/nowhere", {});
  EXPECT_EQ(exit_code(inspect_outcome(nothing)), 2);
  EXPECT_NE(inspect_text(nothing).find("tests/golden/nowhere"), std::string::npos);
  EXPECT_FALSE(json_kind(inspect_to_json(nothing)).empty());
}

// The plan is told before anything is loaded; what is then loaded must be what was planned, padding aside.
TEST(Inspect, ThePlanIsWhatTheEngineTakes) {
  const auto checkpoint = weights::open_checkpoint("tests/golden/openpi-tiny");
  ASSERT_TRUE(checkpoint.ok());
  for (const MemoryPlan& plan : plan_memory(checkpoint->architecture, 3, 4)) {
    if (!plan.unavailable.empty()) continue;
    const auto network =
        policy::Network::create(checkpoint->source, checkpoint->architecture,
                                {.device = "cpu", .precision = plan.precision, .threads = 1});
    ASSERT_TRUE(network.ok()) << network.status().message();
    const policy::NetworkInfo& info = (*network)->info();
    EXPECT_EQ(plan.workspace, info.workspace_bytes) << plan.precision;
    const double ratio = static_cast<double>(info.weight_bytes) / static_cast<double>(plan.weights);
    EXPECT_GT(ratio, 0.95) << plan.precision;
    EXPECT_LT(ratio, 1.25) << plan.precision << ": panels of tiny matrices are padded";
  }
}

TEST(Inspect, BytesReadWell) {
  EXPECT_EQ(bytes_text(0), "0 B");
  EXPECT_EQ(bytes_text(999), "999 B");
  EXPECT_EQ(bytes_text(1234567), "1.23 MB");
  EXPECT_EQ(bytes_text(6.7e9), "6.7 GB");
}

}  // namespace
}  // namespace servoflow::toolkit
