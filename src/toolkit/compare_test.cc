#include "toolkit/compare.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "core/file.h"
#include "core/safetensors.h"
#include "quant/matrix.h"
#include "toolkit/case_runner.h"
#include "toolkit/compare_gates.h"
#include "toolkit/linears.h"

namespace servoflow::toolkit {
namespace {

constexpr char kTiny[] = "tests/golden/openpi-tiny";

CompareReport tiny(const CompareSide& a, const CompareSide& b, const std::string& gates = "", int limit = 3) {
  Result<CompareReport> r = compare({.a = a, .b = b, .gates = gates, .limit = limit});
  EXPECT_TRUE(r.ok()) << r.status().message();
  return r.ok() ? std::move(*r) : CompareReport{};
}

TEST(Difference, IsWhatItsNamesSay) {
  Difference d;
  for (const auto& [a, b] : {std::pair(1.0, 2.0), {0.0, -1.0}, {2.0, 2.0}}) d.add(a, b);
  EXPECT_NEAR(d.cosine(), 6 / std::sqrt(5.0 * 9.0), 1e-12);
  EXPECT_NEAR(d.relative(), std::sqrt(2.0 / 5.0), 1e-12);
  EXPECT_NEAR(d.mae(), 2.0 / 3, 1e-12);
  EXPECT_NEAR(d.mse(), 2.0 / 3, 1e-12);
  EXPECT_EQ(d.largest, 1);
  d.add(NAN, 1);
  EXPECT_EQ(d.not_finite, 1u);
  Difference dead;
  dead.add(3, 0);
  EXPECT_EQ(dead.cosine(), 0);
  EXPECT_EQ(Difference().cosine(), 1);
}

TEST(Compare, AgainstItselfNothingDiffers) {
  const CompareReport r = tiny({kTiny, "cpu", "fp32"}, {kTiny, "cpu", "fp32"});
  EXPECT_GT(r.tensors.size(), 100u);
  for (const ComparedTensor& t : r.tensors) {
    EXPECT_EQ(t.total.squared, 0) << t.name;
    EXPECT_GT(t.total.aa, 0) << t.name;
    EXPECT_EQ(t.dead, 0);
  }
  EXPECT_EQ(r.metrics.at("velocity.cosine"), 1);
  EXPECT_EQ(first_beyond(r, 0), nullptr);
  EXPECT_TRUE(compare_outcome(r).ok());
}

TEST(Compare, Bf16DiffersByItsOwnRounding) {
  const CompareReport r = tiny({kTiny, "cpu", "fp32"}, {kTiny, "cpu", "bf16"});
  // bfloat16 keeps 8 bits: a relative error of 2^-9 or so in each product, some growth over the layers.
  const double distance = 1 - r.metrics.at("velocity.cosine");
  EXPECT_GT(distance, 1e-8);
  EXPECT_LT(distance, 1e-3);
  EXPECT_TRUE(r.metrics.contains("velocity.cosine.step0"));
  EXPECT_TRUE(r.robot_units);
  ASSERT_FALSE(r.actions.empty());
  for (const ComparedAction& a : r.actions) {
    EXPECT_GE(a.worst_row, 0);
    EXPECT_NEAR(std::fabs(a.worst_a - a.worst_b), a.total.largest, 1e-12);
  }
  const Json json = compare_to_json(r);
  EXPECT_EQ(json["tensors"].size(), r.tensors.size());
  EXPECT_EQ(json["b"]["precision"], "bf16");
  // The first case names droid and no columns: the built-in robot does.
  EXPECT_EQ(r.actions[0].label(), "joint_1 [0.2 rad/step]");
  EXPECT_EQ(r.actions[7].label(), "gripper");
  EXPECT_NE(compare_text(r).find("\njoint_1 [0.2 rad/step] "), std::string::npos) << compare_text(r);
  const std::string html =
      (std::filesystem::temp_directory_path() / ("servoflow-" + std::to_string(::getpid()) + ".html"))
          .string();
  ASSERT_TRUE(compare_html(r).write(html).ok());
  EXPECT_NE(read_text_file(html, 1u << 30)->find(">joint_1 [0.2 rad/step]</td>"), std::string::npos);
  std::filesystem::remove(html);
  EXPECT_EQ(json["actions"]["columns"][0]["name"], "joint_1");
  EXPECT_EQ(json["actions"]["columns"][0]["unit"], "0.2 rad/step");
  EXPECT_EQ(json["actions"]["columns"][0]["label"], "joint_1 [0.2 rad/step]");
  EXPECT_EQ(r.metrics.at("actions.mae.a7"), r.metrics.at("actions.mae.gripper"));
  EXPECT_EQ(r.metrics.at("actions.max.a0"), r.metrics.at("actions.max.joint_1"));
}

// The shipped policy has a contract of its own without names, called after a built-in robot.
TEST(Compare, NamesColumnsAfterTheRobotOfTheContract) {
  const Result<CompareReport> r = compare({.a = {"models/metaworld-nano", "cpu", "fp32"},
                                           .b = {"models/metaworld-nano", "cpu", "bf16"},
                                           .layers = false,
                                           .limit = 1});
  ASSERT_TRUE(r.ok()) << r.status().message();
  ASSERT_EQ(r->actions.size(), 4u);
  EXPECT_EQ(r->actions[2].label(), "z [cm]");
  EXPECT_EQ(r->actions[3].label(), "gripper");
}

// A copy of the tiny checkpoint in which some rows of one tensor are zero.
void zero_rows(const std::string& to, const std::string& tensor, int first, int count) {
  std::filesystem::remove_all(to);
  std::filesystem::copy(kTiny, to, std::filesystem::copy_options::recursive);
  std::vector<std::uint8_t> bytes = *read_binary_file(to + "/model.safetensors", 1u << 30);
  const auto file = SafetensorsFile::parse(std::as_bytes(std::span(bytes)), "copy");
  const SafeTensor* t = file->find(tensor);
  ASSERT_NE(t, nullptr);
  const std::size_t row = t->bytes.size() / static_cast<std::size_t>(t->shape[0]);
  auto* data = bytes.data() + (t->bytes.data() - std::as_bytes(std::span(bytes)).data());
  std::fill_n(data + static_cast<std::size_t>(first) * row, static_cast<std::size_t>(count) * row,
              std::uint8_t{0});
  ASSERT_TRUE(write_file_atomically(to + "/model.safetensors", std::as_bytes(std::span(bytes))).ok());
}

TEST(Compare, DeadOutputsAreFound) {
  const std::string copy =
      (std::filesystem::temp_directory_path() / ("servoflow-dead-" + std::to_string(::getpid()))).string();
  zero_rows(copy, "paligemma_with_expert.gemma_expert.model.layers.0.mlp.up_proj.weight", 3, 2);
  const CompareReport r = tiny({kTiny, "cpu", "fp32"}, {copy, "cpu", "fp32"}, "", 2);
  std::filesystem::remove_all(copy);
  int steps = 0;
  for (const ComparedTensor& t : r.tensors) {
    const bool here = t.name.ends_with("expert.layers.0.mlp.down_proj");
    EXPECT_EQ(t.dead, here ? 2 : 0) << t.name;
    steps += here;
  }
  EXPECT_EQ(steps, 10);
  EXPECT_EQ(r.metrics.at("dead_outputs"), 20);
  // The tensors before it are untouched, and it is named as the first that differs.
  ASSERT_NE(first_beyond(r, 0), nullptr);
  EXPECT_EQ(first_beyond(r, 0)->name, "step0/expert.layers.0.mlp.down_proj");
}

TEST(Compare, RandomObservationsNeedNoRecordings) {
  const auto run = [](std::uint64_t seed) {
    return *compare({.a = {kTiny, "cpu", "fp32"},
                     .b = {kTiny, "cpu", "bf16"},
                     .layers = false,
                     .random_cases = 2,
                     .seed = seed});
  };
  const CompareReport r = run(0), again = run(0), other = run(1);
  EXPECT_EQ(r.case_names.size(), 2u);
  EXPECT_EQ(r.metrics, again.metrics);
  EXPECT_NE(r.metrics, other.metrics);
  EXPECT_FALSE(r.robot_units);
  EXPECT_EQ(r.actions[0].label(), "a0") << "columns of the flow are not the robot's";
  EXPECT_EQ(compare_to_json(r)["actions"]["columns"][0]["name"], nullptr);
  EXPECT_LT(r.metrics.at("velocity.cosine"), 1 - 1e-8);
  EXPECT_GT(r.metrics.at("velocity.cosine"), 0.99);
}

TEST(Gates, FailClosed) {
  const std::map<std::string, double> metrics = {{"actions.cosine", 0.999}, {"velocity.cosine", NAN}};
  const auto judged = judge_bounds({{.metric = "actions.cosine", .least = 0.99},
                                    {.metric = "actions.cosine", .least = 0.9999},
                                    {.metric = "actions.cosine", .least = 0.9, .most = 0.99},
                                    {.metric = "velocity.cosine", .least = 0.0},
                                    {.metric = "prefix.cosine", .least = 0.0},
                                    {.metric = "actions.cosine"}},
                                   metrics);
  const bool expected[] = {true, false, false, false, false, false};
  for (std::size_t i = 0; i < judged.size(); ++i) EXPECT_EQ(judged[i].pass, expected[i]) << i;
  CompareReport r{.case_names = {"one"}, .metrics = {{"not_finite", 0}}, .gates = {judged[0]}};
  EXPECT_TRUE(compare_outcome(r).ok());
  r.gates.push_back(judged[1]);
  EXPECT_EQ(compare_outcome(r).code(), StatusCode::kCheckFailed);
  EXPECT_FALSE(compare_outcome({.case_names = {"one"}, .metrics = {{"not_finite", 1}}}).ok());
  EXPECT_FALSE(compare_outcome({.metrics = {{"not_finite", 0}}}).ok());
  EXPECT_FALSE(compare_outcome({.case_names = {"one"}}).ok());
}

TEST(Gates, FilesAreReadStrictly) {
  const auto parse = [](const char* text) { return bounds_from_json(*parse_json(text, "g"), "g"); };
  const auto good = parse(
      R"({"gates": {"velocity.cosine": {"min": 0.99, "max": 0.9999}, "actions.mae.a0": {"max": 0.1}}})");
  ASSERT_TRUE(good.ok()) << good.status().message();
  EXPECT_EQ(good->size(), 2u);
  for (const char* bad :
       {"[]", "{}", R"({"gates": {}})", R"({"gates": {"velocity.cosin": {"min": 0}}})",
        R"({"gates": {"velocity.cosine": {}}})", R"({"gates": {"velocity.cosine": {"least": 1}}})",
        R"({"gates": {"velocity.cosine": {"min": 2, "max": 1}}})",
        R"({"gates": {"velocity.cosine": {"min": "x"}}})",
        R"({"gates": {"dead_outputs": {"max": 0}}, "x": 1})"})
    EXPECT_FALSE(parse(bad).ok()) << bad;
  EXPECT_FALSE(trained_bounds("int8-w8a8").ok());
  EXPECT_TRUE(trained_bounds("fp8-w8a8").ok());
}

TEST(Gates, ANoiseBandHasTwoSidesAndNoNoiseFails) {
  const Bound band = noise_bound("velocity.cosine", 1 - 1e-4);
  EXPECT_NEAR(1 - *band.least, 4e-4, 1e-12);
  EXPECT_NEAR(1 - *band.most, 2.5e-5, 1e-12);
  EXPECT_FALSE(judge_bounds({band}, {{"velocity.cosine", 1.0}})[0].pass)
      << "too good: the format did not run";
  EXPECT_FALSE(judge_bounds({band}, {{"velocity.cosine", 0.99}})[0].pass);
  EXPECT_TRUE(judge_bounds({band}, {{"velocity.cosine", 1 - 2e-4}})[0].pass);
  EXPECT_FALSE(judge_bounds({noise_bound("velocity.cosine", 1)}, {{"velocity.cosine", 1.0}})[0].pass);
}

// Weights rounded to a format must land in the band that noise of the format's power predicts, and weights
// that were not rounded must not.
TEST(Gates, RoundedWeightsLieInTheNoiseBandOfTheirFormat) {
  const weights::Checkpoint c = *weights::open_checkpoint(kTiny);
  std::vector<CaseFile> cases;
  cases.push_back(std::move(*read_case(std::string(kTiny) + "/cases/libero.safetensors")));
  const auto actions = [&](std::shared_ptr<const weights::WeightSource> source) {
    auto runner = CaseRunner::open(c, cases, {.device = "cpu", .source = std::move(source)});
    return (*runner)->run(cases[0], nullptr)->normalized;
  };
  const auto cosine = [](const std::vector<float>& a, const std::vector<float>& b) {
    Difference d;
    for (std::size_t i = 0; i < a.size(); ++i) d.add(static_cast<double>(a[i]), static_cast<double>(b[i]));
    return d.cosine();
  };
  const std::vector<float> original = actions(c.source);
  for (const char* recipe : {"int8-w8a16", "int4-g128-w4a16", "nvfp4-w4a16"}) {
    const auto formats = formats_of(c, recipe);
    ASSERT_TRUE(formats.ok()) << formats.status().message();
    EXPECT_GT(formats->size(), 10u);
    std::map<std::string, double> power;
    auto rounded = std::make_shared<EditedSource>(c.source);
    for (const auto& [linear, format] : *formats) {
      power[linear] = *weight_noise(*c.source, linear, format, 1 << 20);
      const std::vector<float> w = *rounded->values(linear + ".weight");
      for (const quant::Linear& l : linear_layers(c.architecture))
        if (l.name == linear)
          rounded->replace(linear + ".weight",
                           quant::dequantize(*quant::quantize(w, l.rows, l.cols, format)));
    }
    double distance = 0;
    for (std::uint64_t draw = 0; draw < 8; ++draw)
      distance += (1 - cosine(original, actions(noisy_source(c.source, power, draw)))) / 8;
    const Bound band = noise_bound("actions.cosine", 1 - distance);
    const double got = cosine(original, actions(rounded));
    std::printf("%s: 1 - %.3g, band 1 - %.3g … 1 - %.3g\n", recipe, 1 - got, 1 - *band.least, 1 - *band.most);
    EXPECT_TRUE(judge_bounds({band}, {{"actions.cosine", got}})[0].pass) << recipe;
    EXPECT_FALSE(judge_bounds({band}, {{"actions.cosine", 1.0}})[0].pass) << recipe;
  }
}

}  // namespace
}  // namespace servoflow::toolkit
