// Recipes at load and quantized checkpoints on the whole (tiny) network: against the emulation, and against
// each other.
#include "weights/precision.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <random>
#include <set>

#include "core/file.h"
#include "core/json.h"
#include "core/safetensors.h"
#include "policy/network.h"
#include "quant/checkpoint.h"
#include "weights/checkpoint.h"
#include "weights/loader.h"
#include "weights/manifest.h"

namespace servoflow::policy {
namespace {

constexpr char kTiny[] = "tests/golden/openpi-tiny";

std::vector<std::string> dynamic_recipes() {
  return {"int8-w8a8",   "int8-w8a16", "fp8-w8a8",           "int4-g128-w4a16",
          "nvfp4-w4a16", "nvfp4-w4a8", "nvfp4-w4a4-dynamic", "mlp-int8"};
}

struct VisionTap : StageTap {
  bool wants(std::string_view stage) const override { return stage == "vision/0"; }
  void record(std::string_view, std::span<const float> of, const Shape&) override {
    values.assign(of.begin(), of.end());
  }
  std::vector<float> values;
};

struct Answer {
  std::vector<float> actions, vision;
  NetworkInfo info;
};

// One inference on made-up inputs; the actions, or the error.
Result<Answer> answer(const std::string& dir, const std::string& device, const std::string& precision,
                      int steps = 3) {
  auto checkpoint = weights::open_checkpoint(dir);
  if (!checkpoint.ok()) return checkpoint.status();
  auto network = Network::create(checkpoint->source, checkpoint->architecture,
                                 {.device = device, .precision = precision, .threads = 2, .max_pictures = 1});
  if (!network.ok()) return network.status();
  const weights::Architecture& a = checkpoint->architecture;
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform(-1, 1);
  stages::ModelInput input;
  std::vector<float> picture(static_cast<std::size_t>(a.vision.image * a.vision.image * 3));
  for (float& v : picture) v = uniform(random);
  input.pictures.push_back({0, picture});
  input.picture_count = 1;
  for (int i = 0; i < 12; ++i)
    input.tokens.push_back(static_cast<std::int32_t>(random() % static_cast<unsigned>(a.vocab)));
  std::vector<float> noise(static_cast<std::size_t>(a.horizon * a.action_dim));
  for (float& v : noise) v = normal(random);
  Answer out{std::vector<float>(noise.size()), {}, (*network)->info()};
  VisionTap tap;
  const NetworkRequest request{&input, noise, out.actions};
  const Status status = (*network)->run({&request, 1}, steps, nullptr, &tap);
  if (!status.ok()) return status;
  out.vision = std::move(tap.values);
  return out;
}

std::string failure(const std::string& dir, const std::string& device, const std::string& precision) {
  const Result<Answer> got = answer(dir, device, precision);
  return got.ok() ? "" : got.status().message();
}

double relative(const std::vector<float>& got, const std::vector<float>& want) {
  double error = 0, size = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    error += std::pow(static_cast<double>(got[i]) - want[i], 2);
    size += std::pow(static_cast<double>(want[i]), 2);
  }
  return std::sqrt(error / size);
}

// With float32 between products a kernel and its emulation differ by the order of sums. Where inputs are
// rounded, that moves a few codes by a whole step, and each moves others behind it: after a vision tower the
// two still agree far better than either does with float32, after all layers and steps they have become two
// samples of the same noise.
TEST(Precision, FormatsAmidFloat32RunAsTheirEmulation) {
  const std::string plan = testing::TempDir() + "/amid_fp32_" + std::to_string(::getpid()) + ".toml";
  const Answer exact = *answer(kTiny, "cpu", "fp32");
  for (const char* format : {"int8-w8a8", "fp8-w8a8", "nvfp4-w4a8", "int8-w8a16", "fp8-w8a16",
                             "int4-g128-w4a16", "nvfp4-w4a16", "mxfp4-w4a16"}) {
    ASSERT_TRUE(
        write_file_atomically(plan,
                              "precision_plan = 1\nname = \"amid\"\ndefault = \"fp32\"\n[[rules]]\nmatch = "
                              "\"*\"\nformat = \"" +
                                  std::string(format) + "\"\n")
            .ok());
    const Result<Answer> fast = answer(kTiny, "cpu", plan), emulated = answer(kTiny, "reference", plan);
    ASSERT_TRUE(fast.ok()) << fast.status().message();
    ASSERT_TRUE(emulated.ok()) << emulated.status().message();
    const double apart = relative(fast->actions, emulated->actions),
                 seen = relative(fast->vision, emulated->vision);
    const double rounding = relative(emulated->actions, exact.actions),
                 vision_rounding = relative(emulated->vision, exact.vision);
    std::printf(
        "  %-16s amid float32: actions %.2e from the emulation, that %.2e from fp32; vision %.2e, %.2e\n",
        format, apart, rounding, seen, vision_rounding);
    const bool inputs = quant::parse_format(format)->input.quantized();
    EXPECT_LT(apart, inputs ? 2 * rounding : 2e-5) << format;
    EXPECT_LT(seen, inputs ? 0.3 * vision_rounding : 2e-6) << format;
  }
  std::filesystem::remove(plan);
}

TEST(Precision, RecipesRunAsTheirEmulation) {
  const Answer exact = *answer(kTiny, "cpu", "fp32"), half = *answer(kTiny, "cpu", "bf16");
  const double bf16 = relative(half.actions, exact.actions);
  for (const std::string& recipe : dynamic_recipes()) {
    const Result<Answer> fast = answer(kTiny, "cpu", recipe), emulated = answer(kTiny, "reference", recipe);
    ASSERT_TRUE(fast.ok()) << fast.status().message();
    ASSERT_TRUE(emulated.ok()) << emulated.status().message();
    EXPECT_EQ(fast->info.precision, recipe);
    const double apart = relative(fast->actions, emulated->actions),
                 rounding = relative(emulated->actions, exact.actions);
    std::printf("  %-20s from its emulation %.5f, that from fp32 %.5f (bf16 %.5f)\n", recipe.c_str(), apart,
                rounding, bf16);
    // The kernels round what lies between products to bf16, as bf16 does; a value that bf16 moves across a
    // code's boundary moves by that code's whole step, so the rounding's own error is a second scale.
    EXPECT_LT(apart, 3 * bf16 + rounding) << recipe;
    EXPECT_GT(rounding, 0.3 * bf16) << recipe << ": nothing was rounded";
    EXPECT_LT(rounding, 0.6) << recipe;
  }
}

TEST(Precision, InfoSaysWhatComputesInWhat) {
  const NetworkInfo info = answer(kTiny, "cpu", "int8-w8a8")->info;
  std::map<std::string, int> layers;
  std::uint64_t bytes = 0;
  for (const ComponentPrecision& c : info.components) {
    EXPECT_EQ(c.kernel.empty(), c.precision == "bf16" || c.precision == "fp32")
        << c.component << " " << c.kernel;
    layers[c.component + " " + c.precision] += c.layers;
    bytes += c.weight_bytes;
  }
  EXPECT_EQ(layers.count("vision int8-w8a8"), 1u);
  EXPECT_EQ(layers.count("language model int8-w8a8"), 1u);
  EXPECT_EQ(layers.count("expert int8-w8a8"), 1u);
  EXPECT_EQ(layers["action and time projections fp32"], 4);
  EXPECT_LE(bytes, info.weight_bytes);
  EXPECT_LT(info.weight_bytes, answer(kTiny, "cpu", "bf16")->info.weight_bytes);
  EXPECT_LT(answer(kTiny, "cpu", "nvfp4-w4a16")->info.weight_bytes, info.weight_bytes);
  const NetworkInfo half = answer(kTiny, "cpu", "bf16")->info;
  for (const ComponentPrecision& c : half.components) EXPECT_EQ(c.kernel, "");
}

TEST(Precision, WhatCannotBeRunIsRefusedByName) {
  const auto says = [](const std::string& text, const std::string& part) {
    EXPECT_NE(text.find(part), std::string::npos) << "expected: " << part << "\nin: " << text;
  };
  const std::string unknown = failure(kTiny, "cpu", "int9");
  says(unknown, "\"int9\"");
  says(unknown, "int8-w8a8");
  says(failure(kTiny, "cpu", "fp8-w8a8-static"), "calibrated input scales");
  says(failure(kTiny, "cpu", "fp8-w8a8-static"), "servoflow quantize");
  const std::string plan = testing::TempDir() + "/plan_" + std::to_string(::getpid()) + ".toml";
  ASSERT_TRUE(write_file_atomically(plan,
                                    "precision_plan = 1\nname = \"odd\"\ndefault = \"bf16\"\n[[rules]]\n"
                                    "match = \"*vision*fc1\"\nformat = \"int8-w8a8\"\n[[rules]]\n"
                                    "match = \"nothing.of.the.kind\"\nformat = \"int8-w8a8\"\n")
                  .ok());
  says(failure(kTiny, "cpu", plan), "nothing.of.the.kind");
  ASSERT_TRUE(
      write_file_atomically(plan,
                            "precision_plan = 1\nname = \"shared scale\"\ndefault = \"bf16\"\n[[rules]]\n"
                            "match = \"*vision*fc1\"\nformat = \"fp8-channel/fp8-tensor\"\n")
          .ok());
  says(failure(kTiny, "cpu", plan), "no kernel for fp8-channel/fp8-tensor");
  std::filesystem::remove(plan);
}

// A quantized copy of the tiny checkpoint, its layers rounded as they are at load.
class QuantizedCopy {
 public:
  QuantizedCopy(const std::string& recipe, quant::Convention convention) { make(recipe, convention); }
  void make(const std::string& recipe, quant::Convention convention) {
    dir = testing::TempDir() + "/quantized_" + std::to_string(::getpid()) + "_" + recipe;
    std::filesystem::remove_all(dir);
    std::filesystem::copy(kTiny, dir, std::filesystem::copy_options::recursive);
    const weights::Checkpoint checkpoint = *weights::open_checkpoint(kTiny);
    const std::vector<quant::Linear> linears = weights::linear_layers(checkpoint.architecture);
    const std::vector<quant::LinearFormat> formats = *quant::load_plan(recipe)->resolve(linears);
    std::map<std::string, ops::HostMatrix> hosts;
    std::vector<weights::TensorData> data;
    for (const quant::Linear& linear : linears) {
      data.push_back(*checkpoint.source->get(linear.name + ".weight"));
      hosts[linear.name] = {.dtype = data.back().dtype,
                            .rows = static_cast<int>(linear.rows),
                            .cols = static_cast<int>(linear.cols),
                            .bytes = data.back().bytes,
                            .name = linear.name};
    }
    std::map<std::string, float> amax;
    for (const auto& set : quant::fused_sets(linears)) {
      std::vector<ops::HostMatrix> parts;
      for (const std::size_t i : set) parts.push_back(hosts[linears[i].name]);
      for (const std::size_t i : set) amax[linears[i].name] = *weights::shared_amax(parts);
    }
    std::vector<quant::StoredTensor> stored;
    std::set<std::string> replaced;
    for (std::size_t i = 0; i < linears.size(); ++i) {
      if (!formats[i].quantized()) continue;
      const std::string& name = linears[i].name;
      const float own = amax.contains(name) ? amax[name] : *weights::shared_amax({hosts[name]});
      const quant::QuantizedMatrix m = *weights::round_matrix(hosts[name], formats[i], own, 1);
      auto written = quant::write_linear(name, m, convention);
      ASSERT_TRUE(written.ok()) << written.status().message();
      for (quant::StoredTensor& t : *written) stored.push_back(std::move(t));
      replaced.insert(name + ".weight");
    }
    const SafetensorsFile file = *SafetensorsFile::open(std::string(kTiny) + "/model.safetensors");
    for (const SafeTensor& t : file.tensors())
      if (!replaced.contains(t.name))
        stored.push_back({t.name, t.dtype, t.shape, {t.bytes.begin(), t.bytes.end()}});
    tensors = std::move(stored);
    config = *read_json_file(dir + "/config.json", 1 << 20);
    const Json quantization = *quant::write_config(linears, formats, convention, "test");
    if (convention == quant::Convention::kModelOpt) {
      EXPECT_TRUE(write_file_atomically(dir + "/hf_quant_config.json", quantization.dump()).ok());
    } else {
      config["quantization_config"] = quantization;
    }
    write();
  }
  ~QuantizedCopy() { std::filesystem::remove_all(dir); }
  void write() const {
    std::vector<SafetensorsWriter::Entry> entries;
    for (const quant::StoredTensor& t : tensors) entries.push_back({t.name, t.dtype, t.shape});
    auto writer = SafetensorsWriter::create(dir + "/model.safetensors", entries, {});
    ASSERT_TRUE(writer.ok()) << writer.status().message();
    for (const quant::StoredTensor& t : tensors) ASSERT_TRUE((*writer)->write(t.bytes).ok());
    ASSERT_TRUE((*writer)->finish().ok());
    ASSERT_TRUE(write_file_atomically(dir + "/config.json", config.dump()).ok());
  }

  std::string dir;
  Json config;
  std::vector<quant::StoredTensor> tensors;
};

TEST(QuantizedCheckpoint, RunsToTheBitAsRoundingAtLoadDoes) {
  struct Row {
    const char* recipe;
    quant::Convention convention;
  };
  for (const auto& [recipe, convention] : {Row{"int8-w8a8", quant::Convention::kCompressedTensors},
                                           {"nvfp4-w4a16", quant::Convention::kCompressedTensors},
                                           {"int4-g128-w4a16", quant::Convention::kCompressedTensors},
                                           {"mlp-int8", quant::Convention::kCompressedTensors},
                                           {"fp8-w8a8", quant::Convention::kModelOpt}}) {
    const QuantizedCopy copy(recipe, convention);
    const Result<Answer> stored = answer(copy.dir, "cpu", "auto"), loaded = answer(kTiny, "cpu", recipe);
    ASSERT_TRUE(stored.ok()) << recipe << ": " << stored.status().message();
    ASSERT_TRUE(loaded.ok()) << recipe << ": " << loaded.status().message();
    EXPECT_EQ(stored->actions, loaded->actions) << recipe;
    EXPECT_EQ(stored->info.weight_bytes, loaded->info.weight_bytes);
    EXPECT_EQ(stored->info.parameters, loaded->info.parameters);
    EXPECT_NE(stored->info.precision, "bf16");
  }
}

TEST(QuantizedCheckpoint, IsDequantizedByName) {
  const QuantizedCopy copy("int8-w8a16", quant::Convention::kCompressedTensors);
  const Answer plain = *answer(copy.dir, "cpu", "fp32"), emulated = *answer(copy.dir, "reference", "auto");
  // Weights alone are rounded, so that dequantizing them is the emulation.
  EXPECT_LT(relative(plain.actions, emulated.actions), 2e-5);
  EXPECT_EQ(plain.info.precision, "fp32");
  bool said = false;
  for (const ComponentPrecision& c : plain.info.components)
    said = said || c.kernel == "dequantized from int8-w8a16";
  EXPECT_TRUE(said);
}

TEST(QuantizedCheckpoint, ContradictionsAreErrors) {
  QuantizedCopy copy("int8-w8a8", quant::Convention::kCompressedTensors);
  const auto says = [](const std::string& text, const std::string& part) {
    EXPECT_NE(text.find(part), std::string::npos) << "expected: " << part << "\nin: " << text;
  };
  says(failure(copy.dir, "cpu", "nvfp4-w4a16"), "quantized already (int8-w8a8)");
  const auto scale = std::find_if(copy.tensors.begin(), copy.tensors.end(), [](const quant::StoredTensor& t) {
    return t.name.ends_with("layers.0.mlp.gate_proj.weight_scale");
  });
  ASSERT_NE(scale, copy.tensors.end());
  const quant::StoredTensor kept = *scale;
  copy.tensors.erase(scale);
  copy.write();
  const std::string missing = failure(copy.dir, "cpu", "auto");
  says(missing, kept.name + "\": missing");
  says(missing, "quantization config");
  quant::StoredTensor twice = kept;
  twice.name += "_of_nothing";
  copy.tensors.push_back(kept);
  copy.tensors.push_back(twice);
  copy.write();
  says(failure(copy.dir, "cpu", "auto"), "weight_scale_of_nothing");
  copy.tensors.pop_back();
  copy.config["quantization_config"]["quant_method"] = "awq";
  copy.write();
  says(failure(copy.dir, "cpu", "auto"), "\"awq\" cannot be read");
}

}  // namespace
}  // namespace servoflow::policy
