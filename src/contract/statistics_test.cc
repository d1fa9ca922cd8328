#include "contract/statistics.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "core/file.h"
#include "core/json.h"

namespace servoflow::contract {
namespace {

namespace fs = std::filesystem;

constexpr char kGood[] = R"({"norm_stats": {
  "state": {"mean": [0, 1], "std": [1, 1], "q01": [-1, -2], "q99": [1, 2]},
  "actions": {"mean": [0.5], "std": [2], "q01": null, "q99": null}}})";

Result<OpenpiStatistics> parse(const std::string& text) {
  const auto json = parse_json(text, "norm_stats.json");
  if (!json.ok()) return json.status();
  return parse_openpi_statistics(*json, "norm_stats.json");
}

std::string replaced(std::string text, const std::string& what, const std::string& with) {
  const std::size_t at = text.find(what);
  EXPECT_NE(at, std::string::npos) << what;
  return text.replace(at, what.size(), with);
}

TEST(NormStats, Reads) {
  const auto stats = parse(kGood);
  ASSERT_TRUE(stats.ok()) << stats.status().message();
  EXPECT_EQ(stats->state.q99, (std::vector<double>{1, 2}));
  EXPECT_EQ(stats->actions.std, (std::vector<double>{2}));
  EXPECT_TRUE(stats->actions.q01.empty());
}

TEST(NormStats, NamesWhatIsWrong) {
  struct Edit {
    const char *what, *with, *word;
  };
  for (const Edit& edit : std::vector<Edit>{
           {"[0, 1]", "[0, 1, 2]", "norm_stats.state.std: has 2 numbers, mean has 3"},
           {"[0, 1]", "[0, \"1\"]", "norm_stats.state.mean[1]"},
           {"[0, 1]", "[0, null]", "norm_stats.state.mean[1]"},
           {"[0, 1]", "[0, 1e999]", "norm_stats.json"},
           {"[0, 1]", "[0, NaN]", "norm_stats.json"},
           {"[0, 1]", "null", "norm_stats.state.mean: must be an array"},
           {"[0, 1]", "[]", "norm_stats.state.mean: empty"},
           {"\"mean\": [0, 1], ", "", "norm_stats.state.mean: missing"},
           {"[1, 1]", "[1, -1]", "norm_stats.state.std[1]: negative"},
           {"[1, 2]", "[1, -3]", "norm_stats.state.q99[1]: smaller than q01"},
           {"[1, 2]", "null", "only one of q01 and q99"},
           {"\"state\"", "\"states\"", "norm_stats.states: unknown key"},
           {"\"q01\": null", "\"q10\": null", "norm_stats.actions.q10: unknown key"},
           {"\"norm_stats\"", "\"stats\"", "norm_stats: missing"},
       }) {
    const auto stats = parse(replaced(kGood, edit.what, edit.with));
    ASSERT_FALSE(stats.ok()) << edit.with;
    EXPECT_NE(stats.status().message().find(edit.word), std::string::npos)
        << edit.word << " is not in: " << stats.status().message();
  }
  for (const char* text : {"[]", "3", "null", "{}", "{\"norm_stats\": []}",
                           "{\"norm_stats\": {\"state\": 1, \"actions\": []}}"}) {
    EXPECT_FALSE(parse(text).ok()) << text;
  }
}

class Assets : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = fs::temp_directory_path() / ("servoflow_assets_" + std::to_string(::getpid()));
    fs::remove_all(dir_);
    fs::create_directories(dir_);
  }
  void TearDown() override { fs::remove_all(dir_); }
  void add(const std::string& id, const std::string& text = kGood) {
    fs::create_directories(dir_ / "assets" / id);
    std::ofstream(dir_ / "assets" / id / "norm_stats.json") << text;
  }
  fs::path dir_;
};

TEST_F(Assets, Choice) {
  const std::string dir = dir_.string();
  EXPECT_NE(choose_asset(dir, "").status().message().find("no statistics found"), std::string::npos);
  add("physical-intelligence/libero");
  EXPECT_EQ(*choose_asset(dir, ""), "physical-intelligence/libero");
  EXPECT_EQ(*choose_asset(dir, "", "droid"), "physical-intelligence/libero");  // the only one there
  add("droid");
  EXPECT_EQ(list_assets(dir), (std::vector<std::string>{"droid", "physical-intelligence/libero"}));
  EXPECT_EQ(*choose_asset(dir, "", "droid"), "droid");
  EXPECT_EQ(*choose_asset(dir, "physical-intelligence/libero", "droid"), "physical-intelligence/libero");
  for (const char* option : {"", "trossen", "../droid", "/etc", "physical-intelligence", "droid/../droid"}) {
    const auto choice = choose_asset(dir, option, "");
    ASSERT_FALSE(choice.ok()) << option;
    EXPECT_NE(choice.status().message().find("droid, physical-intelligence/libero"), std::string::npos)
        << choice.status().message();
  }
  const auto robot = choose_asset(dir, "", "trossen");
  EXPECT_NE(robot.status().message().find("trossen"), std::string::npos);
}

TEST_F(Assets, LoadNamesTheFile) {
  add("a/b");
  const auto stats = load_openpi_statistics(dir_.string(), "");
  ASSERT_TRUE(stats.ok()) << stats.status().message();
  EXPECT_EQ(stats->asset, "a/b");
  add("a/b", "{\"norm_stats\": ");
  const std::string message = load_openpi_statistics(dir_.string(), "").status().message();
  EXPECT_NE(message.find("a/b/norm_stats.json"), std::string::npos) << message;
}

}  // namespace
}  // namespace servoflow::contract
