#include <gtest/gtest.h>

#include "quant/checkpoint.h"

namespace servoflow::quant {
namespace {

Json json(const char* text) {
  Result<Json> parsed = parse_json(text, "test");
  EXPECT_TRUE(parsed.ok()) << parsed.status().message();
  return *parsed;
}

const char kNvfp4[] = R"({"quantization_config": {"version":"0.x","quant_method":"compressed-tensors",
 "format":"nvfp4-pack-quantized","quantization_status":"compressed","global_compression_ratio":null,
 "kv_cache_scheme":null,"ignore":["lm_head","re:.*vision_tower.*"],"sparsity_config":{},"transform_config":{},
 "config_groups":{"group_0":{"targets":["Linear"],"format":"nvfp4-pack-quantized","output_activations":null,
  "weights":{"num_bits":4,"type":"float","strategy":"tensor_group","group_size":16,"symmetric":true,"dynamic":false,
   "actorder":null,"block_structure":null,"scale_dtype":"torch.float8_e4m3fn","zp_dtype":null,
   "observer":"memoryless_minmax","observer_kwargs":{}},
  "input_activations":{"num_bits":4,"type":"float","strategy":"tensor_group","group_size":16,"symmetric":true,
   "dynamic":"local","observer":"static_minmax"}}}}})";

TEST(Config, ThePublishedExampleIsReadWhereverItStands) {
  const Json inner = json(kNvfp4)["quantization_config"];
  for (const Json& config : {json(kNvfp4), Json{{"text_config", {{"quantization_config", inner}}}},
                             Json{{"compression_config", inner}}}) {
    const auto read = find_quant_config(config, "config.json");
    ASSERT_TRUE(read.ok()) << read.status().message();
    ASSERT_TRUE(read->has_value());
    const QuantConfig& q = **read;
    EXPECT_EQ(name(q.group_of("model.layers.0.mlp.up_proj")->format), "nvfp4-w4a4");
    EXPECT_EQ(q.group_of("lm_head"), nullptr);
    EXPECT_EQ(q.group_of("paligemma.vision_tower.x"), nullptr);
  }
  EXPECT_FALSE(find_quant_config(json("{}"), "config.json")->has_value());
  EXPECT_FALSE(find_quant_config(json(R"({"quantization_config": null})"), "config.json")->has_value());
}

// Trap: exact names beat expressions, expressions beat classes, whatever the order in the file.
TEST(Config, ExactBeatsExpressionBeatsClass) {
  const char kArgs[] = R"("weights":{"num_bits":8,"type":"int","strategy":"channel"})";
  const std::string text = std::string(R"({"quant_method":"compressed-tensors","format":"mixed-precision",
    "config_groups":{"a":{"targets":["Linear"],"weights":{"num_bits":8,"type":"float","strategy":"channel"}},
    "b":{"targets":["re:.*mlp.*"],)") +
                           kArgs + R"(},
    "c":{"targets":["net.mlp.down"],"weights":{"num_bits":4,"type":"int","strategy":"group","group_size":128,
      "symmetric":false}}},"ignore":["re:.*frozen.*"]})";
  const Result<QuantConfig> config = parse_compressed_tensors(json(text.c_str()), "c");
  ASSERT_TRUE(config.ok()) << config.status().message();
  EXPECT_EQ(name(config->group_of("net.mlp.down")->format), "int4-g128-w4a16");
  EXPECT_EQ(name(config->group_of("net.mlp.up")->format), "int8-w8a16");
  EXPECT_EQ(name(config->group_of("net.attn.q")->format), "fp8-w8a16");
  EXPECT_EQ(config->group_of("net.frozen.mlp.down"), nullptr);
  // Files of LeRobot prefix every name.
  QuantConfig prefixed = *config;
  prefixed.groups[2].targets = {"model.net.mlp.down"};
  EXPECT_EQ(name(prefixed.group_of("net.mlp.down")->format), "int4-g128-w4a16");
}

TEST(Config, RefusedDocumentsNameTheField) {
  struct Case {
    const char* pointer;
    const char* value;
    const char* part;
  };
  for (const Case& c : {
           Case{"/format", "\"marlin-24\"", "format"},
           Case{"/format", "\"pack-quantized\"",
                "format"},  // overruled by the group, which is fine: see below
           Case{"/quantization_status", "\"frozen\"", "quantization_status"},
           Case{"/kv_cache_scheme", "{\"num_bits\": 8}", "kv_cache_scheme"},
           Case{"/sparsity_config", "{\"format\": \"sparse-24-bitmask\"}", "sparsity_config"},
           Case{"/transform_config", "{\"config_groups\": {}}", "transform_config"},
           Case{"/ignore", "[3]", "ignore"},
           Case{"/ignore", "[\"re:(\"]", "ignore"},
           Case{"/config_groups", "{}", "config_groups"},
           Case{"/config_groups", "[]", "config_groups"},
           Case{"/config_groups/group_0", "[\"Linear\"]", "group_0"},
           Case{"/config_groups/group_0/targets", "\"Linear\"", "targets"},
           Case{"/config_groups/group_0/targets", "[\"re:[\"]", "targets"},
           Case{"/config_groups/group_0/weights", "null", "weights"},
           Case{"/config_groups/group_0/weights/num_bits", "3", "weights"},
           Case{"/config_groups/group_0/weights/num_bits", "99999999999999999999", "num_bits"},
           Case{"/config_groups/group_0/weights/group_size", "8", "group_0"},
           Case{"/config_groups/group_0/weights/type", "\"nf\"", "type"},
           Case{"/config_groups/group_0/weights/strategy", "7", "weights"},
           Case{"/config_groups/group_0/weights/strategy", "\"attn_head\"", "weights"},
           Case{"/config_groups/group_0/weights/dynamic", "true", "weights"},
           Case{"/config_groups/group_0/weights/block_structure", "[128, 64]", "block_structure"},
           Case{"/config_groups/group_0/weights/actorder", "\"sideways\"", "actorder"},
           Case{"/config_groups/group_0/weights/surprise", "1", "surprise"},
           Case{"/config_groups/group_0/output_activations", "{}", "output_activations"},
           Case{"/config_groups/group_0/input_activations/dynamic", "false", "input_activations"},
           Case{"/config_groups/group_0/format", "\"int-quantized\"", "format"},
           Case{"/quant_method", "\"gptq\"", "gptq"},
       }) {
    Json config = json(kNvfp4);
    config["quantization_config"][Json::json_pointer(c.pointer)] = json(c.value);
    const auto read = find_quant_config(config, "config.json");
    if (std::string(c.value) == "\"pack-quantized\"") {
      EXPECT_TRUE(read.ok()) << "the group's own format decides";
      continue;
    }
    ASSERT_FALSE(read.ok()) << c.pointer << " " << c.value;
    EXPECT_NE(read.status().message().find(c.part), std::string::npos) << read.status().message();
    EXPECT_NE(read.status().message().find("config.json"), std::string::npos);
  }
  for (const char* text : {"[]", "3", R"({"quantization_config": 3})", R"({"quantization_config": {}})"})
    EXPECT_FALSE(find_quant_config(json(text), "config.json").ok()) << text;
}

// Presets of the library's quant_scheme.py.
TEST(Config, PresetsMeanTheirFormats) {
  const auto format = [](const char* weights, const char* inputs) {
    const std::string text = std::string(R"({"config_groups":{"g":{"targets":["Linear"],"weights":)") +
                             weights + R"(,"input_activations":)" + inputs + "}}}";
    const Result<QuantConfig> config = parse_compressed_tensors(json(text.c_str()), "c");
    EXPECT_TRUE(config.ok()) << config.status().message();
    return config.ok() ? name(config->groups[0].format) + " " + config->groups[0].layout : "";
  };
  EXPECT_EQ(format(R"({"num_bits":8,"type":"float","strategy":"tensor"})",
                   R"({"num_bits":8,"type":"float","strategy":"tensor"})"),
            "fp8-w8a8-static float-quantized");
  EXPECT_EQ(format(R"({"num_bits":8,"type":"float","strategy":"channel"})",
                   R"({"num_bits":8,"type":"float","strategy":"token","dynamic":true})"),
            "fp8-w8a8 float-quantized");
  EXPECT_EQ(format(R"({"num_bits":8,"type":"int","strategy":"channel"})",
                   R"({"num_bits":8,"type":"int","strategy":"token","dynamic":true})"),
            "int8-w8a8 int-quantized");
  EXPECT_EQ(format(R"({"num_bits":8,"type":"float","strategy":"block","block_structure":[128,128]})",
                   R"({"num_bits":8,"type":"float","strategy":"group","group_size":128,"dynamic":true})"),
            "fp8-block float-quantized");
  EXPECT_EQ(format(R"({"num_bits":4,"type":"int","group_size":128,"actorder":"weight"})", "null"),
            "int4-g128-sym-w4a16 pack-quantized");
  EXPECT_EQ(
      format(
          R"({"num_bits":4,"type":"float","strategy":"group","group_size":32,"scale_dtype":"torch.uint8"})",
          "null"),
      "mxfp4-w4a16 mxfp4-pack-quantized");
  // NVFP4 weights with FP8 inputs have no preset, but are sayable.
  EXPECT_EQ(format(R"({"num_bits":4,"type":"float","strategy":"tensor_group","group_size":16})",
                   R"({"num_bits":8,"type":"float","strategy":"token","dynamic":true})"),
            "nvfp4-w4a8 nvfp4-pack-quantized");
}

TEST(Config, ModelOptDocumentsAreReadInBothPlaces) {
  const Result<QuantConfig> one = parse_modelopt(
      json(
          R"({"producer":{"name":"modelopt","version":"0.47"},"quantization":{"quant_algo":"NVFP4","kv_cache_quant_algo":
      null,"group_size":16,"exclude_modules":["lm_head","model.vision*"]}})"),
      "hf_quant_config.json");
  ASSERT_TRUE(one.ok()) << one.status().message();
  EXPECT_EQ(name(one->group_of("layers.0.mlp.up")->format), "nvfp4-w4a4");
  // Trap: wildcards are trailing *, not "re:".
  EXPECT_EQ(one->group_of("vision_tower.x"), nullptr);
  EXPECT_EQ(one->group_of("model.vision_tower.x"), nullptr);
  EXPECT_EQ(one->group_of("lm_head"), nullptr);

  const auto inside = find_quant_config(
      json(R"({"quantization_config":{"quant_method":"modelopt","quant_algo":"W4A16_AWQ","ignore":["lm_head"],
      "config_groups":{"group_0":{"weights":{"group_size":64},"targets":["Linear"]}},"producer":{"name":"modelopt"}}})"),
      "config.json");
  ASSERT_TRUE(inside.ok()) << inside.status().message();
  EXPECT_EQ(name((*inside)->group_of("a")->format), "int4-g64-sf32/none");

  const Result<QuantConfig> mixed =
      parse_modelopt(json(R"({"quantization":{"quant_algo":"MIXED_PRECISION","quantized_layers":{
      "a":{"quant_algo":"FP8"},"b":{"quant_algo":"NVFP4","group_size":16},"c":{"quant_algo":"FP8"}}}})"),
                     "q");
  ASSERT_TRUE(mixed.ok()) << mixed.status().message();
  EXPECT_EQ(mixed->groups.size(), 2u);
  EXPECT_EQ(name(mixed->group_of("c")->format), "fp8-w8a8-static");
  EXPECT_EQ(mixed->group_of("d"), nullptr);

  for (const char* bad :
       {R"({})", R"({"quantization":{"quant_algo":"NVFP4_SVD"}})", R"({"quantization":{"quant_algo":7}})",
        R"({"quantization":{"quant_algo":"NVFP4","group_size":32}})", R"({"quantization":[]})",
        R"({"quantization":{"quant_algo":"FP8","kv_cache_quant_algo":"FP8"}})",
        R"({"quantization":{"quant_algo":"MIXED_PRECISION"}})",
        R"({"quantization":{"quant_algo":"MIXED_PRECISION","quantized_layers":{"a":{"quant_algo":"X"}}}})",
        R"({"quantization":{"quant_algo":"FP8","exclude_modules":["re:x"]}})"})
    EXPECT_FALSE(parse_modelopt(json(bad), "q").ok()) << bad;
}

TEST(Config, WhatIsWrittenSaysTheSameFormats) {
  const std::vector<Linear> linears = {{"a.q", 8, 64}, {"a.k", 8, 64}, {"b.up", 8, 64}, {"lm_head", 8, 64}};
  struct Case {
    Convention convention;
    std::vector<const char*> formats;
  };
  for (const Case& c :
       {Case{Convention::kCompressedTensors, {"int8-w8a8", "int8-w8a8", "nvfp4-w4a4", "bf16"}},
        Case{Convention::kCompressedTensors, {"mxfp8-w8a8", "mxfp8-w8a8", "mxfp8-w8a8", "bf16"}},
        Case{Convention::kCompressedTensors, {"fp8-block", "mxfp4-w4a4", "int4-g128-w4a16", "bf16"}},
        Case{Convention::kCompressedTensors,
             {"int8-channel/int8-tensor-static-asym", "nvfp4-w4a8", "nvfp4-w4a4-dynamic", "bf16"}},
        Case{Convention::kModelOpt, {"nvfp4-w4a4", "nvfp4-w4a4", "nvfp4-w4a4", "bf16"}},
        Case{Convention::kModelOpt, {"fp8-w8a8", "int4-g128-sf32/none", "nvfp4-w4a8-static", "bf16"}}}) {
    std::vector<LinearFormat> formats;
    for (const char* text : c.formats) formats.push_back(*parse_format(text));
    const Result<Json> document = write_config(linears, formats, c.convention, "1.0");
    ASSERT_TRUE(document.ok()) << document.status().message();
    std::vector<Json> places = {*document};
    if (c.convention == Convention::kModelOpt) places.push_back(modelopt_config_json(*document));
    for (const Json& place : places) {
      const Result<QuantConfig> back = c.convention == Convention::kModelOpt
                                           ? parse_modelopt(place, "w")
                                           : parse_compressed_tensors(place, "w");
      ASSERT_TRUE(back.ok()) << back.status().message() << place.dump(1);
      for (std::size_t i = 0; i < linears.size(); ++i) {
        const ConfigGroup* group = back->group_of(linears[i].name);
        EXPECT_EQ(group == nullptr ? "bf16" : name(group->format), c.formats[i]) << linears[i].name;
      }
    }
  }
}

TEST(Config, WhatCannotBeWrittenIsRefused) {
  const std::vector<Linear> linears = {{"a", 8, 64}};
  const auto refused = [&](const char* format, Convention convention) {
    const std::vector<LinearFormat> formats = {*parse_format(format)};
    EXPECT_FALSE(write_config(linears, formats, convention, "1").ok()) << format;
  };
  refused("bf16", Convention::kCompressedTensors);
  refused("bf16", Convention::kModelOpt);
  refused("fp8e5m2-channel/none", Convention::kCompressedTensors);
  refused("int4-g128-w4a16", Convention::kModelOpt);
  EXPECT_FALSE(write_config(linears, {}, Convention::kModelOpt, "1").ok());
  const std::vector<LinearFormat> nvfp4 = {*parse_format("nvfp4-w4a4")};
  EXPECT_FALSE(write_config(linears, nvfp4, Convention::kCompressedTensors, "1", {"a"}).ok());
  const Result<Json> awq = write_config(linears, nvfp4, Convention::kModelOpt, "1", {"a"});
  ASSERT_TRUE(awq.ok());
  EXPECT_EQ((*awq)["quantization"]["quant_algo"], "NVFP4_AWQ");
}

}  // namespace
}  // namespace servoflow::quant
