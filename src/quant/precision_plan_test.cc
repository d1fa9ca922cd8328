#include "quant/precision_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>

#include "quant/patterns.h"

namespace servoflow::quant {
namespace {

constexpr char kLanguage[] = "paligemma_with_expert.paligemma.model.language_model.layers.";
constexpr char kExpert[] = "paligemma_with_expert.gemma_expert.model.layers.";

std::vector<Linear> network() {
  std::vector<Linear> linears;
  for (const char* base : {kLanguage, kExpert})
    for (int i = 0; i < 2; ++i) {
      const std::string layer = base + std::to_string(i) + ".";
      for (const char* part : {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                               "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"})
        linears.push_back({layer + part, 64, 64});
    }
  linears.push_back({std::string(kExpert) + "0.input_layernorm.dense", 192, 64});
  linears.push_back({"action_in_proj", 64, 32});
  linears.push_back({"time_mlp_in", 64, 64});
  return linears;
}

PrecisionPlan plan_of(std::vector<std::pair<std::string, std::string>> rules) {
  PrecisionPlan plan{.name = "test"};
  for (const auto& [match, format] : rules) plan.rules.push_back({match, *parse_format(format)});
  return plan;
}

std::string format_of(const std::vector<LinearFormat>& formats, const std::string& name) {
  const std::vector<Linear> linears = network();
  const auto at =
      std::find_if(linears.begin(), linears.end(), [&](const Linear& l) { return l.name == name; });
  EXPECT_NE(at, linears.end()) << name;
  return quant::name(formats[static_cast<std::size_t>(at - linears.begin())]);
}

TEST(Plan, AllRecipesResolveOnANetwork) {
  const std::vector<std::string> names = builtin_plans();
  for (const char* expected :
       {"fp8-w8a8", "int8-w8a8", "int8-w8a16", "int4-g128-w4a16", "nvfp4-w4a16", "nvfp4-w4a8", "nvfp4-w4a4",
        "mlp-nvfp4", "mlp-int4", "mlp-int8", "int8-w8a8-static"})
    EXPECT_NE(std::find(names.begin(), names.end(), expected), names.end()) << expected;
  for (const std::string& name : names) {
    const Result<PrecisionPlan> plan = load_plan(name);
    ASSERT_TRUE(plan.ok()) << plan.status().message();
    EXPECT_EQ(plan->name, name);
    const Result<std::vector<LinearFormat>> formats = plan->resolve(network());
    ASSERT_TRUE(formats.ok()) << formats.status().message();
    EXPECT_TRUE(
        std::any_of(formats->begin(), formats->end(), [](const LinearFormat& f) { return f.quantized(); }));
    // What carries little and matters much stays.
    for (const char* kept : {"action_in_proj", "time_mlp_in"})
      EXPECT_EQ(format_of(*formats, kept), "bf16") << name;
    EXPECT_EQ(format_of(*formats, std::string(kExpert) + "0.input_layernorm.dense"), "bf16") << name;
  }
  const auto mixed = load_plan("mlp-nvfp4")->resolve(network());
  EXPECT_EQ(format_of(*mixed, std::string(kLanguage) + "1.mlp.down_proj"), "nvfp4-w4a16");
  EXPECT_EQ(format_of(*mixed, std::string(kLanguage) + "1.self_attn.q_proj"), "bf16");
  EXPECT_EQ(format_of(*mixed, std::string(kExpert) + "1.mlp.down_proj"), "bf16");
}

TEST(Plan, NamesBeatExpressionsBeatGlobs) {
  const std::string down = std::string(kLanguage) + "0.mlp.down_proj";
  const auto ok =
      plan_of({{"*", "int8-w8a16"}, {"re:.*mlp\\.down_proj", "nvfp4-w4a16"}, {down, "int4-g128-w4a16"}})
          .resolve(network());
  ASSERT_TRUE(ok.ok()) << ok.status().message();
  EXPECT_EQ(format_of(*ok, down), "int4-g128-w4a16");
  EXPECT_EQ(format_of(*ok, std::string(kLanguage) + "1.mlp.down_proj"), "nvfp4-w4a16");
  EXPECT_EQ(format_of(*ok, std::string(kLanguage) + "1.self_attn.o_proj"), "int8-w8a16");
}

TEST(Plan, ProtectedLayersNeedTheirWholeName) {
  const auto formats = plan_of({{"action_in_proj", "int8-w8a16"}, {"*", "nvfp4-w4a16"}}).resolve(network());
  ASSERT_TRUE(formats.ok()) << formats.status().message();
  EXPECT_EQ(format_of(*formats, "action_in_proj"), "int8-w8a16");
  EXPECT_FALSE(plan_of({{"*time_mlp*", "int8-w8a16"}}).resolve(network()).ok());
  for (const char* name : {"action_out_proj", "x.lm_head", "x.embed_tokens",
                           "a.post_attention_layernorm.dense", "m.norm.dense", "v.patch_embedding"})
    EXPECT_TRUE(is_protected(name)) << name;
  for (const char* name : {"a.q_proj", "m.mlp.fc1", "p.multi_modal_projector.linear"})
    EXPECT_FALSE(is_protected(name)) << name;
}

TEST(Plan, AllProblemsAreToldAtOnce) {
  const auto formats = plan_of({{std::string(kLanguage) + "0.mlp.gate_proj", "nvfp4-w4a16"},
                                {"no.such.layer", "int8-w8a16"},
                                {"action_in_proj.weight", "int8-w8a16"}})
                           .resolve(network());
  ASSERT_FALSE(formats.ok());
  const std::string& message = formats.status().message();
  EXPECT_NE(message.find("one product"), std::string::npos) << message;
  EXPECT_NE(message.find("no.such.layer"), std::string::npos) << message;
  EXPECT_NE(message.find("without \".weight\""), std::string::npos) << message;
}

TEST(Plan, FusedSetsAreThoseOfAttentionAndMlp) {
  const auto sets = fused_sets(network());
  EXPECT_EQ(sets.size(), 8u);
  EXPECT_EQ(sets[0], (std::vector<std::size_t>{0, 1, 2}));
  EXPECT_EQ(sets[1], (std::vector<std::size_t>{4, 5}));
}

TEST(Plan, JsonComesBackAndIsCanonical) {
  PrecisionPlan plan = plan_of({{"*", "int8-w8a8"}, {"re:a.*", "int8-g64-asym/int8-token"}});
  plan.provenance = {{"made by", "test"}, {"weights", "abc"}};
  const Result<PrecisionPlan> back = plan_from_json(to_json(plan), "plan.json");
  ASSERT_TRUE(back.ok()) << back.status().message();
  EXPECT_EQ(*back, plan);
  EXPECT_EQ(canonical_text(*back), canonical_text(plan));
  EXPECT_EQ(canonical_text(PrecisionPlan{.name = "x"}),
            R"({"default":"bf16","name":"x","precision_plan":1,"rules":[]})");
}

TEST(Plan, BrokenFilesAreRefusedWithAllTheirProblems) {
  const auto message = [](const char* toml) {
    const Result<PrecisionPlan> plan = plan_from_toml(toml, "p.toml");
    EXPECT_FALSE(plan.ok()) << toml;
    return plan.ok() ? std::string() : plan.status().message();
  };
  const std::string all = message(
      "precision_plan = 1\nname = \"x\"\nextra = 3\n[[rules]]\nmatch = \"re:(\"\nformat = "
      "\"nope\"\n[[rules]]\n"
      "format = \"bf16\"\nmatch = \"\"\n");
  for (const char* part : {"extra", "rules[0].match", "rules[0].format", "rules[1].match", "nvfp4-w4a16"})
    EXPECT_NE(all.find(part), std::string::npos) << part << " in " << all;
  EXPECT_NE(message("name = \"x\"").find("precision_plan"), std::string::npos);
  EXPECT_NE(message("precision_plan = 2\nname = \"x\"").find("between 1 and 1"), std::string::npos);
  message("precision_plan = 1\nname = \"x\"\ndefault = \"int8-w8a8\"");
  message("precision_plan = 1\nname = \"x\"\nrules = 3");
  message("not toml [");
  EXPECT_NE(load_plan("unknown").status().message().find("mlp-nvfp4"), std::string::npos);
  EXPECT_FALSE(load_plan("/nonexistent/plan.toml").ok());
}

TEST(Patterns, GlobsAndExpressions) {
  EXPECT_TRUE(glob_matches("a*c", "abc"));
  EXPECT_TRUE(glob_matches("*", ""));
  EXPECT_TRUE(glob_matches("*b*b*", "abab"));
  EXPECT_FALSE(glob_matches("a*c", "abcd"));
  EXPECT_FALSE(glob_matches("", "a"));
  EXPECT_TRUE(glob_matches("a**b*", "ab"));
  EXPECT_TRUE(glob_matches("*layers.1.*proj", "x.layers.1.q_proj"));
  EXPECT_FALSE(glob_matches("*layers.1.*proj", "x.layers.11.q_proj.bias"));
  const auto matches = [](const char* pattern, const char* name) {
    return NamePattern::compile(pattern, false)->matches(name);
  };
  EXPECT_TRUE(matches("re:.*mlp.*", "a.mlp.b"));
  EXPECT_TRUE(matches("re:a", "abc")) << "from the start, not to the end, as Python's re.match";
  EXPECT_FALSE(matches("re:b", "abc"));
  EXPECT_TRUE(matches("re:.*layers\\.(0|1)\\..*", "model.layers.1.x"));
  EXPECT_FALSE(matches("a*", "abc")) << "no globs unless asked for";
  EXPECT_FALSE(NamePattern::compile("re:[", false).ok());
  EXPECT_FALSE(NamePattern::compile("re:(a)\\1", false).ok());
  EXPECT_FALSE(NamePattern::compile("re:" + std::string(1000, 'a'), false).ok());
  EXPECT_FALSE(NamePattern::compile("", true).ok());
}

// Patterns that make backtracking matchers exponential.
TEST(Patterns, HostilePatternsCostLittle) {
  const auto start = std::chrono::steady_clock::now();
  const std::string name(200, 'a');
  for (const char* pattern : {"re:(a*)*b", "re:(a|a)*b", "re:(a|aa)+$b", "re:(.*)(.*)(.*)(.*)(.*)b"}) {
    const Result<NamePattern> compiled = NamePattern::compile(pattern, false);
    if (!compiled.ok()) continue;
    EXPECT_FALSE(compiled->matches(name));
  }
  EXPECT_FALSE(glob_matches("*a*a*a*a*a*a*a*a*b", name));
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20));
}

}  // namespace
}  // namespace servoflow::quant
