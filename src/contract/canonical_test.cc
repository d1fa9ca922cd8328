#include "contract/canonical.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <random>

#include "contract/load.h"
#include "core/json.h"

namespace servoflow::contract {
namespace {

constexpr char kOpenpi[] = "tests/golden/openpi-tiny", kLerobot[] = "tests/golden/lerobot-tiny";

TEST(Canonical, RoundTripsAndHashes) {
  for (const char* robot : {"libero", "droid", ""}) {
    const bool lerobot = *robot == 0;
    const auto contract = load_contract(lerobot ? kLerobot : kOpenpi,
                                        {.robot = robot, .assets = "", .lerobot_layout = lerobot});
    ASSERT_TRUE(contract.ok());
    const std::string text = canonical_json(*contract);
    const auto json = parse_json(text, "canonical");
    ASSERT_TRUE(json.ok());
    EXPECT_EQ(json->dump(), text) << "spaces only inside strings";
    const auto again = contract_from_json(*json, "canonical");
    ASSERT_TRUE(again.ok()) << again.status().message();
    EXPECT_EQ(canonical_json(*again), text);
    EXPECT_EQ(contract_hash(*contract).size(), 64u);
    Contract other = *contract;
    other.state_norm.stats.q01[1] =
        std::nextafter(other.state_norm.stats.q01[1], 10.0);  // the last bit counts
    EXPECT_NE(contract_hash(other), contract_hash(*contract));
  }
  Contract everything;
  everything.name = "é \"x\"";
  everything.cameras = {{"a", "b", true}, {"c", "", false}};
  everything.ignored_images = {"z"};
  everything.state_parts = {{"s", 14}};
  everything.state_transforms = {{"joint_flip", {1, -0.5}, ""}};
  everything.state_norm.kind = everything.action_norm.kind = NormKind::kIdentity;
  everything.prompt.default_prompt = "line\nbreak";
  everything.actions = {14, {{"gripper", {6, 13}, "aloha"}}, {}, {}};
  const auto again = contract_from_json(contract_to_json(everything), "memory");
  ASSERT_TRUE(again.ok()) << again.status().message();
  EXPECT_EQ(contract_hash(*again), contract_hash(everything));
}

// SHA-256 of the canonical text, from an independent implementation (Python's hashlib on
// json.dumps(sort_keys=True)).
TEST(Canonical, HashIsSha256OfTheText) {
  Contract contract;
  contract.name = "x";
  EXPECT_EQ(
      canonical_json(contract),
      R"({"actions":{"normalization":{"kind":"quantile","statistics":{"mean":[],"q01":[],"q99":[],"std":[]},"style":"openpi"},)"
      R"("transforms":[],"width":0},"asset":"","cameras":[],"ignored_images":[],"name":"x","present_cameras_first":false,)"
      R"("prompt":{"default":null,"key":"prompt","max_tokens":200,"mode":"state","special_literals":false},"resize":"pillow",)"
      R"("state":{"normalization":{"kind":"quantile","statistics":{"mean":[],"q01":[],"q99":[],"std":[]},"style":"openpi"},)"
      R"("parts":[],"transforms":[]}})");
  EXPECT_EQ(contract_hash(contract), "74e4badc9be5b4273691c56197a3a56089692952c534cddd3bb70b376bb7f086");
}

// Labels travel with the contract, but a hash that robots refuse others by stands for what is computed.
TEST(Canonical, LabelsOfActionsAreKeptAndNotHashed) {
  auto contract = load_contract(kOpenpi, {.robot = "libero"});
  ASSERT_TRUE(contract.ok());
  ASSERT_EQ(contract->actions.names.size(), 7u);
  const auto again = contract_from_json(contract_to_json(*contract), "memory");
  ASSERT_TRUE(again.ok()) << again.status().message();
  EXPECT_EQ(again->actions.names, contract->actions.names);
  EXPECT_EQ(again->actions.units, contract->actions.units);
  EXPECT_NE(canonical_json(*contract).find(R"("names":["x",)"), std::string::npos);

  Contract plain = *contract;
  plain.actions.names.clear();
  plain.actions.units.clear();
  EXPECT_EQ(contract_hash(plain), contract_hash(*contract));
  EXPECT_EQ(canonical_json(plain).find("names"), std::string::npos) << "as before there were labels";
  EXPECT_EQ(canonical_json(plain).find("units"), std::string::npos);
  // What it was before there were labels.
  EXPECT_EQ(contract_hash(*contract), "2c4fb8a47530ad216c64c7a3b734c0876db6be3a551d3e1233e175b1f4ea450b");
  plain.actions.width = 6;
  EXPECT_NE(contract_hash(plain), contract_hash(*contract));
}

TEST(Canonical, RefusesEveryMissingRetypedOrExtraField) {
  auto contract = load_contract(kOpenpi, {.robot = "libero"});
  ASSERT_TRUE(contract.ok());
  contract->actions.names.clear();  // may be missing
  contract->actions.units.clear();
  const Json good = contract_to_json(*contract);
  ASSERT_TRUE(contract_from_json(good, "x").ok());
  int edits = 0;
  const std::function<void(const Json::json_pointer&, const Json&)> visit = [&](const Json::json_pointer& at,
                                                                                const Json& value) {
    if (!at.empty()) {
      Json retyped = good;
      retyped[at] = value.is_object() ? Json(1) : Json{{"odd", 1}};
      EXPECT_FALSE(contract_from_json(retyped, "x").ok()) << at.to_string();
      if (good[at.parent_pointer()].is_object()) {
        Json missing = good;
        missing[at.parent_pointer()].erase(at.back());
        EXPECT_FALSE(contract_from_json(missing, "x").ok()) << at.to_string();
      }
      edits += 2;
    }
    if (value.is_object()) {
      Json extra = good;
      extra[at]["surplus"] = nullptr;
      const auto refused = contract_from_json(extra, "x");
      ASSERT_FALSE(refused.ok()) << at.to_string();
      EXPECT_NE(refused.status().message().find("surplus"), std::string::npos);
      for (const auto& [key, child] : value.items()) visit(at / key, child);
    } else if (value.is_array()) {
      for (std::size_t i = 0; i < value.size(); ++i) visit(at / i, value[i]);
    }
  };
  visit(Json::json_pointer(), good);
  EXPECT_GT(edits, 100);
}

TEST(Canonical, SurvivesHostileText) {
  const auto contract = load_contract(kOpenpi, {.robot = "libero"});
  ASSERT_TRUE(contract.ok());
  const std::string good = canonical_json(*contract);
  std::mt19937 random(3);
  for (int round = 0; round < 3000; ++round) {
    std::string text = good;
    for (int i = 0; i < 1 + round % 4; ++i)
      text[random() % text.size()] = "0123456789{}[]\",:-e.n\xff "[random() % 23];
    const auto json = parse_json(text, "mutated");
    if (!json.ok()) continue;
    const auto again = contract_from_json(*json, "mutated");
    EXPECT_TRUE(again.ok() || again.status().message().rfind("mutated", 0) == 0);
  }
}

}  // namespace
}  // namespace servoflow::contract
