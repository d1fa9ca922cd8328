#include "toolkit/quantize.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <set>

#include "core/file.h"
#include "core/safetensors.h"
#include "quant/matrix.h"
#include "toolkit/calibrate.h"
#include "toolkit/case_runner.h"
#include "toolkit/quantize_layers.h"
#include "weights/checkpoint.h"
#include "weights/tensor_files.h"

namespace servoflow::toolkit {
namespace {

namespace fs = std::filesystem;
constexpr char kTiny[] = "tests/golden/openpi-tiny";
constexpr char kLerobot[] = "tests/golden/lerobot-tiny";

class Quantize : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    shared_ = fs::temp_directory_path() / ("servoflow-quantize-" + std::to_string(::getpid()));
    fs::create_directories(shared_);
    const auto report = calibrate(kTiny, {.out = stats(), .moments = {"*"}});
    ASSERT_TRUE(report.ok()) << report.status().message();
  }
  static void TearDownTestSuite() { fs::remove_all(shared_); }
  static std::string stats() { return (shared_ / "stats").string(); }
  std::string out(const std::string& name) const { return (shared_ / name).string(); }
  QuantizeReport made(const QuantizeOptions& options) const {
    fs::remove_all(options.out);
    Result<QuantizeReport> r = quantize_checkpoint(options);
    EXPECT_TRUE(r.ok()) << r.status().message();
    return r.ok() ? std::move(*r) : QuantizeReport{};
  }
  // Weights of the directory as the reader understands them, and what is left in float.
  static std::map<std::string, std::vector<float>> read_back(const std::string& dir,
                                                             const weights::Architecture& a) {
    std::map<std::string, std::vector<float>> values;
    const auto files = weights::TensorFiles::open(dir);
    EXPECT_TRUE(files.ok()) << files.status().message();
    const auto config = quant::find_quant_config(*read_json_file(dir + "/config.json"), dir);
    EXPECT_TRUE(config.ok() && config->has_value()) << config.status().message();
    const auto lookup = [&](const std::string& name) -> std::optional<quant::TensorView> {
      for (const std::string& prefix : {std::string(), std::string("model.")})
        if (const weights::StoredTensor t = (*files)->find(prefix + name))
          return quant::TensorView{t.tensor->dtype, t.tensor->shape, t.tensor->bytes};
      return std::nullopt;
    };
    for (const quant::Linear& l : linear_layers(a)) {
      const quant::ConfigGroup* group = (*config)->group_of(l.name);
      if (group == nullptr) continue;
      const auto m = quant::read_linear(l.name, *group, (*config)->convention, l.rows, l.cols, lookup);
      EXPECT_TRUE(m.ok()) << m.status().message();
      values[l.name] = quant::dequantize(*m);
    }
    return values;
  }
  static fs::path shared_;
};
fs::path Quantize::shared_;

TEST_F(Quantize, WritesWhatTheReadersOfBothLayoutsUnderstand) {
  const weights::Checkpoint tiny = *weights::open_checkpoint(kTiny);
  for (const char* recipe :
       {"int8-w8a8", "int8-w8a16", "fp8-w8a8", "nvfp4-w4a16", "mlp-nvfp4", "int4-g128-w4a16"})
    for (const auto layout : {quant::Convention::kCompressedTensors, quant::Convention::kModelOpt}) {
      if (layout == quant::Convention::kModelOpt && std::string(recipe) != "nvfp4-w4a16" &&
          std::string(recipe) != "fp8-w8a8")
        continue;
      const QuantizeReport r =
          made({.checkpoint = kTiny, .out = out("q"), .recipe = recipe, .layout = layout});
      ASSERT_FALSE(r.layers.empty()) << recipe;
      const auto values = read_back(out("q"), tiny.architecture);
      EXPECT_EQ(values.size(), r.layers.size()) << recipe;
      EditedSource original(tiny.source);
      for (const LayerReport& l : r.layers) {
        ASSERT_TRUE(values.contains(l.name)) << recipe << " " << l.name;
        const std::vector<float> w = *original.values(l.name + ".weight");
        double error = 0, whole = 0;
        for (std::size_t i = 0; i < w.size(); ++i) {
          error += std::pow(static_cast<double>(values.at(l.name)[i]) - static_cast<double>(w[i]), 2);
          whole += std::pow(static_cast<double>(w[i]), 2);
        }
        EXPECT_NEAR(error / whole / l.weight_error, 1, 1e-3)
            << "the file is not what the report says of " << l.name;
      }
      EXPECT_LT(r.bytes_after, r.bytes_before);
      for (const char* file : {"tokenizer.model", "assets", kPlanFile, kReportFile, "config.json"})
        EXPECT_TRUE(fs::exists(out("q") + "/" + file)) << file;
      // The plan travels: it resolves to the same formats again.
      const auto plan = quant::load_plan(out("q") + "/" + kPlanFile);
      ASSERT_TRUE(plan.ok()) << plan.status().message();
      const auto linears = linear_layers(tiny.architecture);
      const auto formats = plan->resolve(linears);
      ASSERT_TRUE(formats.ok());
      for (std::size_t i = 0; i < linears.size(); ++i)
        EXPECT_EQ((*formats)[i].quantized(), values.contains(linears[i].name)) << linears[i].name;
    }
}

TEST_F(Quantize, KeepsTheNamesOfLerobotsLayout) {
  const QuantizeReport r = made({.checkpoint = kLerobot, .out = out("l"), .recipe = "nvfp4-w4a16"});
  EXPECT_EQ(read_back(out("l"), weights::open_checkpoint(kLerobot)->architecture).size(), r.layers.size());
  EXPECT_TRUE(fs::exists(out("l") + "/policy_preprocessor.json"));
  const auto files = weights::TensorFiles::open(out("l"));
  for (const weights::StoredTensor& t : (*files)->tensors())
    EXPECT_TRUE(t.tensor->name.starts_with("model.")) << t.tensor->name;
}

// quantization.md: "Fused consumers (qkv, gate/up) need one shared global scale".
TEST_F(Quantize, FusedLayersShareTheGlobalScale) {
  made({.checkpoint = kTiny, .out = out("f"), .recipe = "nvfp4-w4a16"});
  const auto files = weights::TensorFiles::open(out("f"));
  int sets = 0;
  std::set<float> distinct;
  for (const Site& site : sites(weights::open_checkpoint(kTiny)->architecture)) {
    if (site.linears.size() < 2) continue;
    std::set<float> scales;
    for (const std::string& l : site.linears) {
      const weights::StoredTensor t = (*files)->find(l + ".weight_global_scale");
      ASSERT_TRUE(t) << l;
      scales.insert(to_floats(*t.tensor)->front());
    }
    EXPECT_EQ(scales.size(), 1u) << site.linears.front();
    distinct.insert(*scales.begin());
    ++sets;
  }
  EXPECT_GT(sets, 4);
  EXPECT_GT(distinct.size(), 1u);
}

// quantization.md: "Sensitive: action_in/out_proj, time_mlp …": they stay as they were, to the bit.
TEST_F(Quantize, ProjectionsEmbeddingsAndModulationStay) {
  made({.checkpoint = kTiny, .out = out("p"), .recipe = "nvfp4-w4a16"});
  const auto before = weights::TensorFiles::open(kTiny), after = weights::TensorFiles::open(out("p"));
  for (const char* name :
       {"action_in_proj.weight", "action_out_proj.weight", "time_mlp_in.weight", "time_mlp_out.weight",
        "paligemma_with_expert.gemma_expert.model.layers.0.input_layernorm.dense.weight",
        "paligemma_with_expert.paligemma.lm_head.weight"}) {
    const weights::StoredTensor a = (*before)->find(name), b = (*after)->find(name);
    ASSERT_TRUE(a && b) << name;
    EXPECT_EQ(a.tensor->dtype, b.tensor->dtype);
    EXPECT_TRUE(std::equal(a.tensor->bytes.begin(), a.tensor->bytes.end(), b.tensor->bytes.begin())) << name;
  }
}

TEST_F(Quantize, MethodsBeatRoundToNearestOnTheirMetricOrKeepIt) {
  struct Row {
    QuantizeOptions options;
    double least_gain;  // mean output error over that of round-to-nearest must stay below
  };
  const QuantizeOptions base{.checkpoint = kTiny,
                             .out = out("m"),
                             .recipe = "nvfp4-w4a16",
                             .statistics = stats(),
                             .smoothing = Smoothing::kNone};
  QuantizeOptions scales = base, gptq = base, awq = base, all = base;
  scales.scales = ScaleChoice::kLeastSquares;
  gptq.rounding = Rounding::kGptq;
  awq.smoothing = Smoothing::kAwq;
  all.scales = ScaleChoice::kLeastSquares;
  all.rounding = Rounding::kGptq;
  // Round-to-nearest of the checkpoint as it is.
  std::map<std::string, LayerReport> plain;
  for (const LayerReport& l : made(base).layers) plain[l.name] = l;
  for (const Row& row : {Row{scales, 0.97}, Row{gptq, 0.7}, Row{awq, 0.95}, Row{all, 0.7}}) {
    const QuantizeReport r = made(row.options);
    double sum = 0, nearest = 0;
    int judged = 0, smoothed = 0;
    for (const LayerReport& l : r.layers) {
      const LayerReport& reference = plain.at(l.name);
      EXPECT_NEAR(l.weight_error_nearest / reference.weight_error, 1, 1e-9) << l.name;
      if (!l.output_error) continue;
      ++judged;
      // Multipliers or not, what a method is measured by is round-to-nearest without them.
      EXPECT_NEAR(*l.output_error_nearest / *reference.output_error, 1, 1e-9) << l.name;
      if (l.smoothing_error) {
        ++smoothed;
        EXPECT_LE(*l.smoothing_error, *l.smoothing_error_nearest) << l.name;
      }
      // Multipliers belong to all layers that share them: one may lose what the others gain, and says so.
      if (row.options.smoothing == Smoothing::kAwq && *l.output_error > *l.output_error_nearest)
        EXPECT_NE(l.note.find("without multipliers"), std::string::npos) << l.name;
      else
        EXPECT_LE(*l.output_error, *l.output_error_nearest) << l.name << " " << l.method;
      sum += *l.output_error;
      nearest += *l.output_error_nearest;
    }
    EXPECT_GT(judged, 10);
    EXPECT_EQ(smoothed > 10, row.options.smoothing == Smoothing::kAwq);
    const double gain = sum / nearest;
    std::printf("%s: output error %.3g of round-to-nearest\n", r.layers.back().method.c_str(), gain);
    EXPECT_LT(gain, row.least_gain);
  }
}

// Planted outliers: round-to-nearest of 8-bit inputs does not survive them, SmoothQuant finds the way back.
// The range that a static scale has to hold shows it, and the folded network computes the same.
TEST_F(Quantize, SmoothQuantUndoesPlantedOutliers) {
  const weights::Checkpoint tiny = *weights::open_checkpoint(kTiny);
  auto planted = std::make_shared<EditedSource>(tiny.source);
  ASSERT_TRUE(plant_outliers(tiny.architecture, {.stride = 8}, *planted).ok());
  weights::Checkpoint outliers = tiny;
  outliers.source = planted;
  CalibrationStatistics statistics = *read_calibration(stats());
  for (const Site& site : sites(tiny.architecture)) {  // what calibration of the planted network would see
    if (site.producer != Producer::kLinear || site.linears.front().find("vision") != std::string::npos)
      continue;
    const auto it = statistics.sites.find(site.linears.front());
    if (it == statistics.sites.end()) continue;
    std::vector<float> m(static_cast<std::size_t>(site.width), 1.0f);
    for (std::size_t c = 0; c < m.size(); ++c)
      if ((site.tie.empty() ? static_cast<int>(c) : site.tie[c]) % 8 == 4) m[c] = 64;
    for (std::size_t c = 0; c < m.size(); ++c) {
      it->second.channel_amax[c] *= m[c];
      it->second.channel_abs[c] *= m[c];
      it->second.channel_square[c] *= m[c] * m[c];
    }
    it->second.moment = it->second.moment->scaled(m);
  }
  std::map<std::string, quant::LinearFormat> formats;
  const auto linears = linear_layers(tiny.architecture);
  const auto resolved = *quant::load_plan("int8-w8a8")->resolve(linears);
  for (std::size_t i = 0; i < linears.size(); ++i)
    if (resolved[i].quantized()) formats[linears[i].name] = resolved[i];
  // Loss of W8A8 by its definition, on Gaussian tokens with the statistics' channel sizes.
  const auto loss = [&](Smoothing smoothing) {
    QuantizeOptions options{.smoothing = smoothing};
    const auto q = LayerQuantizer::prepare(outliers, options, &statistics, formats);
    EXPECT_TRUE(q.ok()) << q.status().message();
    double worst = 0;
    for (const Site& site : sites(tiny.architecture)) {
      const auto it = statistics.sites.find(site.linears.front());
      if (it == statistics.sites.end() || !site.linears.front().ends_with("down_proj")) continue;
      const std::vector<float> w = *planted->values(site.linears.front() + ".weight");
      const std::vector<float> smoothed = *(*q)->source().values(site.linears.front() + ".weight");
      const auto k = static_cast<std::size_t>(site.width);
      std::vector<float> x(k), y(k);
      for (std::size_t c = 0; c < k; ++c) {
        x[c] = static_cast<float>(
                   std::sqrt(it->second.channel_square[c] / static_cast<double>(it->second.rows))) *
               (c % 3 == 0 ? -1.0f : 1.0f);
        y[c] = x[c];
        if (w[c] != 0) y[c] = x[c] * (w[c] / smoothed[c]);
      }
      quant::fake_quantize_rows(formats.begin()->second.input, y.data(), 1, site.width, site.width);
      double error = 0, whole = 0;
      for (std::size_t r = 0; r < w.size() / k; ++r) {
        double a = 0, b = 0;
        for (std::size_t c = 0; c < k; ++c) {
          a += static_cast<double>(x[c]) * static_cast<double>(w[r * k + c]);
          b += static_cast<double>(y[c]) * static_cast<double>(smoothed[r * k + c]);
        }
        error += (a - b) * (a - b);
        whole += a * a;
      }
      worst = std::max(worst, error / whole);
    }
    return worst;
  };
  const double rough = loss(Smoothing::kNone), smooth = loss(Smoothing::kSmoothQuant);
  std::printf("worst relative squared error of 8-bit inputs: %.2e with outliers, %.2e smoothed\n", rough,
              smooth);
  EXPECT_GT(rough, 10 * smooth);
  EXPECT_LT(smooth, 2e-3);
}

// Multipliers that a norm's (1 + w) cannot hold would show here.
TEST_F(Quantize, SmoothedCheckpointsComputeTheSameInFloat) {
  const weights::Checkpoint tiny = *weights::open_checkpoint(kTiny);
  const CalibrationStatistics statistics = *read_calibration(stats());
  const auto linears = linear_layers(tiny.architecture);
  const auto resolved = *quant::load_plan("int8-w8a8")->resolve(linears);
  std::map<std::string, quant::LinearFormat> formats;
  for (std::size_t i = 0; i < linears.size(); ++i)
    if (resolved[i].quantized()) formats[linears[i].name] = resolved[i];
  const auto q = LayerQuantizer::prepare(tiny, {.smoothing = Smoothing::kSmoothQuant}, &statistics, formats);
  ASSERT_TRUE(q.ok());
  std::vector<CaseFile> cases;
  cases.push_back(std::move(*read_case(std::string(kTiny) + "/cases/libero.safetensors")));
  std::vector<float> actions[2];
  const std::shared_ptr<const weights::WeightSource> sources[] = {
      tiny.source, std::shared_ptr<const weights::WeightSource>(&(*q)->source(), [](const auto*) {})};
  for (int i = 0; i < 2; ++i) {
    auto runner = CaseRunner::open(tiny, cases, {.device = "cpu", .source = sources[i]});
    ASSERT_TRUE(runner.ok());
    actions[i] = (*runner)->run(cases[0], nullptr)->normalized;
  }
  double most = 0;
  for (std::size_t i = 0; i < actions[0].size(); ++i)
    most = std::max(most, std::fabs(static_cast<double>(actions[0][i]) - static_cast<double>(actions[1][i])));
  EXPECT_GT(most, 0) << "nothing was smoothed";
  EXPECT_LT(most, 2e-4);
}

TEST_F(Quantize, StaticScalesNeedCalibrationAndHoldItsRanges) {
  EXPECT_FALSE(quantize_checkpoint({.checkpoint = kTiny, .out = out("s"), .recipe = "nvfp4-w4a4"}).ok());
  EXPECT_FALSE(fs::exists(out("s")));
  const QuantizeReport r =
      made({.checkpoint = kTiny, .out = out("s"), .recipe = "nvfp4-w4a4", .statistics = stats()});
  const CalibrationStatistics s = *read_calibration(stats());
  int checked = 0;
  for (const LayerReport& l : r.layers) {
    const auto it = s.sites.find(l.name);
    ASSERT_TRUE(l.input_scale.has_value()) << l.name;
    if (it == s.sites.end()) continue;
    EXPECT_FLOAT_EQ(*l.input_scale, it->second.all_steps().amax() / 2688) << l.name;
    EXPECT_EQ(l.step_input_amax.size(), it->second.steps.size());
    ++checked;
  }
  EXPECT_GT(checked, 5);
  EXPECT_EQ(r.calibration["digest"], s.digest());
}

TEST_F(Quantize, BiasCorrectionChangesBiases) {
  const QuantizeReport r = made({.checkpoint = kTiny,
                                 .out = out("b"),
                                 .recipe = "nvfp4-w4a16",
                                 .statistics = stats(),
                                 .correct_bias = true});
  const std::string bias =
      "paligemma_with_expert.paligemma.model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias";
  const auto before = weights::TensorFiles::open(kTiny), after = weights::TensorFiles::open(out("b"));
  const auto a = *to_floats(*(*before)->find(bias).tensor), b = *to_floats(*(*after)->find(bias).tensor);
  EXPECT_NE(a, b);
  double change = 0, size = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    change += std::pow(a[i] - b[i], 2);
    size += std::pow(a[i], 2);
  }
  EXPECT_LT(change, 0.2 * size + 0.01);
}

TEST_F(Quantize, RefusesWithoutLeavingAnything) {
  const auto fails = [&](const QuantizeOptions& o, const std::string& why) {
    const auto r = quantize_checkpoint(o);
    ASSERT_FALSE(r.ok()) << why;
    EXPECT_NE(r.status().message().find(why), std::string::npos) << r.status().message();
    EXPECT_FALSE(fs::exists(out("x")));
    for (const auto& entry : fs::directory_iterator(shared_))
      EXPECT_EQ(entry.path().filename().string().find(".tmp"), std::string::npos) << entry.path();
  };
  fails({.checkpoint = kTiny, .out = out("x"), .recipe = "no-such"}, "no-such");
  fails({.checkpoint = kTiny, .out = out("x"), .recipe = "nvfp4-w4a16", .rounding = Rounding::kGptq},
        "calibrate");
  fails({.checkpoint = kTiny, .out = out("x"), .recipe = "nvfp4-w4a16", .statistics = out("missing")},
        "missing");
  fails({.checkpoint = kLerobot, .out = out("x"), .recipe = "nvfp4-w4a16", .statistics = stats()},
        "other weights");
  fails({.checkpoint = kTiny,
         .out = out("x"),
         .recipe = "int4-g128-w4a16",
         .layout = quant::Convention::kModelOpt},
        "");
  made({.checkpoint = kTiny, .out = out("twice"), .recipe = "int8-w8a16"});
  fails({.checkpoint = out("twice"), .out = out("x"), .recipe = "int8-w8a16"}, "");
  const auto r = quantize_checkpoint({.checkpoint = kTiny, .out = out("twice"), .recipe = "int8-w8a16"});
  ASSERT_FALSE(r.ok());
  EXPECT_NE(r.status().message().find("not empty"), std::string::npos);
}

}  // namespace
}  // namespace servoflow::toolkit
