#include "contract/transforms.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "contract/normalization.h"
#include "contract/toml_robot.h"
#include "contract/validate.h"
#include "core/json.h"

namespace servoflow::contract {
namespace {

const std::vector<double> kFlip{1, -1, -1, 1, 1, 1, 1, 1, -1, -1, 1, 1, 1, 1};
const Transform kDelta{"delta", {0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12}, ""};

Statistics statistics(const Json& json) {
  return {json["mean"].get<std::vector<double>>(), json["std"].get<std::vector<double>>(),
          json["q01"].get<std::vector<double>>(), json["q99"].get<std::vector<double>>()};
}

void expect_close(const std::vector<double>& got, const std::vector<double>& want) {
  ASSERT_EQ(got.size(), want.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    EXPECT_LE(std::abs(got[i] - want[i]), 1e-12 * std::max(1.0, std::abs(want[i]))) << i;
  }
}

// openpi's own AlohaInputs, Normalize, Unnormalize, AbsoluteActions and AlohaOutputs, recorded.
TEST(Transforms, AlohaAsRecorded) {
  const auto json = read_json_file("tests/golden/robots/aloha.json");
  ASSERT_TRUE(json.ok()) << json.status().message();
  const Normalization state_norm{.stats = statistics((*json)["stats"]["state"])};
  const Normalization action_norm{.stats = statistics((*json)["stats"]["actions"])};
  // With adapt_to_pi and delta the built-in robot is what was recorded.
  const auto builtin = load_robot("aloha");
  ASSERT_TRUE(builtin.ok()) << builtin.status().message();
  int cases = 0;
  for (const Json& c : (*json)["cases"]) {
    const bool adapt = c["adapt_to_pi"], delta = c["delta"];
    SCOPED_TRACE(std::string(adapt ? "adapt " : "") + (delta ? "delta" : ""));
    std::vector<Transform> in, out;
    if (delta) out.push_back(kDelta);
    if (adapt) {
      in = {{"joint_flip", kFlip, ""}, {"gripper", {6, 13}, "aloha"}};
      out.insert(out.end(), in.begin(), in.end());
    }
    if (adapt && delta) {
      in = builtin->state_transforms;
      out = builtin->actions.transforms;
    }
    std::vector<double> state = c["state"];
    transform_state(in, state);
    expect_close(state, c["pi_state"].get<std::vector<double>>());
    std::vector<double> normalized(14);
    normalize(state_norm, state, normalized);
    expect_close(normalized, c["state_normalized"].get<std::vector<double>>());
    for (std::size_t row = 0; row < c["actions"].size(); ++row) {
      std::vector<float> model;
      for (const double x : c["actions_normalized"][row]) model.push_back(static_cast<float>(x));
      std::vector<double> actions(14);
      unnormalize(action_norm, model, actions);
      transform_actions(out, state, actions);
      expect_close(actions, c["actions"][row].get<std::vector<double>>());
    }
    ++cases;
  }
  EXPECT_EQ(cases, 8);
}

TEST(Transforms, TheGripperFormulasAreNotInverses) {
  std::vector<double> value{0.5};
  transform_state({{"gripper", {0}, "aloha"}}, value);
  const double angle = value[0];
  transform_actions({{"gripper", {0}, "aloha"}}, {}, value);
  EXPECT_NEAR(value[0], (angle + 0.5476 + 0.6213) / (1.4910 + 0.6213), 1e-15);
  EXPECT_GT(std::abs(value[0] - 0.5), 0.01);
  // Positions for which the linkage's sine leaves [-1, 1] (or its length is 0) still give numbers.
  for (const double position : {-10.0, 10.0, -0.01844 / (0.058 - 0.01844), 1e300, -1e300}) {
    value = {position};
    transform_state({{"gripper", {0}, "aloha"}}, value);
    EXPECT_FALSE(std::isnan(value[0])) << position;
  }
}

TEST(Transforms, RefusesWrongArguments) {
  const auto problem = [](Transform t, Direction d = Direction::kActions, int width = 7, int state = 8) {
    return transform_problem(t, d, width, state);
  };
  EXPECT_FALSE(problem({"delta", {0, 6}, ""}));
  EXPECT_FALSE(problem({"delta", {0, 6}, ""}, Direction::kActions, 0));
  EXPECT_NE(problem({"delta", {0, 7}, ""})->find("7"), std::string::npos);
  EXPECT_TRUE(problem({"delta", {0, 6}, ""}, Direction::kActions, 7, 6));  // beyond the state
  EXPECT_TRUE(problem({"delta", {0}, ""}, Direction::kActions, 7, 0));     // no state at all
  EXPECT_TRUE(problem({"delta", {0}, ""}, Direction::kState));
  EXPECT_TRUE(problem({"delta", {}, ""}));
  EXPECT_TRUE(problem({"delta", {1, 1}, ""}));
  for (const double bad :
       {-1.0, 0.5, 1e10, std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    EXPECT_TRUE(problem({"delta", {bad}, ""})) << bad;
    EXPECT_TRUE(problem({"gripper", {bad}, "aloha"})) << bad;
  }
  EXPECT_FALSE(problem({"joint_flip", {1, -1}, ""}));
  EXPECT_TRUE(problem({"joint_flip", {}, ""}));
  EXPECT_TRUE(problem({"joint_flip", {0}, ""}));
  EXPECT_TRUE(problem({"joint_flip", std::vector<double>(8, 1), ""}));
  EXPECT_TRUE(problem({"joint_flip", {1}, "aloha"}));
  EXPECT_FALSE(problem({"gripper", {6}, "aloha"}));
  EXPECT_NE(problem({"gripper", {6}, "panda"})->find("aloha"), std::string::npos);
  EXPECT_TRUE(problem({"gripper", {7}, "aloha"}));
  EXPECT_NE(problem({"wave", {}, ""})->find("delta, joint_flip, gripper"), std::string::npos);
}

}  // namespace
}  // namespace servoflow::contract
