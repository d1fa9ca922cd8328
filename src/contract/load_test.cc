#include "contract/load.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "contract/canonical.h"
#include "contract/validate.h"

namespace servoflow::contract {
namespace {

namespace fs = std::filesystem;

constexpr char kOpenpi[] = "tests/golden/openpi-tiny", kLerobot[] = "tests/golden/lerobot-tiny";

class Load : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = fs::temp_directory_path() / ("servoflow_load_" + std::to_string(::getpid()));
    fs::remove_all(dir_);
    fs::create_directories(dir_);
  }
  void TearDown() override { fs::remove_all(dir_); }
  std::string write(const std::string& name, const std::string& text) {
    std::ofstream(dir_ / name) << text;
    return (dir_ / name).string();
  }
  fs::path dir_;
};

TEST_F(Load, RobotWithOpenpiStatistics) {
  const auto contract = load_contract(kOpenpi, {.robot = "libero"});
  ASSERT_TRUE(contract.ok()) << contract.status().message();
  EXPECT_EQ(contract->asset, "tiny");  // the only one there
  EXPECT_EQ(contract->resize, Resize::kPillow);
  EXPECT_EQ(contract->state_norm.kind, NormKind::kQuantile);
  EXPECT_EQ(contract->state_norm.stats.q01.size(), 8u);
  // The droid robot has eight actions, its statistics here only seven: the eighth stays raw.
  const auto droid = load_contract(kOpenpi, {.robot = "droid", .assets = "tiny"});
  ASSERT_TRUE(droid.ok()) << droid.status().message();
  EXPECT_EQ(droid->actions.width, 8);
  EXPECT_EQ(droid->action_norm.stats.q01.size(), 7u);
}

TEST_F(Load, StatisticsOfAnotherRobot) {
  const auto aloha = load_contract(kOpenpi, {.robot = "aloha"});  // 14 numbers against statistics for 8
  ASSERT_FALSE(aloha.ok());
  EXPECT_NE(aloha.status().message().find("cover 8 numbers, the state has 14"), std::string::npos)
      << aloha.status().message();
  EXPECT_NE(aloha.status().message().find("norm_stats.json"), std::string::npos);
}

TEST_F(Load, StatisticsWithoutQuantiles) {
  fs::create_directories(dir_ / "assets/pi0");
  write(
      "assets/pi0/norm_stats.json",
      R"({"norm_stats": {"state": {"mean": [0,0,0,0,0,0,0,0], "std": [1,1,1,1,1,1,1,1]}, "actions": {"mean": [0], "std": [1]}}})");
  const auto contract = load_contract(dir_.string(), {.robot = "libero"});
  ASSERT_FALSE(contract.ok());
  for (const char* field : {"state.statistics.q01", "actions.statistics.q99"}) {
    EXPECT_NE(contract.status().message().find(field), std::string::npos) << contract.status().message();
  }
}

TEST_F(Load, WithoutARobot) {
  const auto none = load_contract(kOpenpi, {});
  ASSERT_FALSE(none.ok());
  EXPECT_NE(none.status().message().find("aloha, droid, libero, metaworld"), std::string::npos);
  // A servoflow directory brings its own contract.
  const auto libero = load_contract(kOpenpi, {.robot = "libero"});
  ASSERT_TRUE(libero.ok());
  const std::string path = write("contract.json", contract_to_json(*libero).dump(2));
  const auto own = load_contract(dir_.string(), {});
  ASSERT_TRUE(own.ok()) << own.status().message();
  EXPECT_EQ(contract_hash(*own), contract_hash(*libero));
  EXPECT_TRUE(load_contract("anywhere", {.robot = path}).ok());
  EXPECT_FALSE(load_contract(dir_.string(), {.robot = "", .assets = "tiny"}).ok());
  write("contract.json", "{\"name\": 1}");
  EXPECT_NE(load_contract(dir_.string(), {}).status().message().find("contract.json"), std::string::npos);
}

TEST_F(Load, LerobotDirectory) {
  const auto contract = load_contract(kLerobot, {.lerobot_layout = true});
  ASSERT_TRUE(contract.ok()) << contract.status().message();
  std::vector<std::string> slots;
  for (const CameraSlot& camera : contract->cameras) slots.push_back(camera.slot);
  EXPECT_EQ(slots, (std::vector<std::string>{"observation.images.top", "observation.images.gripper",
                                             "observation.images.aux", "observation.images.empty_camera_0"}));
  EXPECT_EQ(contract->cameras[1].key, "observation.images.gripper");
  EXPECT_EQ(contract->cameras[3].key, "");
  EXPECT_EQ(state_width(*contract), 8);
  EXPECT_EQ(contract->actions.width, 7);
  EXPECT_EQ(contract->prompt.key, "task");
  EXPECT_TRUE(contract->prompt.special_literals);
  EXPECT_EQ(contract->state_norm.kind, NormKind::kQuantile);
  EXPECT_EQ(contract->state_norm.style, NormStyle::kLerobot);
  const auto mean_std = load_contract("tests/golden/lerobot-tiny-meanstd", {.lerobot_layout = true});
  ASSERT_TRUE(mean_std.ok()) << mean_std.status().message();
  EXPECT_EQ(mean_std->action_norm.kind, NormKind::kMeanStd);
  EXPECT_FALSE(load_contract(kLerobot, {.robot = "", .assets = "x", .lerobot_layout = true}).ok());
  const auto missing = load_contract(kOpenpi, {.lerobot_layout = true});
  ASSERT_FALSE(missing.ok());
  EXPECT_NE(missing.status().message().find("policy_preprocessor.json"), std::string::npos)
      << missing.status().message();
}

TEST_F(Load, MissingStateFileSaysWhereItWasLookedFor) {
  for (const char* name : {"config.json", "policy_preprocessor.json", "policy_postprocessor.json",
                           "policy_postprocessor_step_0_unnormalizer_processor.safetensors"}) {
    fs::copy_file(fs::path(kLerobot) / name, dir_ / name);
  }
  const auto contract = load_contract(dir_.string(), {.lerobot_layout = true});
  ASSERT_FALSE(contract.ok());
  EXPECT_NE(contract.status().message().find("policy_preprocessor_step_3_normalizer_processor.safetensors"),
            std::string::npos)
      << contract.status().message();
}

TEST_F(Load, RobotOnALerobotCheckpoint) {
  // The built-in robots name other slots: refused, with the checkpoint's own listed.
  const auto builtin = load_contract(kLerobot, {.robot = "libero", .lerobot_layout = true});
  ASSERT_FALSE(builtin.ok());
  EXPECT_NE(builtin.status().message().find("observation.images.gripper"), std::string::npos)
      << builtin.status().message();
  const std::string text = R"(
name = "bench"
[cameras]
"observation.images.gripper" = { key = "observation/wrist_image" }
"observation.images.top" = { key = "observation/image" }
[state]
parts = [{ key = "observation/state", width = 8 }]
[prompt]
default = "wait"
[actions]
width = 7
transforms = [{ delta = [0] }]
)";
  const auto contract = load_contract(kLerobot, {.robot = write("bench.toml", text), .lerobot_layout = true});
  ASSERT_TRUE(contract.ok()) << contract.status().message();
  const auto own = load_contract(kLerobot, {.lerobot_layout = true});
  EXPECT_EQ(contract->cameras[0].key, "observation/image");
  EXPECT_EQ(contract->cameras[0].slot, "observation.images.top");
  EXPECT_EQ(contract->cameras[2].key, "");
  EXPECT_EQ(contract->resize, Resize::kLerobotFloat);
  EXPECT_EQ(contract->action_norm.stats.q99, own->action_norm.stats.q99);
  EXPECT_EQ(contract->prompt.default_prompt, "wait");
  EXPECT_TRUE(contract->actions.names.empty());
  const auto labelled =
      load_contract(kLerobot, {.robot = write("labels.toml", text + "names = [\"x\", \"y\", \"z\", \"u\", "
                                                                    "\"v\", \"w\", \"grip\"]\n"),
                               .lerobot_layout = true});
  ASSERT_TRUE(labelled.ok()) << labelled.status().message();
  EXPECT_EQ(labelled->actions.names.back(), "grip");
  EXPECT_EQ(contract_hash(*labelled).size(), 64u);
  std::string plain = text;
  plain.replace(plain.find("default"), 7, "state_in_prompt = false\ndefault");
  EXPECT_FALSE(load_contract(kLerobot, {.robot = write("plain.toml", plain), .lerobot_layout = true}).ok());
  std::string narrow = text;
  narrow.replace(narrow.find("width = 8"), 9, "width = 7");
  EXPECT_FALSE(load_contract(kLerobot, {.robot = write("narrow.toml", narrow), .lerobot_layout = true}).ok());
}

}  // namespace
}  // namespace servoflow::contract
