#include "weights/architecture.h"

#include <gtest/gtest.h>

#include "core/file.h"
#include "weights/checkpoint_draft.h"
#include "weights/manifest.h"

namespace servoflow::weights {
namespace {

Json golden_block() { return (*read_json_file("tests/golden/openpi-tiny/config.json"))["architecture"]; }

std::string failure(const Json& block) {
  const Result<Architecture> result = architecture_from_json(block, "a.json");
  return result.ok() ? "" : result.status().message();
}

TEST(Architecture, NamedVariants) {
  const GemmaSizes big = *named_gemma("gemma_2b"), small = *named_gemma("gemma_300m");
  EXPECT_EQ(big.width, 2048);
  EXPECT_EQ(big.mlp, 16384);
  EXPECT_EQ(small.width, 1024);
  EXPECT_EQ(small.mlp, 4096);
  for (const GemmaSizes& g : {big, small}) {
    EXPECT_EQ(g.depth, 18);
    EXPECT_EQ(g.heads, 8);
    EXPECT_EQ(g.kv_heads, 1);
    EXPECT_EQ(g.head_dim, 256);
  }
  EXPECT_EQ(so400m().tokens(), 256);
  EXPECT_EQ(so400m().head_dim(), 72);
  for (const char* name : {"gemma_2b_lora", "gemma_300m_lora", "dummy", "", "gemma_7b"}) {
    const Result<GemmaSizes> result = named_gemma(name);
    ASSERT_FALSE(result.ok());
    expect_contains(result.status().message(),
                    "unknown variant \"" + std::string(name) + "\"; known: gemma_2b, gemma_300m");
  }
  expect_contains(named_gemma("gemma_2b_lora").status().message(), "Merge the LoRA weights");
}

TEST(Architecture, PublishedManifestHas811Tensors) {
  EXPECT_TRUE(check_architecture(pi05_architecture()).empty());
  const std::vector<TensorSpec> tensors = manifest(pi05_architecture());
  EXPECT_EQ(tensors.size(), 811u);
  EXPECT_EQ(parameter_count(tensors), 3'353'433'872u);
}

TEST(Architecture, TinyIsTheGoldenOne) {
  const Result<Architecture> golden = architecture_from_json(golden_block(), "config.json");
  ASSERT_TRUE(golden.ok()) << golden.status().message();
  Architecture tiny = tiny_architecture();
  EXPECT_TRUE(check_architecture(tiny).empty());
  tiny.tokenizer = "tokenizer.model";
  tiny.action_dim = tiny.horizon = 0;  // told by config.json itself
  EXPECT_EQ(architecture_to_json(tiny), architecture_to_json(*golden));
  EXPECT_EQ(architecture_to_json(tiny), golden_block());
}

TEST(Architecture, JsonRoundTripsEveryField) {
  Architecture a = micro_architecture();
  a.max_tokens = 32;
  a.default_steps = 4;
  a.min_period = 0.01;
  a.max_period = 2;
  a.time_grid = TimeGrid::kRounded;
  a.tokenizer = "sub/tokens.model";
  const Json block = architecture_to_json(a);
  const Result<Architecture> back = architecture_from_json(block, "a.json");
  ASSERT_TRUE(back.ok()) << back.status().message();
  EXPECT_EQ(architecture_to_json(*back), block);
  EXPECT_EQ(back->max_tokens, 32);
  EXPECT_EQ(back->time_grid, TimeGrid::kRounded);
}

TEST(Architecture, NamesFieldAndCause) {
  struct Case {
    const char* pointer;
    Json value;
    const char* expected;
  };
  const Case cases[] = {
      {"/vision/width", "48", "a.json: vision.width: expected an integer from 1 to 65536, found \"48\""},
      {"/vision/width", 48.0, "vision.width: expected an integer"},
      {"/vision/depth", 0, "vision.depth: expected an integer from 1 to 1024, found 0"},
      {"/vision/patch", -14, "vision.patch: expected an integer"},
      {"/prefix/mlp", 1e12, "prefix.mlp: expected an integer"},
      {"/prefix/vocab", 18446744073709551615u, "prefix.vocab: expected an integer"},
      {"/prefix/heads", nullptr, "prefix.heads: is null"},
      {"/expert/width", true, "expert.width: expected an integer"},
      {"/expert/more", 1, "expert.more: unknown key; known here: depth, head_dim"},
      {"/expert/vocab", 1024, "expert.vocab: unknown key"},
      {"/vision/head_dim", 16, "vision.head_dim: unknown key"},
      {"/vision", 3, "a.json: vision: expected an object, found 3"},
      {"/prefix", Json::array(), "prefix: expected an object, found array of 0 entries"},
      {"/extra", 3, "a.json: extra: unknown key"},
      {"/tokenizer", 3, "tokenizer: expected a string"},
      {"/tokenizer", "../tokenizer.model", "tokenizer: \"../tokenizer.model\" must be a file inside"},
      {"/tokenizer", "/etc/passwd", "must be a file inside"},
      {"/tokenizer", "a/../../b", "must be a file inside"},
      {"/time_grid", "exact", "time_grid: expected \"accumulated\" or \"rounded\""},
      {"/default_steps", 51, "default_steps: expected an integer from 1 to 50"},
      {"/min_period", 0, "min_period: expected a number"},
      {"/min_period", 5, "min_period: must be positive and below max_period"},
      {"/vision/heads", 5, "vision.heads: 5 heads do not divide vision.width 48"},
      {"/vision/image", 225, "vision.image: 225 is not a multiple of vision.patch 14"},
      {"/prefix/kv_heads", 3, "prefix.kv_heads: 3 does not divide prefix.heads 4"},
      {"/prefix/head_dim", 31, "prefix.head_dim: 31 is odd"},
      {"/expert/width", 41, "expert.width: 41 is odd"},
      {"/expert/depth", 5, "expert.depth: 5 differs from prefix.depth 4"},
      {"/expert/heads", 2, "expert.heads: 2 differs from prefix.heads 4"},
      {"/expert/head_dim", 64, "expert.head_dim: 64 differs from prefix.head_dim 32"},
  };
  for (const Case& c : cases) {
    Json block = golden_block();
    block[Json::json_pointer(c.pointer)] = c.value;
    expect_contains(failure(block), c.expected);
  }
  for (const char* section : {"vision", "prefix", "expert"}) {
    Json block = golden_block();
    block[section].erase("width");
    expect_contains(failure(block),
                    std::string("a.json: ") + section + ".width: missing, expected an integer");
    block.erase(section);
    expect_contains(failure(block), std::string("a.json: ") + section + ": missing, expected an object");
  }
  for (const Json& block : {Json(), Json(3), Json::array(), Json("x")})
    expect_contains(failure(block), "expected an object");
}

TEST(Architecture, ListsEveryProblem) {
  Json block = golden_block();
  block["vision"]["width"] = "x";
  block["expert"].erase("mlp");
  block["unknown"] = 1;
  const std::string message = failure(block);
  expect_contains(message, "vision.width");
  expect_contains(message, "expert.mlp");
  expect_contains(message, "unknown");
}

TEST(Architecture, ChecksSizesMadeInCode) {
  EXPECT_FALSE(check_architecture(Architecture{}).empty());
  Architecture a = micro_architecture();
  a.vision.heads = 0;  // must be told, not divided by
  a.horizon = 0;
  EXPECT_EQ(check_architecture(a).size(), 2u);
}

TEST(Architecture, NamedModels) {
  EXPECT_EQ(named_architecture("pi05")->vocab, 257152);
  EXPECT_EQ(named_architecture("tiny")->vocab, 1024);
  expect_contains(named_architecture("pi06").status().message(), "expected pi05, tiny, or a .json file");
  const std::string path = testing::TempDir() + "/architecture_test_" + std::to_string(::getpid()) + ".json";
  Json block = golden_block();
  ASSERT_TRUE(write_file_atomically(path, block.dump()).ok());
  Result<Architecture> read = named_architecture(path);
  ASSERT_TRUE(read.ok()) << read.status().message();
  EXPECT_EQ(read->action_dim, 32);
  EXPECT_EQ(read->horizon, 50);
  block["horizon"] = 7;
  ASSERT_TRUE(write_file_atomically(path, Json{{"architecture", block}}.dump()).ok());
  EXPECT_EQ(named_architecture(path)->horizon, 7);
  ASSERT_TRUE(write_file_atomically(path, std::string("[]")).ok());
  expect_contains(named_architecture(path).status().message(), path + ": expected an object");
  expect_contains(named_architecture(path + ".json").status().message(), "cannot open");
  ::unlink(path.c_str());
}

}  // namespace
}  // namespace servoflow::weights
