#include "stages/postprocess/postprocessor.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <limits>

#include "contract/load.h"
#include "contract/validate.h"
#include "core/json.h"
#include "core/safetensors.h"

namespace servoflow::stages {
namespace {

using contract::Contract;

Contract load(const std::string& directory, const std::string& robot) {
  auto contract =
      contract::load_contract(directory, {.robot = robot, .assets = "", .lerobot_layout = robot.empty()});
  EXPECT_TRUE(contract.ok()) << contract.status().message();
  return std::move(*contract);
}

// Recorded normalised actions go in; the recorded robot actions must come out bit for bit.
int check_cases(const std::string& folder) {
  int cases = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder + "/cases")) {
    SCOPED_TRACE(entry.path().string());
    const auto file = SafetensorsFile::open(entry.path().string());
    EXPECT_TRUE(file.ok()) << file.status().message();
    if (!file.ok()) continue;
    const bool lerobot = file->metadata().at("format") == "lerobot";
    const Contract contract = load(folder, lerobot ? "" : file->metadata().at("robot"));
    const SafeTensor* normalized = file->find("expect/actions_normalized");
    const auto post = Postprocessor::create(contract, static_cast<int>(normalized->shape[1]));
    EXPECT_TRUE(post.ok()) << post.status().message();
    if (!post.ok()) continue;
    ModelInput input;
    input.state.resize(8);
    std::vector<double> actions;
    int width = 0;
    const auto values = to_floats(*normalized);
    const Status status =
        (*post)->run(*values, static_cast<int>(normalized->shape[0]), input, actions, width);
    EXPECT_TRUE(status.ok()) << status.message();
    EXPECT_EQ(std::to_string(width), file->metadata().at("action_width"));
    EXPECT_EQ(actions, *to_doubles(*file->find("expect/actions")));
    ++cases;
  }
  return cases;
}

TEST(Postprocessor, RecordedCases) {
  EXPECT_EQ(check_cases("tests/golden/openpi-tiny"), 10);
  EXPECT_EQ(check_cases("tests/golden/lerobot-tiny"), 4);
  EXPECT_EQ(check_cases("tests/golden/lerobot-tiny-meanstd"), 2);
}

TEST(Postprocessor, AllColumnsOfTheModel) {
  Contract contract = load("tests/golden/openpi-tiny", "libero");
  contract.actions = {};  // no width, and no labels for columns of one
  const auto post = Postprocessor::create(contract, 32);
  ASSERT_TRUE(post.ok());
  std::vector<float> normalized(2 * 32, 0.25f);
  ModelInput input;
  input.state.resize(8);
  std::vector<double> actions;
  int width = 0;
  ASSERT_TRUE((*post)->run(normalized, 2, input, actions, width).ok());
  EXPECT_EQ(width, 32);
  EXPECT_EQ(actions.size(), 64u);
  EXPECT_EQ(actions[31], 0.25);
  EXPECT_NE(actions[0], 0.25);
}

TEST(Postprocessor, NothingNonFiniteLeaves) {
  const Contract contract = load("tests/golden/openpi-tiny", "libero");
  const auto post = Postprocessor::create(contract, 32);
  ASSERT_TRUE(post.ok());
  ModelInput input;
  input.state.resize(8);
  std::vector<double> actions;
  int width = 0;
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity()}) {
    for (const int at : {0, 6, 7, 31, 32 * 9 + 31}) {  // also in columns that are cut off
      std::vector<float> normalized(10 * 32, 0.5f);
      normalized[at] = bad;
      const Status status = (*post)->run(normalized, 10, input, actions, width);
      EXPECT_EQ(status.code(), StatusCode::kRuntime);
      EXPECT_NE(status.message().find("[" + std::to_string(at / 32) + ", " + std::to_string(at % 32) + "]"),
                std::string::npos)
          << status.message();
      EXPECT_TRUE(actions.empty());
    }
  }
  // Finite in, infinite out: lerobot's float32 arithmetic overflows.
  const auto lerobot = Postprocessor::create(load("tests/golden/lerobot-tiny", ""), 7);
  ASSERT_TRUE(lerobot.ok());
  std::vector<float> huge(7, std::numeric_limits<float>::max());
  const Status status = (*lerobot)->run(huge, 1, input, actions, width);
  EXPECT_EQ(status.code(), StatusCode::kRuntime);
  EXPECT_NE(status.message().find("actions[0, 0]"), std::string::npos) << status.message();
  EXPECT_TRUE(actions.empty());
}

TEST(Postprocessor, RefusesWhatDoesNotFit) {
  Contract contract = load("tests/golden/openpi-tiny", "libero");
  EXPECT_FALSE(Postprocessor::create(contract, 6).ok());  // 7 columns of 6
  EXPECT_FALSE(Postprocessor::create(contract, 0).ok());
  const auto post = Postprocessor::create(contract, 32);
  ASSERT_TRUE(post.ok());
  ModelInput input;
  input.state.resize(8);
  std::vector<double> actions;
  int width = 0;
  std::vector<float> normalized(32);
  EXPECT_FALSE((*post)->run(normalized, 2, input, actions, width).ok());
  EXPECT_FALSE((*post)->run({}, 0, input, actions, width).ok());
  EXPECT_FALSE((*post)->run(normalized, -1, input, actions, width).ok());
  input.state.resize(7);
  EXPECT_FALSE((*post)->run(normalized, 1, input, actions, width).ok());
  // With width 0 only the model tells how far a transform may reach.
  contract.actions = {};  // no width, and no labels for columns of one
  contract.actions.transforms = {{"joint_flip", std::vector<double>(40, -1.0), ""}};
  ASSERT_TRUE(contract::validate(contract).empty());
  EXPECT_FALSE(Postprocessor::create(contract, 32).ok());
}

TEST(Postprocessor, AlohaEndToEnd) {
  const auto json = read_json_file("tests/golden/robots/aloha.json");
  ASSERT_TRUE(json.ok());
  Contract contract;
  contract.name = "aloha";
  contract.cameras = {{"base_0_rgb", "images/cam_high", true}};
  contract.state_parts = {{"state", 14}};
  const Json& stats = (*json)["stats"]["actions"];
  contract.action_norm.stats.q01 = stats["q01"].get<std::vector<double>>();
  contract.action_norm.stats.q99 = stats["q99"].get<std::vector<double>>();
  contract.state_norm.stats = contract.action_norm.stats;
  contract.actions.width = 14;
  for (const Json& c : (*json)["cases"]) {
    contract.actions.transforms.clear();
    if (c["delta"])
      contract.actions.transforms.push_back({"delta", {0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12}, ""});
    if (c["adapt_to_pi"]) {
      contract.actions.transforms.push_back(
          {"joint_flip", {1, -1, -1, 1, 1, 1, 1, 1, -1, -1, 1, 1, 1, 1}, ""});
      contract.actions.transforms.push_back({"gripper", {6, 13}, "aloha"});
    }
    const auto post = Postprocessor::create(contract, 32);
    ASSERT_TRUE(post.ok()) << post.status().message();
    ModelInput input;
    input.state = c["pi_state"].get<std::vector<double>>();
    std::vector<float> normalized;
    std::vector<double> want, actions;
    for (const Json& row : c["actions_normalized"]) {
      for (const double x : row) normalized.push_back(static_cast<float>(x));
    }
    for (const Json& row : c["actions"]) {
      for (const double x : row) want.push_back(x);
    }
    int width = 0;
    ASSERT_TRUE((*post)->run(normalized, 4, input, actions, width).ok());
    ASSERT_EQ(width, 14);
    ASSERT_EQ(actions.size(), want.size());
    for (std::size_t i = 0; i < want.size(); ++i)
      EXPECT_NEAR(actions[i], want[i], 1e-12 * std::max(1.0, std::abs(want[i])));
  }
}

}  // namespace
}  // namespace servoflow::stages
