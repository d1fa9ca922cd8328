#include "toolkit/case_file.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>

#include "contract/canonical.h"

namespace servoflow::toolkit {
namespace {

struct Tensor {
  DType dtype;
  Shape shape;
};

// A case file with zeroed tensors, made to be broken.
struct Draft {
  std::map<std::string, std::string> metadata = {{"format_version", "2"},
                                                 {"format", "openpi"},
                                                 {"robot", "libero"},
                                                 {"entry", "frames"},
                                                 {"prompt_mode", "plain"},
                                                 {"prompt", "go"},
                                                 {"steps", "2"},
                                                 {"slots", "b a"},
                                                 {"max_tokens", "4"},
                                                 {"action_width", "2"},
                                                 {"tolerances", R"({"fp32": {"vision": {"max": 1e-5}}})"}};
  std::map<std::string, Tensor> tensors = {{"input/image/a", {DType::kU8, {2, 3, 3}}},
                                           {"input/image/b", {DType::kU8, {4, 1, 3}}},
                                           {"input/state", {DType::kF32, {8}}},
                                           {"input/noise", {DType::kF32, {5, 2}}},
                                           {"expect/tokens", {DType::kI32, {4}}},
                                           {"expect/token_mask", {DType::kBool, {4}}},
                                           {"expect/vision/a", {DType::kF32, {4, 2}}},
                                           {"expect/step1/x", {DType::kF32, {5, 2}}},
                                           {"expect/actions_normalized", {DType::kF32, {5, 2}}},
                                           {"expect/actions", {DType::kF64, {5, 2}}},
                                           {"expect_bf16/actions", {DType::kF64, {5, 2}}}};

  Result<CaseFile> read() const {
    const std::string path = testing::TempDir() + "draft-" + std::to_string(::getpid()) + ".safetensors";
    std::vector<SafetensorsWriter::Entry> entries;
    std::size_t bytes = 0;
    for (const auto& [name, t] : tensors) {
      entries.push_back({name, t.dtype, t.shape});
      bytes += static_cast<std::size_t>(t.shape.elements()) * dtype_size(t.dtype);
    }
    auto writer = SafetensorsWriter::create(path, entries, metadata);
    EXPECT_TRUE(writer.ok());
    EXPECT_TRUE((*writer)->write(std::vector<std::byte>(bytes)).ok());
    EXPECT_TRUE((*writer)->finish().ok());
    Result<CaseFile> out = read_case(path);
    std::filesystem::remove(path);
    return out;
  }
  std::string error() const {
    const Result<CaseFile> out = read();
    return out.ok() ? "" : out.status().message();
  }
};

TEST(CaseFile, StageNamesGiveTheirGroupSlotAndIndex) {
  const auto group = [](const std::string& name) {
    const auto s = parse_stage_name(name);
    return s ? s->group + ":" + s->slot + ":" + std::to_string(s->index) : "unknown";
  };
  EXPECT_EQ(group("vision/observation.images.top"), "vision:observation.images.top:-1");
  EXPECT_EQ(group("image/base_0_rgb"), "image:base_0_rgb:-1");
  EXPECT_EQ(group("prefix/embeddings"), "prefix/embeddings::-1");
  EXPECT_EQ(group("prefix/layer17/k"), "k::17");
  EXPECT_EQ(group("prefix/layer0/v"), "v::0");
  EXPECT_EQ(group("time/9"), "time::9");
  EXPECT_EQ(group("step10/v"), "velocity::10");
  EXPECT_EQ(group("step0/x"), "x::0");
  EXPECT_EQ(group("t"), "t::-1");
  EXPECT_TRUE(parse_stage_name("token_mask")->exact);
  for (const char* name :
       {"", "vision", "vision/", "prefix/layer/k", "prefix/layer1", "prefix/layer01/k", "prefix/layer-1/k",
        "step/v", "step1/w", "time/", "time/x", "step99999999999/v", "logits", "v", "k", "prefix/k"})
    EXPECT_FALSE(parse_stage_name(name)) << name;
}

TEST(CaseFile, ReadsWhatTheMetadataSays) {
  const Result<CaseFile> c = Draft().read();
  ASSERT_TRUE(c.ok()) << c.status().message();
  EXPECT_EQ(c->images.size(), 2u);
  EXPECT_EQ(c->images[0].slot, "b") << "in the order of the slots, not of the file";
  EXPECT_EQ(c->images[0].height, 4);
  EXPECT_EQ(c->horizon, 5);
  EXPECT_EQ(c->action_dim, 2);
  EXPECT_EQ(*c->action_width, 2);
  EXPECT_EQ(c->prompt_mode, CasePrompt::kPlain);
  EXPECT_EQ(c->expected.size(), 6u);
  EXPECT_EQ(*c->tolerances.at("fp32").at("vision").max, 1e-5);
  EXPECT_EQ(c->notes.size(), 1u) << "the reference's own bfloat16 run";
}

TEST(CaseFile, CarriesItsRobotsContract) {
  Draft draft;
  EXPECT_FALSE(draft.read()->contract);
  contract::Contract robot;
  robot.name = "arm";
  robot.cameras = {{"a", "images/a", true}, {"b", "images/b", true}};
  robot.state_parts = {{"joints", 7}, {"gripper", 1}};
  robot.state_norm.kind = robot.action_norm.kind = contract::NormKind::kIdentity;
  robot.actions.width = 2;
  robot.actions.transforms = {{"delta", {0}, ""}};
  robot.actions.names = {"reach", "grip"};
  draft.metadata["contract"] = contract::canonical_json(robot);
  const Result<CaseFile> read = draft.read();
  ASSERT_TRUE(read.ok()) << read.status().message();
  ASSERT_TRUE(read->contract);
  EXPECT_EQ(read->contract->state_parts.size(), 2u);
  EXPECT_EQ(read->contract->actions.transforms[0].name, "delta");
  EXPECT_EQ(read->contract->actions.names, robot.actions.names);

  draft.metadata["contract"] = "{";
  EXPECT_NE(draft.error().find("metadata contract"), std::string::npos) << draft.error();
  draft.metadata["contract"] = R"({"name": 3})";
  EXPECT_NE(draft.error().find("metadata contract"), std::string::npos) << draft.error();
}

TEST(CaseFile, OlderFilesTakeTheTolerancesOfTheirLayout) {
  Draft d;
  d.metadata = {{"format", "lerobot"},
                {"robot", "lerobot"},
                {"steps", "2"},
                {"slots", "a b"},
                {"discrete_state_input", "true"}};
  const Result<CaseFile> lerobot = d.read();
  ASSERT_TRUE(lerobot.ok()) << lerobot.status().message();
  EXPECT_EQ(*lerobot->tolerances.at("fp32").at("velocity").max, 1e-3);
  EXPECT_EQ(*lerobot->tolerances.at("bf16").at("actions_normalized").cosine, 0.9995);
  EXPECT_EQ(lerobot->prompt_mode, CasePrompt::kState);
  EXPECT_EQ(lerobot->max_tokens, 200);
  EXPECT_FALSE(lerobot->action_width);
  d.metadata = {{"format", "openpi"},
                {"robot", "droid"},
                {"steps", "2"},
                {"slots", "a b"},
                {"discrete_state_input", "false"}};
  const Result<CaseFile> openpi = d.read();
  ASSERT_TRUE(openpi.ok()) << openpi.status().message();
  EXPECT_EQ(*openpi->tolerances.at("fp32").at("velocity").max, 5e-4);
  EXPECT_EQ(*openpi->action_width, 8);
  EXPECT_EQ(openpi->prompt_mode, CasePrompt::kPlain);
}

TEST(CaseFile, EveryContradictionIsNamed) {
  const auto with = [](auto change) {
    Draft d;
    change(d);
    return d.error();
  };
  const auto meta = [&](const char* key, const char* value) {
    return with([&](Draft& d) { d.metadata[key] = value; });
  };
  const auto tensor = [&](const char* name, DType dtype, Shape shape) {
    return with([&](Draft& d) { d.tensors[name] = {dtype, shape}; });
  };
  const auto without = [&](const char* name) {
    return with([&](Draft& d) {
      d.tensors.erase(name);
      d.metadata.erase(name);
    });
  };
  const std::pair<std::string, const char*> cases[] = {
      {meta("format_version", "3"), "metadata format_version: \"3\" is not a whole number of 1 to 2"},
      {meta("format", "jax"), "metadata format: \"jax\" is none of openpi, lerobot"},
      {meta("entry", ""), "metadata entry"},
      {meta("prompt_mode", "fancy"), "metadata prompt_mode"},
      {meta("prompt_mode", "none"), "metadata prompt_mode: \"none\" goes with entry"},
      {meta("steps", "0"), "metadata steps"},
      {meta("steps", "1e3"), "metadata steps"},
      {meta("steps", "99999999999999"), "metadata steps"},
      {meta("steps", "1"), "expect/step1/x: metadata steps is 1"},
      {meta("slots", "b"), "input/image/a: is not listed in metadata slots"},
      {meta("slots", "a b c"), "input/image/c: is missing"},
      {meta("slots", "a b a"), "metadata slots: a camera is listed twice"},
      {meta("action_width", "none"), "expect/actions: metadata action_width"},
      {meta("action_width", "-1"), "metadata action_width"},
      {meta("contract", "{"), "metadata contract: not valid JSON"},
      {meta("contract", "{\"name\":\"x\"}"), "metadata contract"},
      {meta("tolerances", "{"), "metadata tolerances: not valid JSON"},
      {meta("tolerances", "[]"), "metadata tolerances: not an object"},
      {meta("tolerances", R"({"fp32": {"logits": {"max": 1}}})"), "fp32: logits: no such stage"},
      {meta("tolerances", R"({"fp32": {"k": {"min": 1}}})"), "unknown gate \"min\""},
      {meta("tolerances", R"({"fp32": {"k": {"max": -1}}})"), "max is not a number of 0 or more"},
      {meta("tolerances", R"({"fp32": {"k": {"max": "1"}}})"), "max is not a number of 0 or more"},
      {meta("tolerances", R"({"fp32": {"k": {}}})"), "expected an object of max, rms, cosine"},
      {without("steps"), "metadata steps: is missing"},
      {without("max_tokens"), "metadata max_tokens: is missing"},
      {without("input/noise"), "input/noise: is missing"},
      {without("input/state"), "input/state: is missing"},
      {without("expect/token_mask"), "come together"},
      {without("expect/actions_normalized"), "expect/actions: is judged on the scale"},
      {tensor("expect/logits", DType::kF32, {1}), "expect/logits: unknown stage"},
      {tensor("expect_bf16/logits", DType::kF32, {1}), "expect_bf16/logits: unknown stage"},
      {tensor("expect/vision/c", DType::kF32, {1}), "expect/vision/c: its camera is not in metadata slots"},
      {tensor("expect/t", DType::kI32, {2}), "expect/t: is not floating-point"},
      {tensor("input/history", DType::kF32, {2}), "input/history: unknown tensor"},
      {tensor("weights", DType::kF32, {2}), "weights: unknown tensor"},
      {tensor("input/image/a", DType::kF32, {2, 3, 3}), "input/image/a: expected u8"},
      {tensor("input/image/a", DType::kU8, {3, 2, 4}), "input/image/a: expected u8"},
      {tensor("input/noise", DType::kF32, {10}), "input/noise: expected floats"},
      {tensor("input/state", DType::kI32, {8}), "input/state: expected floats"},
      {tensor("expect/tokens", DType::kI64, {4}), "expect/tokens: expected i32"},
      {tensor("expect/token_mask", DType::kBool, {3}), "expect/token_mask: expected bool [4]"},
  };
  for (const auto& [error, expected] : cases)
    EXPECT_NE(error.find(expected), std::string::npos) << expected << "\n" << error;
}

TEST(CaseFile, AllProblemsAreToldAtOnce) {
  Draft d;
  d.metadata["steps"] = "x";
  d.tensors["expect/logits"] = {DType::kF32, {1}};
  const std::string error = d.error();
  EXPECT_NE(error.find("metadata steps"), std::string::npos);
  EXPECT_NE(error.find("expect/logits"), std::string::npos);
}

TEST(CaseFile, EveryGoldenCaseIsRead) {
  std::size_t cases = 0;
  for (const char* folder : {"openpi-tiny", "lerobot-tiny", "lerobot-tiny-meanstd"}) {
    const auto all = read_cases(std::string("tests/golden/") + folder + "/cases");
    ASSERT_TRUE(all.ok()) << all.status().message();
    cases += all->size();
    for (const CaseFile& c : *all) {
      EXPECT_EQ(c.images.size(), c.slots.size()) << c.name;
      EXPECT_GT(c.tokens.size(), 1u) << c.name;
      EXPECT_EQ(c.horizon, 10);
    }
  }
  EXPECT_EQ(cases, 16u);
}

TEST(CaseFile, AFolderWithoutCasesIsAnError) {
  EXPECT_NE(read_cases("tests/golden/nowhere").status().message().find("--cases DIR"), std::string::npos);
  EXPECT_NE(read_cases("tests/golden/tools").status().message().find("no recorded case"), std::string::npos);
}

}  // namespace
}  // namespace servoflow::toolkit
