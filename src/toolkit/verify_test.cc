#include "toolkit/verify.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <functional>

#include "core/safetensors.h"
#include "stages/preprocess/resize.h"

namespace servoflow::toolkit {
namespace {

namespace fs = std::filesystem;
constexpr char kCheckpoint[] = "tests/golden/openpi-tiny";

struct Tensor {
  DType dtype;
  Shape shape;
  std::vector<std::byte> bytes;
  float* floats() { return reinterpret_cast<float*>(bytes.data()); }
};

// A recorded case in memory, to be changed and written elsewhere.
struct Draft {
  std::map<std::string, std::string> metadata;
  std::map<std::string, Tensor> tensors;

  explicit Draft(const std::string& name) {
    const auto file = SafetensorsFile::open(std::string(kCheckpoint) + "/cases/" + name + ".safetensors");
    EXPECT_TRUE(file.ok());
    metadata = file->metadata();
    for (const SafeTensor& t : file->tensors())
      tensors[t.name] = {t.dtype, t.shape, {t.bytes.begin(), t.bytes.end()}};
  }

  // Entry "tokens": the same pictures at model size, the same ids; nothing of a robot.
  void start_at_tokens() {
    metadata["entry"] = "tokens";
    metadata["prompt_mode"] = metadata["action_width"] = metadata["robot"] = "none";
    stages::Letterbox letterbox(contract::Resize::kPillow);
    for (auto it = tensors.begin(); it != tensors.end();) {
      Tensor& t = it->second;
      if (it->first.starts_with("input/image/")) {
        Tensor square{DType::kU8, {224, 224, 3}, std::vector<std::byte>(224 * 224 * 3)};
        const std::span<const std::uint8_t> rgb{reinterpret_cast<const std::uint8_t*>(t.bytes.data()),
                                                t.bytes.size()};
        EXPECT_TRUE(letterbox
                        .run_u8(rgb, static_cast<int>(t.shape[1]), static_cast<int>(t.shape[0]), 224,
                                {reinterpret_cast<std::uint8_t*>(square.bytes.data()), square.bytes.size()})
                        .ok());
        t = std::move(square);
      }
      const bool robot = it->first == "input/state" || it->first == "expect/state_normalized" ||
                         it->first == "expect/actions" || it->first.starts_with("expect/image/");
      it = robot ? tensors.erase(it) : std::next(it);
    }
  }
};

class Verify : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = testing::TempDir() + "verify-" + std::to_string(::getpid());
    fs::remove_all(folder_);
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  Result<VerifyReport> run(const Draft& draft, VerifyOptions options = {}) {
    std::vector<SafetensorsWriter::Entry> entries;
    for (const auto& [name, t] : draft.tensors) entries.push_back({name, t.dtype, t.shape});
    auto writer = SafetensorsWriter::create(folder_ + "/case.safetensors", entries, draft.metadata);
    EXPECT_TRUE(writer.ok());
    for (const auto& [name, t] : draft.tensors) EXPECT_TRUE((*writer)->write(t.bytes).ok());
    EXPECT_TRUE((*writer)->finish().ok());
    options.cases = folder_;
    options.threads = 1;
    return verify_checkpoint(kCheckpoint, options);
  }
  std::string error(const Draft& draft) {
    const auto report = run(draft);
    return report.ok() ? "" : report.status().message();
  }

  std::string folder_;
};

const Record& find(const VerifyReport& report, const std::string& stage) {
  for (const Record& r : report.records)
    if (r.stage == stage) return r;
  ADD_FAILURE() << stage;
  return report.records.front();
}

TEST_F(Verify, AnUntouchedCasePassesAtEveryStage) {
  const auto report = run(Draft("libero"));
  ASSERT_TRUE(report.ok()) << report.status().message();
  EXPECT_EQ(report->failed, 0);
  EXPECT_EQ(report->passed, static_cast<int>(report->records.size()));
  EXPECT_TRUE(verify_outcome(*report).ok());
  EXPECT_EQ(report->records.front().stage, "state_normalized");
  EXPECT_EQ(report->records.back().stage, "actions");
  const std::string text = verify_text(*report, false);
  EXPECT_TRUE(text.ends_with("\n" + std::to_string(report->passed) + " passed, 0 failed\n")) << text;
  const Json json = verify_to_json(*report);
  EXPECT_EQ(json["records"].size(), report->records.size());
  EXPECT_EQ(json["records"][0]["case"], "case");
}

TEST_F(Verify, ACaseMayStartAtTokens) {
  Draft d("three-cameras");
  d.start_at_tokens();
  const auto report = run(d);
  ASSERT_TRUE(report.ok()) << report.status().message();
  EXPECT_EQ(report->failed, 0) << verify_text(*report, true);
  EXPECT_TRUE(find(*report, "vision/right_wrist_0_rgb").judged);
  EXPECT_EQ(find(*report, "actions_normalized").judged, true);
  for (const Record& r : report->records) EXPECT_NE(r.stage, "tokens") << "an input is not a result";
}

TEST_F(Verify, OneWrongExpectationFailsItsStageAlone) {
  const std::pair<const char*, std::function<void(float*)>> changes[] = {
      {"vision/left_wrist_0_rgb", [](float* x) { x[700] += 1e-3f; }},
      {"prefix/layer3/v", [](float* x) { x[12] = NAN; }},
      {"t", [](float* x) { x[1] = std::nextafterf(x[1], 0); }},
      {"step9/x", [](float* x) { x[319] += 0.01f; }},
  };
  for (const auto& [stage, change] : changes) {
    Draft d("libero");
    change(d.tensors.at(std::string("expect/") + stage).floats());
    const auto report = run(d);
    ASSERT_TRUE(report.ok()) << report.status().message();
    EXPECT_EQ(report->failed, 1) << stage;
    EXPECT_FALSE(find(*report, stage).pass) << stage;
    EXPECT_EQ(exit_code(verify_outcome(*report)), 1);
    EXPECT_NE(verify_text(*report, false).find(std::string("case ") + stage), std::string::npos);
  }
}

TEST_F(Verify, ADifferentInputFails) {
  Draft d("libero");
  d.metadata["prompt"] += "!";
  const auto report = run(d);
  ASSERT_TRUE(report.ok()) << report.status().message();
  EXPECT_FALSE(find(*report, "tokens").pass);
  EXPECT_NE(find(*report, "tokens").note.find("first difference"), std::string::npos);
  EXPECT_FALSE(find(*report, "actions").pass);
  EXPECT_NE(find(*report, "prefix/embeddings").note.find("shape"), std::string::npos) << "one token more";
}

TEST_F(Verify, WithoutGatesNothingIsProven) {
  Draft d("libero");
  d.start_at_tokens();
  d.metadata["tolerances"] = R"({"bf16": {"x": {"rms": 0.1}}})";
  const auto report = run(d);
  ASSERT_TRUE(report.ok()) << report.status().message();
  EXPECT_EQ(report->passed + report->failed, 0);
  EXPECT_EQ(exit_code(verify_outcome(*report)), 1);
  EXPECT_TRUE(verify_to_json(*report)["records"][0]["tolerance"].is_null());
  ASSERT_FALSE(report->notes.empty());
  EXPECT_NE(report->notes[0].find("no tolerances for fp32"), std::string::npos);
}

TEST_F(Verify, CasesThatDoNotFitTheCheckpointAreErrors) {
  Draft noise("libero");
  noise.tensors.at("input/noise").shape = {5, 64};
  EXPECT_NE(
      error(noise).find("input/noise: is [5, 64], the checkpoint's horizon and action width are 10 and 32"),
      std::string::npos)
      << error(noise);
  Draft format("libero");
  format.metadata["format"] = "lerobot";
  EXPECT_NE(error(format).find("metadata format: recorded with lerobot"), std::string::npos) << error(format);
  Draft layer("libero");
  layer.tensors["expect/prefix/layer4/k"] = layer.tensors.at("expect/prefix/layer3/k");
  EXPECT_NE(error(layer).find("expect/prefix/layer4/k: the checkpoint has 4 layers"), std::string::npos)
      << error(layer);
  Draft size("libero");
  size.metadata["entry"] = "tokens";
  size.metadata["prompt_mode"] = "none";
  EXPECT_NE(error(size).find("needs pictures at model size, 224 x 224"), std::string::npos) << error(size);
}

TEST_F(Verify, Bfloat16IsJudgedByItsOwnGates) {
  VerifyOptions options;
  options.precision = "bf16";
  const auto report = run(Draft("droid"), options);
  ASSERT_TRUE(report.ok()) << report.status().message();
  EXPECT_EQ(report->failed, 0) << verify_text(*report, true);
  EXPECT_EQ(report->passed, 3) << "tokens, their mask and the normalised actions";
  const Json record = record_to_json(find(*report, "actions_normalized"));
  EXPECT_EQ(record["gates"], (Json{{"rms", 0.04}, {"cosine", 0.9995}}));
}

}  // namespace
}  // namespace servoflow::toolkit
