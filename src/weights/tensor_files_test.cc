#include "weights/tensor_files.h"

#include <gtest/gtest.h>

#include "weights/checkpoint_draft.h"

namespace servoflow::weights {
namespace {

// A draft's tensors spread over two shards with an index.
class Shards {
 public:
  Shards() {
    std::filesystem::create_directories(draft.dir);
    std::size_t i = 0;
    for (const auto& [name, tensor] : draft.tensors) {
      const std::size_t shard = i++ % 2;
      files[shard][name] = tensor;
      index["weight_map"][name] = names[shard];
    }
    index["metadata"] = {{"total_size", 1}};
  }
  std::string failure() const {
    draft.write_text("config.json", draft.config.dump());
    draft.write_text("model.safetensors.index.json", index.dump());
    for (std::size_t shard = 0; shard < 2; ++shard)
      if (!files[shard].empty()) CheckpointDraft::write_file(draft.dir + "/" + names[shard], files[shard]);
    const Result<std::shared_ptr<const TensorFiles>> opened = TensorFiles::open(draft.dir);
    return opened.ok() ? "" : opened.status().message();
  }

  CheckpointDraft draft;
  const std::string names[2] = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"};
  std::map<std::string, DraftTensor> files[2];
  Json index;
};

TEST(TensorFiles, ReadsShards) {
  const Shards shards;
  ASSERT_EQ(shards.failure(), "");
  const Result<Checkpoint> opened = open_checkpoint(shards.draft.dir);
  ASSERT_TRUE(opened.ok()) << opened.status().message();
  for (const auto& [name, tensor] : shards.draft.tensors) {
    const Result<TensorData> data = opened->source->get(name);
    ASSERT_TRUE(data.ok());
    EXPECT_TRUE(std::equal(data->bytes.begin(), data->bytes.end(), tensor.bytes.begin(), tensor.bytes.end()))
        << name;
    opened->source->release(name);
  }
  EXPECT_EQ(inspect_checkpoint(shards.draft.dir).files.size(), 2u);
}

TEST(TensorFiles, RefusesPathsOutOfTheDirectory) {
  for (const char* name : {"../model-00001-of-00002.safetensors", "/etc/passwd", "a/../../b", "", ".", "..",
                           "a//b", "./model-00001-of-00002.safetensors", "a\\b"}) {
    Shards shards;
    shards.index["weight_map"]["time_mlp_in.bias"] = name;
    expect_contains(shards.failure(), "model.safetensors.index.json: tensor \"time_mlp_in.bias\": \"" +
                                          std::string(name) +
                                          "\" is not a file inside the checkpoint directory");
  }
}

TEST(TensorFiles, NamesWhatDisagreesWithTheIndex) {
  Shards missing;
  missing.files[1].clear();
  expect_contains(missing.failure(), missing.names[1] + ": cannot open");

  Shards absent;
  absent.index["weight_map"]["ghost"] = absent.names[0];
  expect_contains(absent.failure(),
                  absent.names[0] + ": tensor \"ghost\": missing, though model.safetensors.index.json");

  Shards unlisted;
  unlisted.index["weight_map"].erase("time_mlp_in.bias");
  expect_contains(unlisted.failure(),
                  "tensor \"time_mlp_in.bias\": not listed in model.safetensors.index.json");

  Shards twice;
  for (auto& file : twice.files) file["action_in_proj.bias"] = twice.draft.tensors["action_in_proj.bias"];
  expect_contains(twice.failure(), "tensor \"action_in_proj.bias\": stored here, though");

  Shards several;
  several.index["weight_map"]["ghost"] = several.names[0];
  several.index["weight_map"]["number"] = 3;
  const std::string message = several.failure();
  expect_contains(message, "2 problems");
  expect_contains(message, "tensor \"number\": expected a file name, found 3");
}

TEST(TensorFiles, RefusesBrokenIndexes) {
  for (const Json& index :
       {Json::array(), Json::object(), Json{{"weight_map", 3}}, Json{{"weight_map", Json::object()}}}) {
    Shards shards;
    shards.index = index;
    expect_contains(shards.failure(), "model.safetensors.index.json: weight_map");
  }
  const Shards shards;
  shards.draft.write_text("model.safetensors.index.json", "{\"weight_map\": {\"a\": \"x\", \"a\": \"y\"}}");
  expect_contains(TensorFiles::open(shards.draft.dir).status().message(), "duplicate key \"a\"");
}

TEST(TensorFiles, FollowsAliases) {
  CheckpointDraft draft;
  draft.metadata = {{"other", "time_mlp_in.bias"}, {"dangling", "nothing"}};
  draft.write();
  const auto files = TensorFiles::open(draft.dir);
  ASSERT_TRUE(files.ok());
  ASSERT_TRUE((*files)->find("other"));
  EXPECT_EQ((*files)->find("other").tensor->name, "time_mlp_in.bias");
  EXPECT_FALSE((*files)->find("dangling"));
  EXPECT_FALSE((*files)->find("nothing"));
}

}  // namespace
}  // namespace servoflow::weights
