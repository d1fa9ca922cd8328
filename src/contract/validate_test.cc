#include "contract/validate.h"

#include <gtest/gtest.h>

#include <cmath>

#include "contract/load.h"

namespace servoflow::contract {
namespace {

constexpr char kOpenpi[] = "tests/golden/openpi-tiny";

TEST(Validate, NamesContradictions) {
  const auto loaded = load_contract(kOpenpi, {.robot = "libero"});
  ASSERT_TRUE(loaded.ok());
  EXPECT_TRUE(validate(*loaded).empty());
  const auto problem = [&](auto&& change) {
    Contract contract = *loaded;
    change(contract);
    std::string text;
    for (const std::string& line : validate(contract)) text += line + "\n";
    return text;
  };
  const auto has = [](const std::string& text, const char* word) {
    return text.find(word) != std::string::npos;
  };
  EXPECT_TRUE(has(problem([](Contract& c) { c.cameras.clear(); }), "cameras"));
  EXPECT_TRUE(has(problem([](Contract& c) { c.cameras[2].required = true; }), "cameras.right_wrist_0_rgb"));
  EXPECT_TRUE(has(problem([](Contract& c) { c.cameras[1].slot = c.cameras[0].slot; }), "used twice"));
  EXPECT_TRUE(has(problem([](Contract& c) { c.cameras[1].key = c.cameras[0].slot; }), "used twice"));
  EXPECT_FALSE(has(problem([](Contract& c) { c.cameras[1].key = c.cameras[1].slot; }), "used twice"));
  EXPECT_TRUE(has(problem([](Contract& c) { c.state_parts[0].width = 9; }), "state.statistics"));
  EXPECT_TRUE(has(problem([](Contract& c) { c.state_parts[0].width = -1; }), "state.parts"));
  EXPECT_TRUE(has(problem([](Contract& c) {
                    c.state_parts.clear();
                    c.prompt.mode = PromptMode::kState;
                  }),
                  "prompt.state_in_prompt"));
  EXPECT_TRUE(
      has(problem([](Contract& c) { c.state_norm.stats.q99.clear(); }), "state.statistics.q99: missing"));
  EXPECT_TRUE(has(problem([](Contract& c) { c.state_norm.stats.std.pop_back(); }), "state.statistics.std"));
  EXPECT_TRUE(has(problem([](Contract& c) { c.action_norm.stats.q01[2] = NAN; }), "actions.statistics.q01"));
  EXPECT_TRUE(has(problem([](Contract& c) { c.action_norm.stats.q01[2] = 1e9; }), "smaller than q01"));
  EXPECT_TRUE(has(problem([](Contract& c) {
                    c.actions.transforms = {{"delta", {7}, ""}};
                  }),
                  "delta dimension 7"));
  EXPECT_TRUE(has(problem([](Contract& c) {
                    c.state_transforms = {{"gripper", {8}, "aloha"}};
                  }),
                  "state.transforms"));
  EXPECT_TRUE(has(problem([](Contract& c) { c.actions.width = -1; }), "actions.width"));
  EXPECT_TRUE(has(problem([](Contract& c) { c.prompt.max_tokens = 0; }), "prompt.max_tokens"));
  EXPECT_TRUE(has(problem([](Contract& c) {
                    c.action_norm.style = NormStyle::kLerobot;
                    c.actions.width = 8;
                  }),
                  "actions.width"));
  EXPECT_TRUE(has(problem([](Contract& c) { c.name.clear(); }), "name"));
}

}  // namespace
}  // namespace servoflow::contract
