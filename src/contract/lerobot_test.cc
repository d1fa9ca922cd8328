#include "contract/lerobot.h"

#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <random>

#include "contract/validate.h"
#include "core/file.h"
#include "core/json.h"

namespace servoflow::contract {
namespace {

constexpr char kDir[] = "tests/golden/lerobot-tiny/";

// A published directory's three files, to be spoiled one field at a time.
struct Files {
  std::string config = *read_text_file(std::string(kDir) + "config.json", 1 << 20);
  Json pre = *read_json_file(std::string(kDir) + "policy_preprocessor.json");
  Json post = *read_json_file(std::string(kDir) + "policy_postprocessor.json");
  Statistics statistics;
  Files() {
    statistics.q01.assign(8, -1);
    statistics.q99.assign(8, 1);
    statistics.mean.assign(8, 0);
    statistics.std.assign(8, 1);
  }
  Json& step(const std::string& name) {
    for (Json* file : {&pre, &post}) {
      for (Json& step : (*file)["steps"]) {
        if (step["registry_name"] == name) return step;
      }
    }
    ADD_FAILURE() << name;
    return pre;
  }
  void edit_config(const std::string& what, const std::string& with) {
    const std::size_t at = config.find(what);
    ASSERT_NE(at, std::string::npos) << what;
    config.replace(at, what.size(), with);
  }
  Result<Contract> load() const {
    return contract_from_lerobot(
        config, pre, post,
        [this](const std::string&, const std::string& feature) -> Result<Statistics> {
          Statistics s = statistics;
          if (feature == "action") {
            for (auto* v : {&s.mean, &s.std, &s.q01, &s.q99}) {
              if (!v->empty()) v->resize(7);
            }
          }
          return s;
        },
        "ckpt");
  }
  std::string refusal() const {
    const auto contract = load();
    EXPECT_FALSE(contract.ok());
    EXPECT_EQ(contract.status().message().rfind("ckpt", 0), 0u) << contract.status().message();
    return contract.status().message();
  }
};

void expect_in(const std::string& text, const std::vector<std::string>& parts) {
  for (const std::string& part : parts)
    EXPECT_NE(text.find(part), std::string::npos) << '"' << part << "\" is not in: " << text;
}

TEST(Lerobot, LoadsAsPublished) {
  const auto contract = Files().load();
  ASSERT_TRUE(contract.ok()) << contract.status().message();
  EXPECT_TRUE(validate(*contract).empty());
}

TEST(Lerobot, CameraOrderIsTheConfigs) {
  Files files;
  // Swap two names: the order follows the file, not the alphabet.
  files.edit_config("observation.images.top", "observation.images.tmp");
  files.edit_config("observation.images.aux", "observation.images.top");
  files.edit_config("observation.images.tmp", "observation.images.aux");
  const auto contract = files.load();
  ASSERT_TRUE(contract.ok());
  EXPECT_EQ(contract->cameras[0].slot, "observation.images.aux");
  EXPECT_EQ(contract->cameras[2].slot, "observation.images.top");
  files.edit_config("\"empty_cameras\": 1", "\"empty_cameras\": 2");
  const auto more = files.load();
  ASSERT_TRUE(more.ok());
  ASSERT_EQ(more->cameras.size(), 5u);
  EXPECT_EQ(more->cameras[4].slot, "observation.images.empty_camera_1");
}

TEST(Lerobot, RenamedObservations) {
  Files files;
  files.step("rename_observations_processor")["config"]["rename_map"] = {
      {"front", "observation.images.top"},
      {"joints", "observation.state"},
      {"extra", "observation.images.unused"}};
  const auto contract = files.load();
  ASSERT_TRUE(contract.ok()) << contract.status().message();
  EXPECT_EQ(contract->cameras[0].key, "front");
  EXPECT_EQ(contract->cameras[1].key, "observation.images.gripper");
  EXPECT_EQ(contract->state_parts[0].key, "joints");
  EXPECT_EQ(contract->ignored_images, std::vector<std::string>{"extra"});
  files.step("rename_observations_processor")["config"]["rename_map"]["other"] = "observation.images.top";
  expect_in(files.refusal(), {"rename_map", "observation.images.top"});
}

TEST(Lerobot, RefusesConfigsByName) {
  struct Edit {
    const char *what, *with;
    std::vector<std::string> words;
  };
  for (const Edit& edit : std::vector<Edit>{
           {"\"type\": \"pi05\"", "\"type\": \"pi0\"", {"config.json.type", "pi0"}},
           {"\"use_relative_actions\": false", "\"use_relative_actions\": true", {"use_relative_actions"}},
           {"\"use_visual_memory\": false", "\"use_visual_memory\": true", {"use_visual_memory"}},
           {"\"use_proprioceptive_memory\": false",
            "\"use_proprioceptive_memory\": true",
            {"use_proprioceptive_memory"}},
           {"\"n_obs_steps\": 1", "\"n_obs_steps\": 2", {"n_obs_steps"}},
           {"\"tokenizer_max_length\": 200", "\"tokenizer_max_length\": 100", {"max_length", "100", "200"}},
           {"\"STATE\": \"QUANTILES\"", "\"STATE\": \"MIN_MAX\"", {"normalization_mapping.STATE", "MIN_MAX"}},
           {"\"STATE\": \"QUANTILES\"", "\"STATE\": \"MEAN_STD\"", {"make them agree"}},
           {"\"VISUAL\": \"IDENTITY\"", "\"VISUAL\": \"MEAN_STD\"", {"normalization_mapping.VISUAL"}},
           {"\"empty_cameras\": 1", "\"empty_cameras\": -1", {"empty_cameras"}},
           {"\"input_features\"", "\"inputs\"", {"input_features"}},
           {"\"type\": \"STATE\"", "\"type\": 5", {"observation.state.type"}},
           {"        8\n", "        9\n", {"8 numbers"}},
           {"        8\n", "        -8\n", {"observation.state.shape"}},
           {"        8\n", "        1e300\n", {"observation.state.shape"}},
           {"        7\n", "        7, 7\n", {"action.shape"}},
           {"\"action\": {", "\"gripper\": {", {"output_features.gripper"}},
       }) {
    Files files;
    files.edit_config(edit.what, edit.with);
    expect_in(files.refusal(), edit.words);
  }
  Files files;
  files.config = "{";
  expect_in(files.refusal(), {"config.json"});
  files.config = "[]";
  expect_in(files.refusal(), {"config.json"});
}

TEST(Lerobot, RefusesStepsByName) {
  const auto refused = [](const std::string& step, const std::string& field, const Json& value,
                          const std::vector<std::string>& words) {
    Files files;
    files.step(step)["config"][field] = value;
    SCOPED_TRACE(step + "." + field);
    expect_in(files.refusal(), words);
  };
  refused("relative_actions_processor", "enabled", true, {"relative_actions_processor.enabled"});
  refused("absolute_actions_processor", "enabled", true,
          {"policy_postprocessor.json", "absolute_actions_processor.enabled"});
  refused("normalizer_processor", "eps", 1e-6, {"normalizer_processor.eps"});
  refused("normalizer_processor", "surplus", 1, {"normalizer_processor.surplus"});
  refused("normalizer_processor", "norm_map", Json{{"STATE", "MIN_MAX"}}, {"norm_map.STATE", "MIN_MAX"});
  refused("normalizer_processor", "norm_map", Json{{"STATES", "QUANTILES"}}, {"norm_map.STATES"});
  refused("normalizer_processor", "features", Json::object(), {"observation.state"});
  refused("normalizer_processor", "normalize_observation_keys", Json::array({"observation.images.top"}),
          {"normalize_observation_keys"});
  refused("unnormalizer_processor", "features", Json::object(), {"action"});
  refused("tokenizer_processor", "padding_side", "left", {"tokenizer_processor.padding_side"});
  refused("tokenizer_processor", "truncation", false, {"tokenizer_processor.truncation"});
  refused("tokenizer_processor", "max_length", -1, {"tokenizer_processor.max_length"});
  refused("device_processor", "float_dtype", "bfloat16", {"device_processor.float_dtype"});
  refused("rename_observations_processor", "rename_map", Json::array({1}), {"rename_map"});
  refused("pi05_prepare_state_tokenizer_processor_step", "max_state_dim", 32, {"max_state_dim"});

  Files unknown;
  unknown.pre["steps"].push_back({{"registry_name", "blur_processor"}, {"config", Json::object()}});
  expect_in(unknown.refusal(), {"policy_preprocessor.json", "steps[7]", "blur_processor"});
  for (std::size_t i : {3, 4, 5}) {  // normalizer, state into prompt, tokenizer
    Files missing;
    const std::string name = missing.pre["steps"][i]["registry_name"];
    missing.pre["steps"].erase(i);
    expect_in(missing.refusal(), {name, "missing"});
  }
  Files twice;
  twice.pre["steps"].push_back(twice.step("device_processor"));
  expect_in(twice.refusal(), {"device_processor", "twice"});
  Files swapped;
  std::swap(swapped.pre["steps"][3], swapped.pre["steps"][4]);
  expect_in(swapped.refusal(), {"out of order"});
  Files custom;
  custom.pre["steps"][0].erase("registry_name");
  custom.pre["steps"][0]["class"] = "my.module.Step";
  expect_in(custom.refusal(), {"custom classes"});
}

// lerobot keeps the names of its dataset's columns in several places; they must agree.
TEST(Lerobot, ReadsTheNamesOfActions) {
  const Json names = {"x", "y", "z", "roll", "pitch", "yaw", "gripper"};
  const auto expected = names.get<std::vector<std::string>>();
  const auto put = [&](const std::string& place, const Json& value) {
    Files files;
    if (place == "config") {
      files.edit_config("\"action_feature_names\": null", "\"action_feature_names\": " + value.dump());
    } else if (place == "output") {
      files.edit_config("\"type\": \"ACTION\",", "\"type\": \"ACTION\", \"names\": " + value.dump() + ",");
    } else if (place.ends_with("normalizer_processor")) {
      files.step(place)["config"]["features"]["action"]["names"] = value;
    } else {
      files.step(place)["config"]["action_names"] = value;
    }
    return files;
  };
  const auto none = Files().load();
  ASSERT_TRUE(none.ok());
  EXPECT_TRUE(none->actions.names.empty());
  for (const char* place : {"config", "output", "normalizer_processor", "unnormalizer_processor",
                            "relative_actions_processor", "absolute_actions_processor"}) {
    SCOPED_TRACE(place);
    for (const Json& value : {names, Json{{"motors", names}}}) {
      const auto contract = put(place, value).load();
      ASSERT_TRUE(contract.ok()) << contract.status().message();
      EXPECT_EQ(contract->actions.names, expected);
    }
    EXPECT_TRUE(put(place, nullptr).load().ok());
    // What names no column, or not every one, stops no policy: lerobot writes the keys of {"motors": [...]}.
    Json twice = names, empty = names, number = names, fewer = names;
    twice[6] = "x";
    empty[6] = "";
    number[6] = 6;
    fewer.erase(6);
    for (const Json& value : {twice, empty, number, fewer, Json::array(), Json("x"), Json(7),
                              Json({"motors"}), Json({"actions"}), Json{{"a", names}, {"b", names}}}) {
      const auto contract = put(place, value).load();
      ASSERT_TRUE(contract.ok()) << value << contract.status().message();
      EXPECT_TRUE(contract->actions.names.empty()) << value;
    }
  }
  Files two = put("config", names);
  two.step("relative_actions_processor")["config"]["action_names"] = names;
  EXPECT_TRUE(two.load().ok());
  Json other = names;
  other[0] = "X";
  two.step("relative_actions_processor")["config"]["action_names"] = other;
  const auto disagreeing = two.load();
  ASSERT_TRUE(disagreeing.ok());
  EXPECT_TRUE(disagreeing->actions.names.empty());
  two.step("relative_actions_processor")["config"]["action_names"] = {"motors"};
  EXPECT_EQ(two.load()->actions.names, expected);  // of which only one names the columns
}

TEST(Lerobot, MissingStatistics) {
  Files files;
  files.step("normalizer_processor").erase("state_file");
  expect_in(files.refusal(), {"normalizer_processor", "no statistics", "observation.state"});
  Files empty;
  empty.statistics.q99.clear();
  expect_in(empty.refusal(), {"policy_preprocessor_step_3_normalizer_processor.safetensors",
                              "observation.state.q99", "QUANTILES"});
  Files narrow;
  narrow.statistics.q01.resize(6);
  expect_in(narrow.refusal(), {"observation.state.q01", "6 numbers"});
  Files identity;  // nothing is needed where nothing is normalised
  identity.edit_config("\"STATE\": \"QUANTILES\"", "\"STATE\": \"IDENTITY\"");
  identity.edit_config("\"ACTION\": \"QUANTILES\"", "\"ACTION\": \"IDENTITY\"");
  for (const char* step : {"normalizer_processor", "unnormalizer_processor"}) {
    identity.step(step)["config"]["norm_map"] = Json::object();
    identity.step(step).erase("state_file");
  }
  const auto contract = identity.load();
  ASSERT_TRUE(contract.ok()) << contract.status().message();
  EXPECT_EQ(contract->state_norm.kind, NormKind::kIdentity);
}

TEST(Lerobot, SurvivesHostileJson) {
  const Files good;
  for (const Json& odd : {Json(), Json(1), Json("x"), Json::array(), Json::object(), Json{{"steps", 3}},
                          Json{{"steps", {1, "a", nullptr}}},
                          Json{{"steps", Json::array({Json{{"registry_name", 3}, {"config", 5}}})}}}) {
    Files files;
    files.pre = odd;
    EXPECT_FALSE(files.load().ok());
    files = good;
    files.post = odd;
    EXPECT_FALSE(files.load().ok());
  }
  // Every value of the processors replaced by something else.
  int edits = 0;
  const std::function<void(Files&, Json&)> spoil = [&](Files& files, Json& value) {
    const Json saved = value;
    for (const Json& odd : {Json(), Json(-1), Json("odd"), Json::array({1}), Json{{"a", 1}}}) {
      value = odd;
      const auto contract = files.load();
      EXPECT_TRUE(contract.ok() || !contract.status().message().empty());
      ++edits;
    }
    value = saved;
    if (value.is_structured()) {
      for (auto& child : value) spoil(files, child);
    }
  };
  Files files;
  spoil(files, files.pre);
  spoil(files, files.post);
  EXPECT_GT(edits, 300);
  std::mt19937 random(4);
  for (int round = 0; round < 1000; ++round) {
    Files mutated;
    for (int i = 0; i < 1 + round % 4; ++i)
      mutated.config[random() % mutated.config.size()] = "0123456789{}[]\",:-e.n\xff "[random() % 23];
    const auto contract = mutated.load();
    EXPECT_TRUE(contract.ok() || !contract.status().message().empty());
  }
}

}  // namespace
}  // namespace servoflow::contract
