// --clip: the calibrator clips the layers that are named, and no other.
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <functional>

#include "core/file.h"
#include "core/safetensors.h"
#include "toolkit/calibrate.h"
#include "toolkit/compare.h"
#include "toolkit/linears.h"
#include "toolkit/quantize.h"
#include "weights/checkpoint.h"

namespace servoflow::toolkit {
namespace {

namespace fs = std::filesystem;
constexpr char kTiny[] = "tests/golden/openpi-tiny";
constexpr char kPrefix[] = "*language_model*down_proj";
constexpr char kExpert[] = "*gemma_expert*down_proj";
constexpr int kChannel = 80;  // of 160 (96 in the expert): where the outliers are

// The tiny checkpoint with one channel of every down projection's inputs 64 times as large and the weights
// that it meets as much smaller: in float32 the same network. INT8 inputs with one scale for the layer lose
// the other channels; clipped ones lose this one, as the network "without" it does.
class Clip : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    shared_ = fs::temp_directory_path() / ("servoflow-clip-" + std::to_string(::getpid()));
    fs::create_directories(shared_);
    const weights::Checkpoint tiny = *weights::open_checkpoint(kTiny);
    EditedSource planted(tiny.source);
    ASSERT_TRUE(
        plant_outliers(tiny.architecture, {.up_down = true, .v_o = false, .stride = 2 * kChannel}, planted)
            .ok());
    write("planted", planted);
    EditedSource without(tiny.source);
    for (const quant::Linear& l : linear_layers(tiny.architecture)) {
      if (!l.name.ends_with("down_proj")) continue;
      std::vector<float> w = *EditedSource(tiny.source).values(l.name + ".weight");
      for (std::int64_t r = 0; r < l.rows; ++r) w[static_cast<std::size_t>(r * l.cols + kChannel)] = 0;
      without.replace(l.name + ".weight", std::move(w));
    }
    write("without", without);
    ASSERT_TRUE(write_file_atomically(file("plan.toml"),
                                      "precision_plan = 1\nname = \"down\"\ndefault = \"bf16\"\n[[rules]]\n"
                                      "match = \"*down_proj\"\nformat = \"int8-w8a8-static\"\n")
                    .ok());
    const auto calibrated = calibrate(file("planted"), {.out = file("stats"), .limit = 4});
    ASSERT_TRUE(calibrated.ok()) << calibrated.status().message();
  }
  static void TearDownTestSuite() { fs::remove_all(shared_); }

  // The tiny checkpoint's tensors as `source` has them, in a directory of its own.
  static void write(const std::string& name, const EditedSource& source) {
    fs::copy(kTiny, file(name), fs::copy_options::recursive);
    const SafetensorsFile from = *SafetensorsFile::open(std::string(kTiny) + "/model.safetensors");
    std::vector<SafetensorsWriter::Entry> entries;
    for (const SafeTensor& t : from.tensors()) entries.push_back({t.name, DType::kF32, t.shape});
    auto writer = SafetensorsWriter::create(file(name) + "/model.safetensors", entries, from.metadata());
    ASSERT_TRUE(writer.ok()) << writer.status().message();
    for (const SafeTensor& t : from.tensors()) {
      ASSERT_EQ(t.dtype, DType::kF32) << t.name;
      if (!source.edits(t.name)) {
        ASSERT_TRUE((*writer)->write(t.bytes).ok());
        continue;
      }
      const std::vector<float> values = *source.values(t.name);
      ASSERT_TRUE((*writer)->write(std::as_bytes(std::span(values))).ok());
    }
    ASSERT_TRUE((*writer)->finish().ok());
  }

  static std::string file(const std::string& name) { return (shared_ / name).string(); }
  static QuantizeOptions options(const std::string& out) {
    return {.checkpoint = file("planted"),
            .out = file(out),
            .recipe = file("plan.toml"),
            .statistics = file("stats"),
            .smoothing = Smoothing::kNone};
  }
  static QuantizeOptions clipping(const std::string& out, std::vector<std::string> clip) {
    QuantizeOptions o = options(out);
    o.calibrator = {quant::Calibrator::kPercentile, 0.995};  // one channel of 96 is a share of 0.0104
    o.clip = std::move(clip);
    return o;
  }
  static QuantizeReport made(const QuantizeOptions& options) {
    Result<QuantizeReport> r = quantize_checkpoint(options);
    EXPECT_TRUE(r.ok()) << r.status().message();
    return r.ok() ? std::move(*r) : QuantizeReport{};
  }
  // How far the quantized checkpoint's velocities are from those of the float one.
  static double distance(const std::string& out) {
    const auto r = compare({.a = {file("planted"), "cpu", "fp32"},
                            .b = {file(out), "cpu", "auto"},
                            .cases = file("planted") + "/cases",
                            .layers = false,
                            .limit = 4});
    EXPECT_TRUE(r.ok()) << r.status().message();
    return r.ok() ? 1 - r->metrics.at("velocity.cosine.all") : 0;
  }
  // A quantized checkpoint's tensors of some layers.
  static std::map<std::string, std::string> bytes_of(const std::string& out, const std::string& part) {
    std::map<std::string, std::string> all;
    const SafetensorsFile f = *SafetensorsFile::open(file(out) + "/model.safetensors");
    for (const SafeTensor& t : f.tensors())
      if (t.name.find(part) != std::string::npos)
        all[t.name].assign(reinterpret_cast<const char*>(t.bytes.data()), t.bytes.size());
    return all;
  }
  static fs::path shared_;
};
fs::path Clip::shared_;

TEST_F(Clip, RecoversWhatOutliersTakeFromInt8InputsAndTouchesNoOtherLayer) {
  const QuantizeReport whole = made(options("whole")), both = made(clipping("both", {kPrefix, kExpert})),
                       all = made(clipping("all", {})), prefix = made(clipping("prefix", {kPrefix}));
  const double lost = distance("whole"), clipped = distance("both"), without = distance("without");
  std::printf(
      "1 - cosine of velocities: whole range %.2e, clipped %.2e, without the outliers' channel %.2e\n", lost,
      clipped, without);
  EXPECT_GT(lost, 4 * clipped);
  EXPECT_LT(clipped, without);
  EXPECT_GT(clipped, 0) << "nothing was rounded";

  // Both globs are all layers there are, so that naming them is naming none.
  EXPECT_EQ(bytes_of("both", ""), bytes_of("all", ""));
  // One of them leaves the other's layers to the bit, and everything that is no input scale.
  EXPECT_EQ(bytes_of("prefix", "gemma_expert"), bytes_of("whole", "gemma_expert"));
  EXPECT_EQ(bytes_of("prefix", "language_model"), bytes_of("both", "language_model"));
  EXPECT_NE(bytes_of("prefix", "language_model"), bytes_of("whole", "language_model"));
  const auto a = bytes_of("prefix", ""), b = bytes_of("whole", "");
  for (const auto& [name, bytes] : a)
    EXPECT_TRUE(name.ends_with("down_proj.input_scale") || bytes == b.at(name)) << name;

  ASSERT_EQ(prefix.layers.size(), whole.layers.size());
  int clipped_layers = 0;
  for (std::size_t i = 0; i < prefix.layers.size(); ++i) {
    const LayerReport &one = prefix.layers[i], &other = whole.layers[i];
    ASSERT_EQ(one.name, other.name);
    EXPECT_FALSE(other.input_clip);
    EXPECT_FALSE(one.input_clip && one.name.find("gemma_expert") != std::string::npos) << one.name;
    if (!one.input_clip) {
      EXPECT_EQ(*one.input_scale, *other.input_scale) << one.name;
      continue;
    }
    ++clipped_layers;
    EXPECT_LT(*one.input_scale, *other.input_scale / 4) << one.name;
    EXPECT_FLOAT_EQ(*one.input_scale, *one.input_clip / 127) << one.name;
  }
  // All but the last, which the network never computes.
  EXPECT_EQ(clipped_layers, weights::open_checkpoint(kTiny)->architecture.prefix.depth - 1);
  const Json json = quantize_to_json(prefix);
  EXPECT_EQ(json["clip"], Json::array({kPrefix}));
  EXPECT_EQ(json["calibrator"], "percentile");
  EXPECT_NE(
      quantize_text(prefix).find("inputs of 3 layers are clipped below their largest value, by percentile"),
      std::string::npos)
      << quantize_text(prefix);
}

// q, k and v read one input and are one product: they have one scale, whichever of them is named.
TEST_F(Clip, LayersOfOneInputKeepOneScale) {
  QuantizeOptions o = clipping("qkv", {"*gemma_expert*layers.1.*k_proj"});
  o.recipe = "fp8-w8a8-static";
  std::map<std::string, float> scales;
  int clipped = 0;
  for (const LayerReport& l : made(o).layers) {
    clipped += l.input_clip.has_value();
    if (l.name.find("gemma_expert.model.layers.1.self_attn") != std::string::npos)
      scales[l.name.substr(l.name.rfind('.') + 1)] = l.input_clip.value_or(0);
  }
  EXPECT_EQ(clipped, 3);
  EXPECT_GT(scales["q_proj"], 0);
  EXPECT_EQ(scales["q_proj"], scales["k_proj"]);
  EXPECT_EQ(scales["v_proj"], scales["k_proj"]);
  EXPECT_EQ(scales["o_proj"], 0);
  EXPECT_TRUE(weights::open_checkpoint(file("qkv")).ok());
  EXPECT_LT(distance("qkv"), 0.1) << "and it runs";
}

TEST_F(Clip, WhatCannotBeClippedIsAnError) {
  const auto fails = [&](const std::string& what, const std::function<void(QuantizeOptions&)>& change) {
    QuantizeOptions o = clipping("never", {kPrefix});
    change(o);
    const auto r = quantize_checkpoint(o);
    ASSERT_FALSE(r.ok()) << what;
    EXPECT_NE(r.status().message().find(what), std::string::npos) << r.status().message();
    EXPECT_FALSE(fs::exists(o.out));
  };
  fails("--clip *nobody*: matches no linear layer", [](auto& o) { o.clip.push_back("*nobody*"); });
  fails("--clip : matches no linear layer", [](auto& o) { o.clip = {""}; });
  fails("--clip *vision*: no layer that it matches has a calibrated input scale", [](auto& o) {
    o.clip = {kPrefix, "*vision*"};
  });
  fails("nothing to clip", [](auto& o) { o.recipe = "int8-w8a8"; });
  fails("choose --calibrator percentile, mse or kl", [](auto& o) { o.calibrator = {}; });
  fails("pass --smooth none", [](auto& o) { o.smoothing = Smoothing::kAuto; });
  fails("--statistics", [](auto& o) { o.statistics.clear(); });
}

}  // namespace
}  // namespace servoflow::toolkit
