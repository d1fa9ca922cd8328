#include "toolkit/machine_profile.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>

#include "toolkit/auto_choice.h"

namespace servoflow::toolkit {
namespace {

namespace fs = std::filesystem;

MachineProfile example() {
  MachineProfile p;
  p.made = "2026-01-31T12:00:00Z";
  p.seconds = 41.5;
  p.key = *machine_key({"cpu"});
  ProbedDevice d{.device = "cpu", .name = "some CPU", .memory_bytes = 1000, .available_bytes = 500};
  d.identity = {{"caches", Json::array()}};
  d.state = {{"before", nullptr}};
  d.features = {"avx2"};
  d.precisions = {"bf16"};
  d.bandwidth = {{1 << 20, 2, "L2", {50, 0.01, 7}, {40, 0.02, 7}, {30, 0.03, 7}}};
  d.products = {{"expert", "down", 50, 1024, 4096, "bf16", true, "cpu/some", 8 << 20, {500, 0.1, 9}}};
  d.latencies = {{"pool_wakeup", "about", {2, 0.3, 200}}};
  d.threads = {{2, {1000, 0.1, 3}, {2000, 0.1, 3}}};
  d.peaks = {{"threads", 2}};
  d.steadiness = {true, false, 0.07, 0.2, 0.01, {"others used 20 % of the cores meanwhile"}};
  d.skipped = {"something: no time left"};
  p.devices = {d};
  p.choice = {"cpu", "fp32", 1, "because"};
  p.decisions = Json::array();
  return p;
}

class TemporaryFolder : public ::testing::Test {
 protected:
  TemporaryFolder() : path_(fs::temp_directory_path() / ("servoflow_profile_" + std::to_string(::getpid()))) {
    fs::remove_all(path_);
    fs::create_directories(path_);
    setenv("XDG_CACHE_HOME", (path_ / "cache").c_str(), 1);
  }
  ~TemporaryFolder() override { fs::remove_all(path_); }
  std::string file(const std::string& name, const std::string& text) const {
    std::ofstream(path_ / name) << text;
    return (path_ / name).string();
  }
  fs::path path_;
};

using MachineProfileTest = TemporaryFolder;

TEST_F(MachineProfileTest, WritesWhatItReads) {
  const MachineProfile p = example();
  const std::string path = (path_ / "deep/er/machine.json").string();
  ASSERT_TRUE(write_profile(path, p).ok());
  const auto back = read_profile(path);
  ASSERT_TRUE(back.ok()) << back.status().message();
  EXPECT_EQ(profile_to_json(*back), profile_to_json(p));
  EXPECT_EQ(back->devices[0].products[0].us.median, 500);
  EXPECT_TRUE(back->devices[0].steadiness.noisy);
  // 2 · 50 · 1024 · 4096 operations in 500 us.
  EXPECT_NEAR(back->devices[0].products[0].gops(), 838.8608, 1e-9);
  EXPECT_NEAR(back->devices[0].products[0].weight_gbs(), 16.777216, 1e-9);
}

TEST_F(MachineProfileTest, EveryWrongFieldIsNamed) {
  const Json good = profile_to_json(example());
  const auto refused = [&](const std::function<void(Json&)>& change, const char* field) {
    Json bad = good;
    change(bad);
    const auto read = profile_from_json(bad, "machine.json");
    ASSERT_FALSE(read.ok()) << field;
    EXPECT_NE(read.status().message().find(field), std::string::npos) << read.status().message();
    EXPECT_EQ(read.status().code(), StatusCode::kInvalidInput);
  };
  refused([](Json& j) { j["kind"] = "something"; }, "kind");
  refused([](Json& j) { j["version"] = 2; }, "version: 2; this build reads version 1");
  refused([](Json& j) { j["version"] = "1"; }, "version");
  refused([](Json& j) { j["colour"] = 1; }, "colour");
  refused([](Json& j) { j["devices"] = Json::array(); }, "devices");
  refused([](Json& j) { j["devices"] = {{"cpu", 1}}; }, "devices");
  refused([](Json& j) { j["devices"][0] = 5; }, "devices[0]");
  refused([](Json& j) { j["devices"][0].erase("peaks"); }, "devices[0].peaks: missing");
  refused([](Json& j) { j["devices"][0]["memory_bytes"] = -1; }, "devices[0].memory_bytes");
  refused([](Json& j) { j["devices"][0]["bandwidth"][0]["read_gbs"]["median"] = -3; }, "read_gbs.median");
  refused([](Json& j) { j["devices"][0]["bandwidth"][0]["read_gbs"]["median"] = 1e300; }, "read_gbs.median");
  refused([](Json& j) { j["devices"][0]["bandwidth"][0]["workers"] = 0; }, "workers");
  refused([](Json& j) { j["devices"][0]["products"][0]["weights"] = "tepid"; }, "cold or warm");
  refused([](Json& j) { j["devices"][0]["products"][0]["m"] = 1.5; }, "products[0].m");
  refused([](Json& j) { j["devices"][0]["steadiness"]["noisy"] = 1; }, "steadiness.noisy");
  refused([](Json& j) { j["choice"]["device"] = "cuda:3"; }, "choice.device");
  refused([](Json& j) { j["choice"]["precision"] = "int4-g128-w4a16"; }, "choice.precision");
  EXPECT_FALSE(profile_from_json(Json::array(), "machine.json").ok());
  const std::string text = good.dump();
  EXPECT_FALSE(read_profile(file("half.json", text.substr(0, text.size() / 2))).ok());
  EXPECT_FALSE(read_profile(file("empty.json", "")).ok());
}

TEST_F(MachineProfileTest, AStaleProfileIsRefusedByName) {
  MachineProfile p = example();
  const Json now = *machine_key({"cpu"});
  EXPECT_TRUE(check_fresh(p, now, "machine.json").ok());
  p.key["cpu"] = "an older CPU";
  p.key["build"]["revision"] = "abc";
  p.key["gpus"] = {{{"device", "cuda:0"}}};
  const Status stale = check_fresh(p, now, "machine.json");
  ASSERT_FALSE(stale.ok());
  for (const char* part : {"machine.json", "key.cpu", "an older CPU", "key.build.revision", "abc", "key.gpus",
                           "servoflow probe"})
    EXPECT_NE(stale.message().find(part), std::string::npos) << stale.message();
}

TEST_F(MachineProfileTest, TheKeyNamesTheMachineAndTheBuild) {
  const auto key = machine_key({"cpu"});
  ASSERT_TRUE(key.ok());
  for (const char* field : {"cpu", "flags", "cores", "gpus", "build"})
    EXPECT_TRUE(key->contains(field)) << field;
  for (const char* field : {"version", "revision", "compiler", "flags", "type", "cuda"})
    EXPECT_TRUE((*key)["build"].contains(field)) << field;
  for (const char* device : {"tpu", "cuda:", "cuda:x", "cuda:12345", ""})
    EXPECT_FALSE(machine_key({device}).ok()) << device;
}

TEST_F(MachineProfileTest, AutoIsWhatTheProfileSaysAndTheReplySaysWhy) {
  EXPECT_EQ(default_profile_path(), (path_ / "cache/servoflow/machine.json").string());
  const auto without = choose_auto({});
  ASSERT_TRUE(without.ok());
  EXPECT_EQ(without->device, "auto");
  EXPECT_TRUE(without->chosen.is_null());
  ASSERT_TRUE(write_profile(default_profile_path(), example()).ok());
  const auto with = choose_auto({});
  ASSERT_TRUE(with.ok()) << with.status().message();
  EXPECT_EQ(with->device, "cpu");
  EXPECT_EQ(with->precision, "fp32");
  EXPECT_EQ(with->threads, 1);
  EXPECT_EQ(with->chosen["why"], "because");
  EXPECT_NE(with->note.find("because"), std::string::npos);
  // What is given is not touched; another device has nothing of it.
  const auto given = choose_auto({.precision = "bf16", .threads = 2});
  EXPECT_EQ(given->precision, "bf16");
  EXPECT_EQ(given->threads, 2);
  const auto other = choose_auto({.device = "reference"});
  EXPECT_EQ(other->precision, "auto");
  EXPECT_TRUE(other->chosen.is_null());
  EXPECT_EQ(choose_auto({.profile = "none"})->device, "auto");
}

TEST_F(MachineProfileTest, AutoLeavesAQuantizedCheckpointItsFormats) {
  ASSERT_TRUE(write_profile(default_profile_path(), example()).ok());
  fs::create_directories(path_ / "float");
  fs::create_directories(path_ / "quantized");
  file("float/config.json", "{}");
  file("quantized/config.json", R"({"quantization_config": {}})");
  EXPECT_EQ(choose_auto({.checkpoint = (path_ / "float").string()})->precision, "fp32");
  EXPECT_EQ(choose_auto({.checkpoint = (path_ / "quantized").string()})->precision, "auto");
  fs::remove(path_ / "quantized/config.json");
  file("quantized/hf_quant_config.json", "{}");
  EXPECT_EQ(choose_auto({.checkpoint = (path_ / "quantized").string()})->precision, "auto");
}

TEST_F(MachineProfileTest, AStaleProfileIsNeverRead) {
  MachineProfile p = example();
  p.key["build"]["version"] = "0.0.0";
  ASSERT_TRUE(write_profile(default_profile_path(), p).ok());
  const auto by_default = choose_auto({});
  ASSERT_TRUE(by_default.ok());
  EXPECT_EQ(by_default->device, "auto");
  EXPECT_NE(by_default->warning.find("key.build.version"), std::string::npos) << by_default->warning;
  const auto named = choose_auto({.profile = default_profile_path()});
  ASSERT_FALSE(named.ok());
  EXPECT_NE(named.status().message().find("key.build.version"), std::string::npos);
  EXPECT_FALSE(choose_auto({.profile = (path_ / "absent.json").string()}).ok());
  // A GPU that is not here.
  p = example();
  p.devices[0].device = "cuda:97";
  p.choice.device = "cuda:97";
  ASSERT_TRUE(write_profile(default_profile_path(), p).ok());
  EXPECT_NE(choose_auto({})->warning.find("cuda"), std::string::npos);
}

}  // namespace
}  // namespace servoflow::toolkit
