#include "toolkit/inspect.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <map>

#include "core/file.h"
#include "policy/network.h"
#include "toolkit/quantize.h"
#include "weights/checkpoint.h"
#include "weights/manifest.h"
#include "weights/precision.h"

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

// Group by group as the config says it; what it leaves in floating point by its dtype.
TEST(Inspect, TellsThePrecisionOfEveryPart) {
  const Json plain = inspect_to_json(inspect("tests/golden/openpi-tiny", {}));
  EXPECT_EQ(plain["quantization"], nullptr);
  for (const Json& p : plain["precisions"]) EXPECT_EQ(p["group"], nullptr);
  EXPECT_EQ(inspect_text(inspect("tests/golden/openpi-tiny", {})).find("quantization"), std::string::npos);

  namespace fs = std::filesystem;
  const fs::path dir = fs::temp_directory_path() / ("servoflow-inspect-" + std::to_string(::getpid()));
  const std::string plan = dir.string() + ".toml";
  ASSERT_TRUE(write_file_atomically(plan,
                                    "precision_plan = 1\nname = \"mixed\"\ndefault = \"bf16\"\n[[rules]]\n"
                                    "match = \"*vision*fc1\"\nformat = \"int8-w8a16\"\n[[rules]]\n"
                                    "match = \"*gemma_expert*mlp*\"\nformat = \"nvfp4-w4a16\"\n")
                  .ok());
  for (const auto layout : {quant::Convention::kCompressedTensors, quant::Convention::kModelOpt}) {
    fs::remove_all(dir);
    const bool modelopt = layout == quant::Convention::kModelOpt;
    const auto made = quantize_checkpoint({.checkpoint = "tests/golden/openpi-tiny",
                                           .out = dir.string(),
                                           .recipe = modelopt ? "mlp-nvfp4" : plan,
                                           .layout = layout});
    ASSERT_TRUE(made.ok()) << made.status().message();
    const InspectReport r = inspect(dir.string(), {});
    ASSERT_TRUE(inspect_outcome(r).ok()) << inspect_text(r);
    EXPECT_EQ(r.weights.quantization, modelopt ? "modelopt" : "compressed-tensors");
    // The report of what was quantized is the reference: layers and parameters of each format and part.
    std::map<std::pair<std::string, std::string>, std::pair<int, std::uint64_t>> expected, seen;
    for (const LayerReport& layer : made->layers) {
      auto& [layers, parameters] = expected[{std::string(weights::component_of(layer.name)), layer.format}];
      ++layers;
      parameters += static_cast<std::uint64_t>(layer.rows * layer.cols);
    }
    int layers = 0;
    for (const weights::StoredPrecision& p : r.weights.precisions) {
      layers += p.layers;
      EXPECT_GT(p.bytes, 0u);
      EXPECT_EQ(p.group.empty(), p.layout.empty());
      if (p.group.empty()) {
        EXPECT_EQ(p.precision, "fp32") << "what the tiny checkpoint stores";
        EXPECT_EQ(p.bytes, 4 * p.parameters);
        continue;
      }
      EXPECT_LT(p.bytes, 2 * p.parameters);
      seen[{p.component, p.precision}] = {p.layers, p.parameters};
    }
    EXPECT_EQ(seen, expected);
    EXPECT_EQ(layers,
              static_cast<int>(
                  weights::linear_layers(weights::open_checkpoint(dir.string())->architecture).size()));
    const std::string text = inspect_text(r);
    EXPECT_NE(text.find(modelopt ? "language model                nvfp4-w4a16"
                                 : "expert                        nvfp4-w4a16"),
              std::string::npos)
        << text;
    EXPECT_NE(text.find("none: in floating point"), std::string::npos) << text;
    const Json json = inspect_to_json(r);
    ASSERT_EQ(json["precisions"].size(), r.weights.precisions.size());
    EXPECT_EQ(json["precisions"][0]["component"], "vision");
    // Without weights, too, for programs.
    const auto described = Policy::describe(dir.string(), "libero");
    ASSERT_TRUE(described.ok()) << described.status().message();
    ASSERT_EQ(described->components.size(), r.weights.precisions.size());
    for (std::size_t i = 0; i < described->components.size(); ++i) {
      EXPECT_EQ(described->components[i].precision, r.weights.precisions[i].precision);
      EXPECT_EQ(described->components[i].layers, r.weights.precisions[i].layers);
      EXPECT_EQ(described->components[i].kernel, "");
    }
  }
  fs::remove_all(dir);
  fs::remove(plan);
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
