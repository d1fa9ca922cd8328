#include "weights/checkpoint.h"

#include <gtest/gtest.h>

#include <cstdlib>

#include "weights/checkpoint_draft.h"

namespace servoflow::weights {
namespace {

constexpr char kLm[] = "paligemma_with_expert.paligemma.lm_head.weight";
constexpr char kEmbed[] = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight";
constexpr char kExpertLayer[] = "paligemma_with_expert.gemma_expert.model.layers.";

std::vector<float> row(const WeightSource& source, std::int32_t id, std::size_t width) {
  std::vector<float> out(width);
  EXPECT_TRUE(source.token_rows(std::span(&id, 1), out).ok());
  return out;
}

// The same row straight out of a file.
std::vector<float> stored_row(const std::string& dir, const std::string& name, std::size_t id,
                              std::size_t width) {
  const SafetensorsFile file = *SafetensorsFile::open(dir + "/model.safetensors");
  const std::vector<float> all = *to_floats(*file.find(name));
  return {all.begin() + static_cast<std::ptrdiff_t>(id * width),
          all.begin() + static_cast<std::ptrdiff_t>((id + 1) * width)};
}

TEST(Checkpoint, OpensTheGoldenOnes) {
  for (const std::string name : {"openpi-tiny", "lerobot-tiny", "lerobot-tiny-meanstd"}) {
    const std::string dir = "tests/golden/" + name;
    const bool lerobot = name != "openpi-tiny";
    const Result<Checkpoint> opened = open_checkpoint(dir);
    ASSERT_TRUE(opened.ok()) << opened.status().message();
    EXPECT_EQ(opened->layout, lerobot ? Layout::kLerobot : Layout::kOpenpi);
    EXPECT_EQ(opened->parameters, 520220u);
    EXPECT_EQ(opened->ignored.size(),
              lerobot ? 2u : 1u);  // the expert's head, and lerobot's second token table
    const Architecture& a = opened->architecture;
    EXPECT_EQ(a.horizon, 10);
    EXPECT_EQ(a.action_dim, 32);
    EXPECT_EQ(a.max_tokens, 200);
    EXPECT_EQ(a.default_steps, 10);
    EXPECT_EQ(a.prefix.head_dim, 32);
    EXPECT_EQ(a.time_grid, lerobot ? TimeGrid::kRounded : TimeGrid::kAccumulated);
    EXPECT_EQ(opened->source->stored_dtype(), "F32");
    const std::string table = lerobot ? std::string("model.") + kEmbed : kLm;
    EXPECT_EQ(row(*opened->source, 1023, 64), stored_row(dir, table, 1023, 64));
    for (const TensorSpec& spec : manifest(a)) {
      const Result<TensorData> data = opened->source->get(spec.name);
      ASSERT_TRUE(data.ok()) << data.status().message();
      EXPECT_EQ(data->shape, spec.shape) << spec.name;
      EXPECT_TRUE(opened->source->has(spec.name));
    }
    EXPECT_FALSE(opened->source->has(kExpertHead));
    EXPECT_FALSE(opened->source->get("nothing").ok());
    EXPECT_EQ(*find_tokenizer(*opened, ""), dir + "/tokenizer.model");
  }
}

TEST(Checkpoint, OpensDraftsOfBothLayouts) {
  for (const Layout layout : {Layout::kOpenpi, Layout::kLerobot}) {
    const CheckpointDraft draft(layout);
    EXPECT_EQ(draft.failure(), "");
    EXPECT_EQ(open_checkpoint(draft.dir)->layout, layout);
  }
}

TEST(Checkpoint, TakesTheTokenTableItsLayoutComputesWith) {
  const auto used = [](const CheckpointDraft& draft) {
    draft.write();
    return inspect_checkpoint(draft.dir).token_table;
  };
  for (const Layout layout : {Layout::kOpenpi, Layout::kLerobot}) {
    CheckpointDraft draft(layout);
    const std::string lm = draft.prefix + kLm, embed = draft.prefix + kEmbed;
    EXPECT_EQ(used(draft), lm);
    draft.tensors[embed] = draft.tensors[lm];  // both stored
    EXPECT_EQ(used(draft), layout == Layout::kLerobot ? embed : lm);
    EXPECT_EQ(open_checkpoint(draft.dir)->ignored.size(), 1u);
    draft.tensors.erase(lm);
    EXPECT_EQ(used(draft), embed);
    draft.tensors.erase(embed);
    const std::string message = draft.failure();
    expect_contains(message, std::string("tensor \"") + kLm +
                                 "\": missing, expected [11, 6] under this name or as " + kEmbed);
  }
  CheckpointDraft aliased;  // save_model may have kept either of the tied names, or a third one
  aliased.rename(kLm, "table");
  aliased.metadata[kEmbed] = "table";
  EXPECT_EQ(used(aliased), "table");
  EXPECT_TRUE(inspect_checkpoint(aliased.dir).problems.empty());
}

TEST(Checkpoint, ConvertsTokenRowsOfEveryDtype) {
  CheckpointDraft draft;
  const double values[] = {1.5, -2, 0.25, 3, 0, -1};
  const std::uint16_t half[] = {0x3e00, 0xc000, 0x3400, 0x4200, 0x0000, 0xbc00};
  const std::uint16_t brain[] = {0x3fc0, 0xc000, 0x3e80, 0x4040, 0x0000, 0xbf80};
  DraftTensor& table = draft.at(kLm);
  const auto check = [&](DType dtype, const void* bytes, std::size_t size) {
    draft.add(kLm, {11, 6}, dtype);
    std::memcpy(table.bytes.data() + 10 * size, bytes, size);
    ASSERT_EQ(draft.failure(), "");
    const Result<Checkpoint> opened = open_checkpoint(draft.dir);
    EXPECT_EQ(row(*opened->source, 10, 6), (std::vector<float>{1.5f, -2, 0.25f, 3, 0, -1}));
    EXPECT_EQ(opened->source->stored_dtype(), "mixed");
  };
  check(DType::kF64, values, sizeof(values));
  check(DType::kF16, half, sizeof(half));
  check(DType::kBF16, brain, sizeof(brain));
  const Result<Checkpoint> opened = open_checkpoint(draft.dir);
  std::vector<float> out(12);
  for (const std::int32_t bad : {-1, 11, 1 << 30}) {
    const Status status = opened->source->token_rows(std::span(&bad, 1), std::span(out).first(6));
    ASSERT_FALSE(status.ok());
    expect_contains(status.message(),
                    "token id " + std::to_string(bad) + " is outside the token table of 11 rows");
  }
  const std::int32_t good = 3;
  EXPECT_FALSE(opened->source->token_rows(std::span(&good, 1), out).ok());  // wrong output size
}

TEST(Checkpoint, ListsEveryBrokenTensor) {
  CheckpointDraft draft;
  draft.drop("time_mlp_in.bias");
  draft.add("action_out_proj.weight", {4, 10});
  draft.add("action_in_proj.bias", {10}, DType::kI32);
  draft.add("surprise", {2});
  for (const int layer : {0, 1, 2}) draft.drop(kExpertLayer + std::to_string(layer) + ".mlp.up_proj.weight");
  const std::string message = draft.failure();
  EXPECT_TRUE(message.starts_with(draft.dir + ": 5 problems:")) << message;
  expect_contains(message, "tensor \"time_mlp_in.bias\": missing, expected [10]");
  expect_contains(message, "tensor \"action_out_proj.weight\": shape [4, 10], expected [3, 10]");
  expect_contains(message, "tensor \"action_in_proj.bias\": dtype I32, expected BF16, F32, F16 or F64");
  expect_contains(message, "tensor \"surprise\": not part of a pi0.5 network of these sizes, shape [2]");
  expect_contains(message,
                  std::string(kExpertLayer) + "{0-2}.mlp.up_proj.weight\": missing, expected [8, 10]");
}

TEST(Checkpoint, SizesMustAgreeWithShapes) {
  struct Case {
    const char* pointer;
    int value;
    const char* expected;
  };
  const Case cases[] = {
      {"/architecture/vision/mlp", 7, "encoder.layers.{0-1}.mlp.fc1.weight\": shape [6, 4], expected [7, 4]"},
      {"/architecture/vision/depth", 3, "encoder.layers.2.self_attn.q_proj.weight\": missing"},
      {"/architecture/vision/depth", 1,
       "encoder.layers.1.self_attn.q_proj.weight\": not part of a pi0.5 network"},
      {"/architecture/vision/image", 8, "position_embedding.weight\": shape [4, 4], expected [16, 4]"},
      {"/architecture/prefix/vocab", 12, "lm_head.weight\": shape [11, 6], expected [12, 6]"},
      {"/architecture/prefix/mlp", 9,
       "language_model.layers.{0-2}.mlp.gate_proj.weight\": shape [8, 6], expected [9, 6]"},
      {"/architecture/expert/width", 12, "action_in_proj.weight\": shape [10, 3], expected [12, 3]"},
      {"/action_dim", 4, "action_out_proj.bias\": shape [3], expected [4]"},
  };
  for (const Case& c : cases) {
    CheckpointDraft draft;
    draft.config[Json::json_pointer(c.pointer)] = c.value;
    expect_contains(draft.failure(), c.expected);
  }
  CheckpointDraft heads;  // head counts are taken on trust, their product is not
  heads.config["architecture"]["prefix"].update({{"heads", 4}, {"head_dim", 2}});
  heads.config["architecture"]["expert"].update({{"heads", 4}, {"head_dim", 2}});
  expect_contains(heads.failure(), "k_proj.weight\": shape [4, 6], expected [2, 6]");
  heads.config["architecture"]["prefix"]["kv_heads"] = 2;
  heads.config["architecture"]["expert"]["kv_heads"] = 2;
  EXPECT_EQ(heads.failure(), "");
}

TEST(Checkpoint, NamedVariantsAreCheckedAgainstShapes) {
  CheckpointDraft draft;
  draft.config = {{"action_dim", 3},
                  {"action_horizon", 5},
                  {"paligemma_variant", "gemma_2b"},
                  {"action_expert_variant", "gemma_300m"}};
  const std::string message = draft.failure();
  expect_contains(message,
                  "lm_head.weight\": shape [11, 6], expected [257152, 2048] from the sizes in config.json");
  expect_contains(message, "encoder.layers.{2-26}.mlp.fc1.weight\": missing, expected [4304, 1152]");
}

struct ConfigCase {
  const char* pointer;
  Json value;
  const char* expected;
};

void expect_config_failures(Layout layout, const std::vector<ConfigCase>& cases) {
  for (const ConfigCase& c : cases) {
    CheckpointDraft draft(layout);
    draft.config[Json::json_pointer(c.pointer)] = c.value;
    const std::string message = draft.failure();
    EXPECT_TRUE(message.starts_with(draft.dir)) << message;
    expect_contains(message, std::string("config.json: ") + c.expected);
  }
}

TEST(Checkpoint, RefusesBrokenOpenpiConfigs) {
  expect_config_failures(
      Layout::kOpenpi,
      {{"/action_dim", "3", "action_dim: expected an integer from 1 to 4096, found \"3\""},
       {"/action_dim", 0, "action_dim: expected an integer"},
       {"/action_horizon", 1e9, "action_horizon: expected an integer"},
       {"/action_horizon", nullptr, "action_horizon: is null"},
       {"/action_horizon", Json::array({5}),
        "action_horizon: expected an integer from 1 to 4096, found array of 1 entries"},
       {"/architecture", 3, "architecture: expected an object, found 3"},
       {"/architecture/vision/width", "x", "architecture.vision.width: expected an integer"},
       {"/architecture/prefix/kv_heads", 3, "architecture.prefix.kv_heads: 3 does not divide prefix.heads 2"},
       {"/architecture/colour", 3, "architecture.colour: unknown key"},
       {"/architecture/action_dim", 4, "action_dim: 3 contradicts architecture.action_dim 4"},
       {"/architecture/horizon", 4, "action_horizon: 5 contradicts architecture.horizon 4"},
       {"/max_token_len", -1, "max_token_len: expected an integer"},
       {"/paligemma_variant", 3, "paligemma_variant: expected a string"},
       {"/precision", 3, "precision: expected a string"},
       {"/pi05", false, "pi05: is false"}});
  for (const char* key : {"action_dim", "action_horizon"}) {
    CheckpointDraft draft;
    draft.config.erase(key);
    expect_contains(draft.failure(), std::string("config.json: ") + key + ": missing, expected an integer");
  }
  CheckpointDraft variants;
  variants.config.erase("architecture");
  expect_contains(variants.failure(), "config.json: paligemma_variant: missing, expected a string");
  variants.config.update({{"paligemma_variant", "gemma_2b_lora"}, {"action_expert_variant", "dummy"}});
  const std::string message = variants.failure();
  expect_contains(
      message,
      "config.json: paligemma_variant: unknown variant \"gemma_2b_lora\"; known: gemma_2b, gemma_300m");
  expect_contains(message, "config.json: action_expert_variant: unknown variant \"dummy\"");
}

TEST(Checkpoint, RefusesBrokenLerobotConfigs) {
  expect_config_failures(
      Layout::kLerobot,
      {{"/type", 3, "type: expected a string"},
       {"/type", "pi0", "type: this is a pi0 policy"},
       {"/type", "pi0_fast", "type: this is a pi0-FAST policy"},
       {"/type", "smolvla", "type: \"smolvla\" is not a policy servoflow runs"},
       {"/use_visual_memory", true, "use_visual_memory: is true: this is the memory variant"},
       {"/use_proprioceptive_memory", true, "use_proprioceptive_memory: is true"},
       {"/use_visual_memory", "no", "use_visual_memory: expected true or false"},
       {"/chunk_size", 0, "chunk_size: expected an integer"},
       {"/max_action_dim", "32", "max_action_dim: expected an integer"},
       {"/num_inference_steps", 51, "num_inference_steps: expected an integer from 1 to 50"},
       {"/tokenizer_max_length", 1.5, "tokenizer_max_length: expected an integer"},
       {"/image_resolution", {4, 8}, "image_resolution: 4 x 8 contradicts the vision tower's 4 x 4"},
       {"/image_resolution", 4, "image_resolution: expected two integers, found 4"},
       {"/image_resolution", {4, "4"}, "image_resolution: expected two integers"},
       {"/min_period", -1, "min_period: expected a number"},
       {"/max_period", 1e-4, "architecture.min_period: must be positive and below max_period"}});
}

TEST(Checkpoint, ReadsLerobotFields) {
  CheckpointDraft twice(Layout::kLerobot);
  twice.config["architecture"]["max_tokens"] = 100;
  EXPECT_EQ(twice.failure(), "");
  twice.config["tokenizer_max_length"] = 200;
  expect_contains(twice.failure(),
                  "config.json: tokenizer_max_length: 200 contradicts architecture.max_tokens 100");
  CheckpointDraft draft(Layout::kLerobot);
  draft.config.update({{"num_inference_steps", 4},
                       {"tokenizer_max_length", 48},
                       {"min_period", 0.01},
                       {"max_period", 2.0},
                       {"optimizer_lr", 1.0}});
  ASSERT_EQ(draft.failure(), "");
  const Inspection seen = inspect_checkpoint(draft.dir);
  EXPECT_EQ(seen.architecture->default_steps, 4);
  EXPECT_EQ(seen.architecture->max_tokens, 48);
  EXPECT_EQ(seen.architecture->min_period, 0.01);
  EXPECT_EQ(seen.architecture->max_period, 2.0);
  EXPECT_EQ(seen.unused_config, std::vector<std::string>{"optimizer_lr"});
}

TEST(Checkpoint, RefusesUnreadableConfigs) {
  const CheckpointDraft draft;
  draft.write();
  const auto with = [&](const std::string& text) {
    draft.write_text("config.json", text);
    return open_checkpoint(draft.dir).status().message();
  };
  expect_contains(with(""), draft.dir + ": config.json: not valid JSON");
  expect_contains(with("{"), draft.dir + ": config.json: not valid JSON");
  expect_contains(with("[]"), "config.json: expected an object, found array of 0 entries");
  expect_contains(with("3"), "config.json: expected an object, found 3");
  expect_contains(with("{\"action_dim\": 1, \"action_dim\": 2}"),
                  "config.json: duplicate key \"action_dim\"");
  expect_contains(with(std::string(5 << 20, ' ')), "config.json: 5242880 bytes, the limit");
  std::filesystem::remove(draft.dir + "/config.json");
  expect_contains(open_checkpoint(draft.dir).status().message(),
                  "config.json: missing; an openpi checkpoint needs");
}

TEST(Checkpoint, RefusesPi0ByName) {
  for (const Layout layout : {Layout::kOpenpi, Layout::kLerobot}) {
    CheckpointDraft draft(layout);
    for (const int i : {0, 1, 2}) {
      for (const char* norm : {"input_layernorm", "post_attention_layernorm"}) {
        const std::string base = kExpertLayer + std::to_string(i) + "." + norm;
        draft.drop(base + ".dense.weight");
        draft.drop(base + ".dense.bias");
        draft.add(draft.prefix + base + ".weight", {10});
      }
    }
    draft.drop("paligemma_with_expert.gemma_expert.model.norm.dense.weight");
    draft.drop("paligemma_with_expert.gemma_expert.model.norm.dense.bias");
    draft.add(draft.prefix + "paligemma_with_expert.gemma_expert.model.norm.weight", {10});
    draft.rename(draft.prefix + "time_mlp_in.weight", draft.prefix + "action_time_mlp_in.weight");
    draft.add(draft.prefix + "state_proj.weight", {10, 32});
    const std::string message = draft.failure();
    expect_contains(message, "this is a pi0 checkpoint");
    expect_contains(
        message, "plain weights instead of AdaRMS, action_time_mlp_in instead of time_mlp_in, a state_proj");
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;  // not a hundred missing tensors
  }
  CheckpointDraft fast;
  std::erase_if(fast.tensors, [](const auto& t) {
    return t.first.starts_with("paligemma_with_expert.gemma_expert") || t.first.starts_with("action_") ||
           t.first.starts_with("time_");
  });
  expect_contains(fast.failure(), "pi0-FAST or a bare PaliGemma");
}

TEST(Checkpoint, RefusesTheMemoryVariantByName) {
  CheckpointDraft draft(Layout::kLerobot);
  draft.add("model.proprio_history_proj.weight", {10, 32});
  expect_contains(draft.failure(), "tensor \"proprio_history_proj\": this is the memory variant of pi0.5");
}

TEST(Checkpoint, LerobotSpellings) {
  CheckpointDraft mapped(Layout::kLerobot);  // pi0's names for the time MLP, and its state projection
  for (const char* part : {"in.weight", "in.bias", "out.weight", "out.bias"})
    mapped.rename(std::string("model.time_mlp_") + part, std::string("model.action_time_mlp_") + part);
  mapped.add("model.state_proj.weight", {10, 32});
  mapped.add("model.state_proj.bias", {10});
  EXPECT_EQ(mapped.failure(), "");
  EXPECT_EQ(open_checkpoint(mapped.dir)->ignored.size(), 2u);

  CheckpointDraft bare;  // no prefix, but a lerobot config
  bare.config = CheckpointDraft(Layout::kLerobot).config;
  EXPECT_EQ(bare.failure(), "");
  EXPECT_EQ(open_checkpoint(bare.dir)->layout, Layout::kLerobot);

  CheckpointDraft both(Layout::kLerobot);
  both.add("time_mlp_in.bias", {10});
  expect_contains(both.failure(),
                  "tensor \"time_mlp_in.bias\": stored both with and without the prefix \"model.\"");

  CheckpointDraft openpi;  // what lerobot ignores is a surprise in openpi's layout
  openpi.add("state_proj.weight", {10, 32});
  expect_contains(openpi.failure(), "tensor \"state_proj.weight\": not part of a pi0.5 network");
}

TEST(Checkpoint, ServoflowLayoutHasAContract) {
  CheckpointDraft draft;
  draft.write();
  draft.write_text("contract.json", "{}");
  ASSERT_TRUE(open_checkpoint(draft.dir).ok());
  EXPECT_EQ(open_checkpoint(draft.dir)->layout, Layout::kServoflow);
}

TEST(Checkpoint, SaysWhatADirectoryWithoutWeightsIs) {
  const CheckpointDraft draft;
  const auto message = [&](const std::string& dir) { return open_checkpoint(dir).status().message(); };
  expect_contains(message(draft.dir), draft.dir + ": no such directory");
  draft.write_text("readme.txt", "x");
  expect_contains(message(draft.dir), "holds neither model.safetensors nor model.safetensors.index.json");
  expect_contains(message(draft.dir + "/readme.txt"), "is a file; pass the checkpoint directory");
  draft.write_text("adapter_config.json", "{}");
  expect_contains(message(draft.dir), "is a LoRA/PEFT adapter");
  std::filesystem::remove(draft.dir + "/adapter_config.json");
  draft.write_text("pretrained_model/model.safetensors", "x");
  expect_contains(message(draft.dir), "did you mean " + draft.dir + "/pretrained_model?");
  draft.write_text("params/manifest.ocdbt", "x");
  expect_contains(message(draft.dir), "is a JAX checkpoint");
  expect_contains(message(draft.dir + "/params"), "convert_jax_model_to_pytorch.py");
}

TEST(Checkpoint, RefusesDamagedWeightFiles) {
  const CheckpointDraft draft;
  draft.write();
  const std::string path = draft.dir + "/model.safetensors";
  const std::string whole = *read_text_file(path, 1 << 20);
  for (const std::size_t size :
       {std::size_t{0}, std::size_t{7}, std::size_t{100}, whole.size() / 2, whole.size() - 1}) {
    draft.write_text("model.safetensors", whole.substr(0, size));
    const std::string message = open_checkpoint(draft.dir).status().message();
    expect_contains(message, draft.dir + ": model.safetensors: ");
    expect_contains(message, "cut short?");
  }
  draft.write_text("model.safetensors", whole + "x");
  expect_contains(open_checkpoint(draft.dir).status().message(),
                  "1 bytes after the last tensor belong to none");
}

TEST(Inspection, TellsEverything) {
  const Inspection seen = inspect_checkpoint("tests/golden/lerobot-tiny");
  EXPECT_TRUE(seen.problems.empty());
  EXPECT_EQ(seen.layout, Layout::kLerobot);
  EXPECT_EQ(seen.sizes_from, "architecture block");
  EXPECT_EQ(seen.files, std::vector<std::string>{"model.safetensors"});
  EXPECT_EQ(seen.stored_tensors, 149u);
  EXPECT_EQ(seen.stored_bytes, 2506864u);
  ASSERT_EQ(seen.dtypes.size(), 1u);
  EXPECT_EQ(seen.dtypes[0].what, "F32");
  EXPECT_EQ(seen.dtypes[0].parameters, 520220u);
  EXPECT_EQ(seen.dtypes[0].bytes, 4 * 520220u);
  ASSERT_EQ(seen.components.size(), 6u);
  EXPECT_EQ(seen.components[0].what, "vision");
  EXPECT_EQ(seen.components[2].what, "token table");
  EXPECT_EQ(seen.components[2].parameters, 65536u);
  ASSERT_EQ(seen.ignored.size(), 2u);
  expect_contains(seen.ignored[0].reason, "output head");
  expect_contains(seen.ignored[1].reason, "second copy of the token table; model.paligemma_with_expert");
  EXPECT_EQ(seen.tokenizer, "tests/golden/lerobot-tiny/tokenizer.model");
}

TEST(Inspection, TellsWhatItCanOfABrokenCheckpoint) {
  CheckpointDraft draft;
  draft.config["action_dim"] = "x";
  draft.write();
  Inspection seen = inspect_checkpoint(draft.dir);
  EXPECT_EQ(seen.problems.size(), 1u);
  EXPECT_EQ(seen.layout, Layout::kOpenpi);
  EXPECT_FALSE(seen.architecture.has_value());
  EXPECT_EQ(seen.stored_tensors, draft.tensors.size());
  draft.config["action_dim"] = 3;
  draft.drop("time_mlp_in.bias");
  draft.write();
  seen = inspect_checkpoint(draft.dir);
  EXPECT_EQ(seen.problems.size(), 1u);
  EXPECT_TRUE(seen.architecture.has_value());
  EXPECT_EQ(seen.parameters, parameter_count(manifest(draft.architecture)) - 10);
  EXPECT_FALSE(inspect_checkpoint("/nonexistent").problems.empty());
}

class Tokenizer : public testing::Test {
 protected:
  Tokenizer() { ::unsetenv("SERVOFLOW_TOKENIZER"); }
  ~Tokenizer() override { ::unsetenv("SERVOFLOW_TOKENIZER"); }
};

TEST_F(Tokenizer, IsTakenFromTheFirstPlaceThatHasOne) {
  const CheckpointDraft draft;
  draft.write_text("elsewhere.model", "x");
  const auto find = [&](const std::string& named, const std::string& option) {
    const Result<std::string> found = find_tokenizer(draft.dir, named, option);
    return found.ok() ? found->substr(draft.dir.size()) : found.status().message();
  };
  const std::string nothing = find("", "");
  expect_contains(nothing, "no tokenizer found (looked for " + draft.dir + "/tokenizer.model, ");
  expect_contains(nothing, "paligemma_tokenizer.model");
  expect_contains(nothing, "--tokenizer");
  draft.write_text("tokenizer/tokenizer.json", "{}");
  expect_contains(find("", ""), "/tokenizer/tokenizer.json is of another kind");
  ::setenv("SERVOFLOW_TOKENIZER", (draft.dir + "/missing.model").c_str(), 1);
  expect_contains(find("", ""), "SERVOFLOW_TOKENIZER: " + draft.dir + "/missing.model: no such file");
  ::setenv("SERVOFLOW_TOKENIZER", (draft.dir + "/elsewhere.model").c_str(), 1);
  EXPECT_EQ(find("", ""), "/elsewhere.model");
  draft.write_text("tokenizer/tokenizer.model", "x");
  EXPECT_EQ(find("", ""), "/tokenizer/tokenizer.model");
  draft.write_text("tokenizer.model", "x");
  EXPECT_EQ(find("", ""), "/tokenizer.model");
  draft.write_text("named.model", "x");
  EXPECT_EQ(find("named.model", ""), "/named.model");
  EXPECT_EQ(find("absent.model", ""), "/tokenizer.model");
  EXPECT_EQ(find("../named.model", ""), "/tokenizer.model");  // never outside the directory
  EXPECT_EQ(find("named.model", draft.dir + "/elsewhere.model"), "/elsewhere.model");
  expect_contains(find("named.model", "/nonexistent"), "--tokenizer: /nonexistent: no such file");
}

}  // namespace
}  // namespace servoflow::weights
