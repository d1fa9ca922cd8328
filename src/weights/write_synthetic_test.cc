#include "weights/write_synthetic.h"

#include <gtest/gtest.h>

#include <filesystem>

#include "weights/checkpoint_draft.h"

namespace servoflow::weights {
namespace {

namespace fs = std::filesystem;

class WriteSynthetic : public testing::Test {
 protected:
  WriteSynthetic() : dir_(testing::TempDir() + "/write_synthetic_test_" + std::to_string(::getpid())) {
    fs::remove_all(dir_);
    fs::create_directories(dir_);
    options_.out = dir_ + "/out";
    options_.architecture = tiny_architecture();
    options_.threads = 2;
  }
  ~WriteSynthetic() override { fs::remove_all(dir_); }
  std::size_t entries() const {
    return static_cast<std::size_t>(std::distance(fs::directory_iterator(dir_), fs::directory_iterator()));
  }
  std::string failure() const {
    const Status status = write_synthetic(options_);
    return status.ok() ? "" : status.message();
  }

  std::string dir_;
  SynthOptions options_;
};

TEST_F(WriteSynthetic, RoundTripsThroughTheLoader) {
  for (const Layout layout : {Layout::kOpenpi, Layout::kLerobot}) {
    for (const DType dtype : {DType::kBF16, DType::kF32}) {
      fs::remove_all(options_.out);
      options_.layout = layout;
      options_.dtype = dtype;
      options_.seed = 5;
      options_.tokenizer = "tests/golden/tokenizer/tokenizer.model";
      std::uint64_t last = 0, total = 0;
      const Status status = write_synthetic(options_, [&](std::uint64_t done, std::uint64_t all) {
        EXPECT_GE(done, last);
        last = done;
        total = all;
      });
      ASSERT_TRUE(status.ok()) << status.message();
      EXPECT_EQ(total, 520220 * dtype_size(dtype));
      EXPECT_EQ(last, total);
      const Result<Checkpoint> opened = open_checkpoint(options_.out);
      ASSERT_TRUE(opened.ok()) << opened.status().message();
      EXPECT_EQ(opened->layout, layout);
      EXPECT_EQ(opened->parameters, 520220u);
      EXPECT_TRUE(opened->ignored.empty());
      EXPECT_EQ(opened->architecture.horizon, 10);
      EXPECT_EQ(opened->architecture.time_grid,
                layout == Layout::kLerobot ? TimeGrid::kRounded : TimeGrid::kAccumulated);
      EXPECT_EQ(*find_tokenizer(*opened, ""), options_.out + "/tokenizer.model");
      const SyntheticSource source(options_.architecture, 5, dtype);
      for (const TensorSpec& spec : manifest(options_.architecture)) {
        const TensorData stored = *opened->source->get(spec.name), made = *source.get(spec.name);
        ASSERT_EQ(stored.dtype, dtype);
        ASSERT_TRUE(
            std::equal(stored.bytes.begin(), stored.bytes.end(), made.bytes.begin(), made.bytes.end()))
            << spec.name;
      }
    }
  }
}

// Tensors larger than a chunk and than a batch of chunks.
TEST_F(WriteSynthetic, CrossesChunks) {
  options_.architecture = micro_architecture();
  options_.architecture.vocab = 1'600'001;  // 9.6 million elements in the token table
  options_.dtype = DType::kBF16;
  ASSERT_EQ(failure(), "");
  const Result<Checkpoint> opened = open_checkpoint(options_.out);
  ASSERT_TRUE(opened.ok()) << opened.status().message();
  const SyntheticSource source(options_.architecture, 0, DType::kBF16);
  for (const TensorSpec& spec : manifest(options_.architecture)) {
    const TensorData stored = *opened->source->get(spec.name), made = *source.get(spec.name);
    ASSERT_TRUE(std::equal(stored.bytes.begin(), stored.bytes.end(), made.bytes.begin(), made.bytes.end()))
        << spec.name;
  }
}

TEST_F(WriteSynthetic, BothLayoutsKeepEverySize) {
  Architecture& a = options_.architecture;
  a = micro_architecture();
  a.max_tokens = 32;
  a.default_steps = 4;
  a.min_period = 0.01;
  a.max_period = 2;
  for (const Layout layout : {Layout::kOpenpi, Layout::kLerobot}) {
    fs::remove_all(options_.out);
    options_.layout = layout;
    ASSERT_EQ(failure(), "");
    const Result<Checkpoint> opened = open_checkpoint(options_.out);
    ASSERT_TRUE(opened.ok()) << opened.status().message();
    Architecture back = opened->architecture;
    back.time_grid = a.time_grid;
    EXPECT_EQ(architecture_to_json(back), architecture_to_json(a));
  }
}

TEST_F(WriteSynthetic, OpenpiFilesAreThoseOfTheLayout) {
  options_.asset = "physical-intelligence/libero";
  options_.state_width = 8;
  options_.action_width = 7;
  ASSERT_EQ(failure(), "");
  const Json config = *read_json_file(options_.out + "/config.json");
  EXPECT_EQ(config["action_dim"], 32);
  EXPECT_EQ(config["action_horizon"], 10);
  EXPECT_EQ(config["paligemma_variant"], "gemma_2b");
  EXPECT_EQ(config["action_expert_variant"], "gemma_300m");
  EXPECT_EQ(config["precision"], "bfloat16");
  Json block = (*read_json_file("tests/golden/openpi-tiny/config.json"))["architecture"];
  block.erase("tokenizer");
  EXPECT_EQ(config["architecture"], block);
  const Json stats =
      (*read_json_file(options_.out + "/assets/physical-intelligence/libero/norm_stats.json"))["norm_stats"];
  EXPECT_EQ(stats["state"]["q01"], Json(std::vector<double>(8, -1)));
  EXPECT_EQ(stats["state"]["q99"], Json(std::vector<double>(8, 1)));
  EXPECT_EQ(stats["actions"]["mean"], Json(std::vector<double>(7, 0)));
  EXPECT_EQ(stats["actions"]["std"], Json(std::vector<double>(7, 1)));
  const SafetensorsFile file = *SafetensorsFile::open(options_.out + "/model.safetensors");
  EXPECT_EQ(file.tensors().size(), 147u);
  EXPECT_EQ(file.metadata().at(kEmbedTokens), kTokenTable);
}

TEST_F(WriteSynthetic, LerobotFilesAreThoseOfTheLayout) {
  options_.layout = Layout::kLerobot;
  options_.state_width = 8;
  options_.action_width = 7;
  ASSERT_EQ(failure(), "");
  const Json config = *read_json_file(options_.out + "/config.json");
  const Json golden = *read_json_file("tests/golden/lerobot-tiny/config.json");
  for (const char* key :
       {"type", "chunk_size", "max_action_dim", "max_state_dim", "num_inference_steps", "image_resolution",
        "tokenizer_max_length", "normalization_mapping", "min_period", "max_period", "output_features"})
    EXPECT_EQ(config[key], golden[key]) << key;
  EXPECT_EQ(config["input_features"].size(), 4u);
  EXPECT_EQ(config["input_features"]["observation.state"], golden["input_features"]["observation.state"]);
  EXPECT_EQ(config["dtype"], "bfloat16");
  for (const std::string name : {"policy_preprocessor", "policy_postprocessor"}) {
    const Json made = *read_json_file(options_.out + "/" + name + ".json");
    const Json published = *read_json_file("tests/golden/lerobot-tiny/" + name + ".json");
    EXPECT_EQ(made["name"], published["name"]);
    ASSERT_EQ(made["steps"].size(), published["steps"].size());
    for (std::size_t i = 0; i < made["steps"].size(); ++i) {
      const Json& step = made["steps"][i];
      const Json& model = published["steps"][i];
      EXPECT_EQ(step["registry_name"], model["registry_name"]);
      for (const auto& [key, value] : model["config"].items())
        EXPECT_TRUE(step["config"].contains(key)) << key;
      EXPECT_EQ(step.contains("state_file"), model.contains("state_file"));
      if (!step.contains("state_file")) continue;
      EXPECT_EQ(step["state_file"], model["state_file"]);
      const SafetensorsFile state =
          *SafetensorsFile::open(options_.out + "/" + step["state_file"].get<std::string>());
      EXPECT_EQ(state.tensors().size(), 8u);
      EXPECT_EQ(*to_floats(*state.find("action.q01")), std::vector<float>(7, -1.0f));
      EXPECT_EQ(*to_floats(*state.find("action.std")), std::vector<float>(7, 1.0f));
      EXPECT_EQ(*to_floats(*state.find("observation.state.q99")), std::vector<float>(8, 1.0f));
      EXPECT_EQ(*to_floats(*state.find("observation.state.mean")), std::vector<float>(8, 0.0f));
    }
  }
}

TEST_F(WriteSynthetic, RefusesBadOptionsAndLeavesNothing) {
  const SynthOptions good = options_;
  const auto expect = [&](const char* part) {
    const std::string message = failure();
    expect_contains(message, part);
    EXPECT_EQ(entries(), 0u);
    options_ = good;
  };
  options_.action_width = 33;
  expect("action width: 33 is not in 1 … 32, the network's action_dim");
  options_.state_width = -1;
  expect("state width: -1 is not in");
  options_.asset = "../escape";
  expect("asset: \"../escape\" is not a folder name");
  options_.dtype = DType::kF16;
  expect("dtype: only bf16 and fp32");
  options_.layout = Layout::kServoflow;
  expect("layout: only openpi and lerobot");
  options_.architecture.vision.heads = 5;
  expect("architecture: vision.heads: 5 heads do not divide");
  options_.tokenizer = "/nonexistent";
  expect("/nonexistent: cannot open");
  options_.out = "";
  expect("OUT: missing");
  options_.architecture.vision = {
      .width = 65536, .depth = 1024, .heads = 8, .mlp = 1 << 20, .patch = 14, .image = 224};
  expect("GB of disk space, only ");
}

TEST_F(WriteSynthetic, NeverTouchesAnExistingCheckpoint) {
  fs::create_directories(options_.out);
  EXPECT_EQ(failure(), "");  // an empty directory is fine, a trailing slash too
  EXPECT_TRUE(fs::exists(options_.out + "/config.json"));
  options_.out += "/";
  expect_contains(failure(), "exists and is not empty; remove it or choose another directory");
  options_.out = dir_ + "/out/config.json";
  expect_contains(failure(), "exists and is not a directory");
  options_.out = dir_ + "/out/config.json/below";
  expect_contains(failure(), "cannot create");
  options_.out = dir_ + "/new/deep/out";
  EXPECT_EQ(failure(), "");
  EXPECT_EQ(entries(), 2u);
}

}  // namespace
}  // namespace servoflow::weights
