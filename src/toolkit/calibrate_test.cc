#include "toolkit/calibrate.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>

#include "toolkit/linears.h"
#include "weights/checkpoint.h"
#include "weights/manifest.h"

namespace servoflow::toolkit {
namespace {

namespace fs = std::filesystem;
constexpr char kTiny[] = "tests/golden/openpi-tiny";

class Calibrate : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = fs::temp_directory_path() / ("servoflow-calibrate-" + std::to_string(::getpid()));
    fs::create_directories(dir_);
  }
  void TearDown() override { fs::remove_all(dir_); }
  std::string file(const std::string& name) const { return (dir_ / name).string(); }
  // A folder with these cases of the tiny checkpoint.
  std::string cases(const std::vector<std::string>& names) const {
    const fs::path folder = dir_ / ("cases" + std::to_string(serial_++));
    fs::create_directories(folder);
    for (const std::string& name : names)
      fs::copy_file(fs::path(kTiny) / "cases" / (name + ".safetensors"), folder / (name + ".safetensors"));
    return folder.string();
  }
  fs::path dir_;
  mutable int serial_ = 0;
};

TEST_F(Calibrate, KeepsRangesOfEveryStepAndMoments) {
  const auto report = calibrate(kTiny, {.cases = cases({"libero", "short-prompt"}),
                                        .out = file("s"),
                                        .moments = {"*gemma_expert*0.mlp.down_proj"}});
  ASSERT_TRUE(report.ok()) << report.status().message();
  const CalibrationStatistics& s = report->statistics;
  EXPECT_EQ(s.cases.size(), 2u);
  const weights::Architecture a = weights::open_checkpoint(kTiny)->architecture;
  std::size_t live = 0;
  for (const Site& site : sites(a)) {
    const auto it = s.sites.find(site.linears.front());
    if (it == s.sites.end()) continue;
    ++live;
    const SiteStatistics& one = it->second;
    const bool expert = it->first.find("gemma_expert") != std::string::npos;
    EXPECT_EQ(one.steps.size(), expert ? static_cast<std::size_t>(s.denoise_steps) : 1u) << it->first;
    EXPECT_EQ(one.all_steps().count(), one.rows * static_cast<std::uint64_t>(site.width));
    EXPECT_EQ(one.tokens.count(), one.rows);
    float most = 0;
    for (const float v : one.channel_amax) most = std::max(most, v);
    EXPECT_EQ(most, one.all_steps().amax());
    if (expert) {
      EXPECT_EQ(one.rows, 2u * static_cast<std::uint64_t>(s.denoise_steps * a.horizon));
      // quantization.md: "Activation ranges move with the denoising step".
      if (it->first.ends_with("q_proj")) {
        EXPECT_NE(one.steps.front().amax(), one.steps.back().amax());
      }
    }
    const bool wanted = expert && it->first.ends_with("layers.0.mlp.down_proj");
    ASSERT_EQ(one.moment.has_value(), wanted) << it->first;
    if (!wanted) continue;
    for (int c = 0; c < site.width; ++c)
      EXPECT_NEAR(one.moment->at(c, c) / one.channel_square[static_cast<std::size_t>(c)], 1, 1e-6);
  }
  // The last prefix layer ends at its keys and values: output projection and MLP (three sites) are never
  // computed.
  EXPECT_EQ(live, sites(a).size() - 3);

  const auto again = read_calibration(file("s"));
  ASSERT_TRUE(again.ok()) << again.status().message();
  EXPECT_EQ(again->digest(), s.digest());
}

TEST_F(Calibrate, ResumesToTheSameStatistics) {
  const auto whole =
      calibrate(kTiny, {.cases = cases({"libero", "short-prompt", "three-cameras"}), .out = file("a")});
  ASSERT_TRUE(whole.ok()) << whole.status().message();
  ASSERT_TRUE(calibrate(kTiny, {.cases = cases({"libero"}), .out = file("b")}).ok());
  const auto resumed =
      calibrate(kTiny, {.cases = cases({"libero", "short-prompt", "three-cameras"}), .out = file("b")});
  ASSERT_TRUE(resumed.ok()) << resumed.status().message();
  EXPECT_EQ(resumed->run, 2);
  EXPECT_EQ(resumed->skipped, 1);
  EXPECT_EQ(resumed->statistics.digest(), whole->statistics.digest());
}

TEST_F(Calibrate, RefusesStatisticsOfOtherWeightsOrOtherPrecision) {
  const std::string folder = cases({"libero"});
  ASSERT_TRUE(calibrate(kTiny, {.cases = folder, .out = file("s")}).ok());
  const auto size = fs::file_size(file("s"));
  for (const CalibrateOptions& other :
       {CalibrateOptions{.cases = folder, .out = file("s"), .precision = "bf16"},
        CalibrateOptions{.cases = folder, .out = file("s"), .moments = {"*down_proj"}}}) {
    const auto refused = calibrate(kTiny, other);
    ASSERT_FALSE(refused.ok());
    EXPECT_NE(refused.status().message().find(file("s")), std::string::npos) << refused.status().message();
  }
  fs::copy(kTiny, dir_ / "other", fs::copy_options::recursive);
  std::fstream weights(dir_ / "other" / "model.safetensors", std::ios::in | std::ios::out | std::ios::binary);
  weights.seekp(-2, std::ios::end);
  weights.put(1);
  weights.close();
  const auto refused = calibrate((dir_ / "other").string(), {.cases = folder, .out = file("s")});
  ASSERT_FALSE(refused.ok());
  EXPECT_NE(refused.status().message().find("weights"), std::string::npos);
  EXPECT_EQ(fs::file_size(file("s")), size);
  EXPECT_FALSE(calibrate(kTiny, {.cases = folder, .out = file("t"), .moments = {"no.such.layer"}}).ok());
  EXPECT_FALSE(fs::exists(file("t")));
}

// A digest says that a file is whole, not that it is of this network.
TEST_F(Calibrate, OtherLayersUnderTheSameWeightsAreRefused) {
  const std::string folder = cases({"libero"});
  ASSERT_TRUE(calibrate(kTiny, {.cases = folder, .out = file("s")}).ok());
  const CalibrationStatistics good = *read_calibration(file("s"));
  const std::string first = good.sites.begin()->first;
  const auto refused = [&](const std::string& words,
                           const std::function<void(CalibrationStatistics&)>& change) {
    CalibrationStatistics s = good;
    change(s);
    ASSERT_TRUE(write_calibration(s, file("e")).ok());
    ASSERT_TRUE(read_calibration(file("e")).ok());
    const auto r = calibrate(kTiny, {.cases = cases({"libero", "droid"}), .out = file("e")});
    ASSERT_FALSE(r.ok()) << words;
    EXPECT_NE(r.status().message().find(words), std::string::npos) << r.status().message();
  };
  refused(first + " has 3 input channels there", [&](CalibrationStatistics& s) {
    s.sites[first] = {.width = 3};
    s.sites[first].add(0, std::vector<float>{1, 2, 3});
  });
  refused("no.such.layer is no layer of this network",
          [&](CalibrationStatistics& s) { s.sites["no.such.layer"] = s.sites[first]; });
  refused(first + " has second moments", [&](CalibrationStatistics& s) {
    SiteStatistics& site = s.sites[first];
    const std::vector<float> row(static_cast<std::size_t>(site.width), 1.0f);
    site.moment.emplace(site.width);
    site.add(0, row);
  });
}

TEST_F(Calibrate, DamagedStatisticsAreErrors) {
  ASSERT_TRUE(calibrate(kTiny, {.cases = cases({"libero"}), .out = file("s")}).ok());
  std::ifstream in(file("s"), std::ios::binary);
  const std::string good((std::istreambuf_iterator<char>(in)), {});
  const auto with = [&](std::size_t size, std::size_t flip) {
    std::string bytes = good.substr(0, size);
    if (flip < bytes.size()) bytes[flip] = static_cast<char>(bytes[flip] ^ 0x41);
    std::ofstream(file("d"), std::ios::binary) << bytes;
    return read_calibration(file("d")).ok();
  };
  EXPECT_TRUE(with(good.size(), good.size()));
  for (const std::size_t part : {0u, 1u, 3u, 17u, 40u, 63u, 64u}) {
    const std::size_t at = good.size() * part / 65;
    EXPECT_FALSE(with(at, at));
    EXPECT_FALSE(with(good.size(), at)) << at;
  }
  EXPECT_FALSE(read_calibration(std::string(kTiny) + "/model.safetensors").ok());
}

}  // namespace
}  // namespace servoflow::toolkit
