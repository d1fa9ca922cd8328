#include <fmt/format.h>

#include <memory>

#include "commands.h"
#include "core/status_macros.h"
#include "toolkit/calibrate.h"
#include "toolkit/quantize.h"

namespace servoflow::cli {
namespace {

struct QuantizeArguments {
  CommonOptions common;
  std::string checkpoint, recipe, out, statistics, layout = "compressed-tensors", smooth = "auto",
                                                   scales = "absmax", rounding = "nearest",
                                                   calibrator = "minmax";
  double percentile = 0.9999;
  std::vector<std::string> clip;
  bool correct_bias = false;
};

Status run_quantize(const QuantizeArguments& o) {
  Progress progress("quantizing");
  toolkit::QuantizeOptions options{.checkpoint = o.checkpoint,
                                   .out = o.out,
                                   .recipe = o.recipe,
                                   .statistics = o.statistics,
                                   .correct_bias = o.correct_bias};
  if (o.layout == "modelopt") options.layout = quant::Convention::kModelOpt;
  options.smoothing = o.smooth == "none"          ? toolkit::Smoothing::kNone
                      : o.smooth == "smoothquant" ? toolkit::Smoothing::kSmoothQuant
                      : o.smooth == "awq"         ? toolkit::Smoothing::kAwq
                                                  : toolkit::Smoothing::kAuto;
  if (o.scales == "least-squares") options.scales = toolkit::ScaleChoice::kLeastSquares;
  if (o.rounding == "gptq") options.rounding = toolkit::Rounding::kGptq;
  SF_ASSIGN_OR_RETURN(options.calibrator.kind, quant::calibrator_named(o.calibrator));
  options.calibrator.percentile = o.percentile;
  options.clip = o.clip;
  options.progress = [&](std::uint64_t done, std::uint64_t total) { progress.update(done, total); };
  SF_ASSIGN_OR_RETURN(const toolkit::QuantizeReport report, toolkit::quantize_checkpoint(options));
  progress.finish();
  const Output out(o.common);
  SF_RETURN_IF_ERROR(out.json(toolkit::quantize_to_json(report)));
  out.text(toolkit::quantize_text(report));
  return {};
}

struct CalibrateArguments {
  CommonOptions common;
  std::string checkpoint, cases, out;
  std::vector<std::string> moments;
  int steps = 0, limit = 0;
};

Status run_calibrate(const CalibrateArguments& o) {
  Progress loading("reading weights"), running("calibrating");
  toolkit::CalibrateOptions options{.cases = o.cases,
                                    .out = o.out,
                                    .device = o.common.device == "auto" ? "cpu" : o.common.device,
                                    .precision = o.common.precision,
                                    .tokenizer = o.common.tokenizer,
                                    .assets = o.common.assets,
                                    .threads = o.common.threads,
                                    .steps = o.steps,
                                    .limit = o.limit,
                                    .moments = o.moments};
  options.loading = [&](std::uint64_t done, std::uint64_t total) { loading.update(done, total); };
  options.running = [&](int done, int total, const std::string& next) {
    loading.finish();
    running.update(static_cast<std::uint64_t>(done), static_cast<std::uint64_t>(total), next);
  };
  SF_ASSIGN_OR_RETURN(const toolkit::CalibrateReport report, toolkit::calibrate(o.checkpoint, options));
  loading.finish();
  running.finish();
  const toolkit::CalibrationStatistics& s = report.statistics;
  const Output out(o.common);
  SF_RETURN_IF_ERROR(out.json({{"statistics", o.out},
                               {"digest", s.digest()},
                               {"weights", s.weights},
                               {"cases", s.cases.size()},
                               {"run", report.run},
                               {"skipped", report.skipped},
                               {"denoise_steps", s.denoise_steps},
                               {"sites", s.sites.size()}}));
  out.text(fmt::format("{}: {} cases ({} new), {} sites, {} denoise steps; digest {}\n", o.out,
                       s.cases.size(), report.run, s.sites.size(), s.denoise_steps,
                       s.digest().substr(0, 16)));
  return {};
}

}  // namespace

void add_quantize(CLI::App& app, Action& action) {
  auto o = std::make_shared<QuantizeArguments>();
  CLI::App* sub = app.add_subcommand(
      "quantize",
      "Write a checkpoint in 8 or 4 bits that this engine and the public libraries read, with a report");
  const auto choice = [&](const std::string& name, std::string& value, std::vector<std::string> names,
                          const std::string& help) {
    std::string type;
    for (const std::string& n : names) type += (type.empty() ? "" : "|") + n;
    sub->add_option(name, value, help)
        ->check(CLI::IsMember(names).description(""))
        ->type_name(type)
        ->capture_default_str();
  };
  sub->add_option("CHECKPOINT", o->checkpoint, "Checkpoint directory in floating point")->required();
  sub->add_option("OUT", o->out, "Directory to make; must not exist or be empty")->required();
  sub->add_option(
         "--recipe", o->recipe,
         "Recipe or plan file: which layer gets which format. Recipes: int8-w8a8, int8-w8a16, fp8-w8a8, "
         "int4-g128-w4a16, nvfp4-w4a16, nvfp4-w4a8, nvfp4-w4a4, mlp-nvfp4, fp8-w8a8-static, "
         "int8-w8a8-static, …")
      ->required()
      ->type_name("NAME|FILE");
  sub->add_option("--statistics", o->statistics, "Inputs' statistics, from `servoflow calibrate`")
      ->type_name("FILE");
  choice("--layout", o->layout, {"compressed-tensors", "modelopt"}, "Whose files they are");
  choice("--smooth", o->smooth, {"auto", "none", "smoothquant", "awq"},
         "Multipliers moved between inputs and weights; auto: smoothquant for INT8 inputs where there are "
         "statistics");
  choice("--scales", o->scales, {"absmax", "least-squares"}, "How a group's scale is chosen");
  choice("--rounding", o->rounding, {"nearest", "gptq"},
         "How weights are rounded; gptq needs calibrate --moments");
  sub->add_flag("--correct-bias", o->correct_bias,
                "Take the mean error of outputs out of the biases there are");
  choice("--calibrator", o->calibrator, {"minmax", "percentile", "mse", "kl"},
         "How static input ranges are clipped; minmax keeps them whole");
  sub->add_option("--percentile", o->percentile, "Share of the values that stays below the clip")
      ->type_name("P")
      ->capture_default_str();
  sub->add_option(
         "--clip", o->clip,
         "Layers whose inputs --calibrator (another than minmax) clips, all others keep their whole range; * "
         "stands for anything, may be repeated; default: all. Needs a recipe with calibrated input scales "
         "(fp8-w8a8-static, nvfp4-w4a4, int8-w8a8-static with --smooth none); `servoflow ranges` prints the "
         "whole command")
      ->type_name("GLOB")
      ->allow_extra_args(false);
  add_output_options(*sub, o->common);
  add_examples(*sub,
               "servoflow quantize tests/golden/openpi-tiny build/tiny-nvfp4 --recipe nvfp4-w4a16 --scales "
               "least-squares",
               "servoflow quantize tests/golden/openpi-tiny build/tiny-int8 --recipe int8-w8a8 --statistics "
               "build/tiny.stats");
  sub->callback([o, &action] {
    set_up_logging(o->common);
    action = [o] { return run_quantize(*o); };
  });
}

void add_calibrate(CLI::App& app, Action& action) {
  auto o = std::make_shared<CalibrateArguments>();
  CLI::App* sub = app.add_subcommand(
      "calibrate",
      "Gather the inputs of every linear layer over recorded cases and all denoise steps; resumable");
  sub->add_option("CHECKPOINT", o->checkpoint, "Checkpoint directory in floating point")->required();
  sub->add_option("OUT", o->out, "Statistics file; cases it holds already are not run again")->required();
  sub->add_option(
         "--cases", o->cases,
         "Folder of recorded cases (`serve --record` makes them), others than those you judge by; default: "
         "CHECKPOINT/cases")
      ->type_name("DIR");
  sub->add_option("--limit", o->limit, "Cases at most, evenly spread over the folder; 0: all")
      ->check(CLI::NonNegativeNumber.description(""))
      ->type_name("N");
  sub->add_option("--steps", o->steps, "Denoise steps of every case; 0: the checkpoint's default")
      ->check(CLI::Range(0, 50))
      ->type_name("N");
  sub->add_option("--moments", o->moments,
                  "Layers that keep second moments, for gptq (8 K² bytes each); * stands for anything, may "
                  "be repeated")
      ->type_name("GLOB");
  add_device_options(*sub, o->common, "fp32");
  add_checkpoint_options(*sub, o->common);
  add_output_options(*sub, o->common);
  add_examples(
      *sub, "servoflow calibrate tests/golden/openpi-tiny build/tiny.stats",
      "servoflow calibrate tests/golden/openpi-tiny build/tiny-gptq.stats --moments '*mlp*' --limit 4");
  sub->callback([o, &action] {
    set_up_logging(o->common);
    action = [o] { return run_calibrate(*o); };
  });
}

}  // namespace servoflow::cli
