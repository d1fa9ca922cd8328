#include "contract/action_labels.h"

#include <gtest/gtest.h>

namespace servoflow::contract {
namespace {

TEST(ActionLabels, ColumnsWithoutANameHaveTheirIndex) {
  const Actions bare{.width = 2};
  EXPECT_EQ(action_name(bare, 1), "a1");
  EXPECT_EQ(action_unit(bare, 1), "");
  const Actions named{.width = 2, .transforms = {}, .names = {"x", "gripper"}, .units = {"m", "1"}};
  EXPECT_EQ(action_name(named, 0), "x");
  EXPECT_EQ(action_unit(named, 0), "m");
  EXPECT_EQ(action_name(named, 2), "a2");
  EXPECT_EQ(action_name(named, -1), "a-1") << "no column, and no crash";
  EXPECT_EQ(label_text("x", "m"), "x [m]");
  EXPECT_EQ(label_text("gripper", "1"), "gripper");
  EXPECT_EQ(label_text("a3", ""), "a3");
}

TEST(ActionLabels, EachListIsJudgedAlone) {
  const auto lines = [](const Actions& actions) {
    Problems problems("f");
    check_action_labels(actions, problems);
    return problems.lines();
  };
  EXPECT_TRUE(lines({.width = 0}).empty());
  EXPECT_TRUE(lines({.width = 2, .transforms = {}, .names = {"x", "y"}, .units = {}}).empty());
  EXPECT_TRUE(lines({.width = 2, .transforms = {}, .names = {}, .units = {"m", "m"}}).empty())
      << "units repeat";
  EXPECT_EQ(lines({.width = 2, .transforms = {}, .names = {"x", "x"}, .units = {}}),
            std::vector<std::string>{"f: actions.names[1]: the name \"x\" is used twice"});
  EXPECT_EQ(lines({.width = 1, .transforms = {}, .names = {std::string(65, 'x')}, .units = {}}),
            std::vector<std::string>{"f: actions.names[0]: longer than 64 bytes"});
  EXPECT_EQ(lines({.width = 2, .transforms = {}, .names = {"x"}, .units = {"", "m", "m"}}).size(), 3u);
}

}  // namespace
}  // namespace servoflow::contract
