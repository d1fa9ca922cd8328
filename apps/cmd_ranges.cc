#include <memory>

#include "commands.h"
#include "core/status_macros.h"
#include "toolkit/e2m1_study.h"
#include "toolkit/ranges.h"

namespace servoflow::cli {
namespace {

struct RangesArguments {
  CommonOptions common;
  std::string statistics, code = "fp8", calibrator = "minmax", html;
  toolkit::RangeOptions options;
  bool all = false, fail = false;
};

Status run_ranges(const RangesArguments& o) {
  if (!o.html.empty()) SF_RETURN_IF_ERROR(toolkit::check_html_path(o.html));
  toolkit::RangeOptions options = o.options;
  options.code = o.code == "int8"  ? quant::Code::kInt8
                 : o.code == "fp4" ? quant::Code::kE2M1
                                   : quant::Code::kE4M3;
  options.statistics = o.statistics;
  SF_ASSIGN_OR_RETURN(options.calibrator.kind, quant::calibrator_named(o.calibrator));
  SF_ASSIGN_OR_RETURN(const toolkit::CalibrationStatistics statistics,
                      toolkit::read_calibration(o.statistics));
  SF_ASSIGN_OR_RETURN(const toolkit::RangeReport report, toolkit::ranges(statistics, options));
  const Output out(o.common);
  SF_RETURN_IF_ERROR(out.json(toolkit::ranges_to_json(report)));
  if (!o.html.empty()) SF_RETURN_IF_ERROR(toolkit::ranges_html(report).write(o.html));
  out.text(toolkit::ranges_text(report, o.all));
  if (o.fail && report.flagged > 0)
    return Status::check_failed("ranges: " + std::to_string(report.flagged) + " sites are flagged");
  return {};
}

struct StudyArguments {
  CommonOptions common;
  std::string checkpoint;
  toolkit::StudyOptions options;
  std::vector<std::string> layers;
};

Status run_study(const StudyArguments& o) {
  toolkit::StudyOptions options = o.options;
  if (!o.layers.empty()) options.layers = o.layers;
  SF_ASSIGN_OR_RETURN(const weights::Checkpoint checkpoint, weights::open_checkpoint(o.checkpoint));
  SF_ASSIGN_OR_RETURN(const toolkit::StudyReport report, toolkit::e2m1_study(checkpoint, options));
  const Output out(o.common);
  SF_RETURN_IF_ERROR(out.json(toolkit::study_to_json(report)));
  out.text(toolkit::study_text(report));
  return {};
}

}  // namespace

void add_ranges(CLI::App& app, Action& action) {
  auto o = std::make_shared<RangesArguments>();
  CLI::App* sub = app.add_subcommand(
      "ranges",
      "Input ranges of every layer and denoise step: what saturates, what drifts, what clipping costs, and "
      "the command that clips it");
  sub->add_option("STATISTICS", o->statistics, "File of `servoflow calibrate`")->required();
  sub->add_option("--code", o->code, "What inputs are rounded to")
      ->check(CLI::IsMember({"int8", "fp8", "fp4"}).description(""))
      ->type_name("int8|fp8|fp4")
      ->capture_default_str();
  sub->add_option("--calibrator", o->calibrator, "Where the range is clipped")
      ->check(CLI::IsMember({"minmax", "percentile", "mse", "kl"}).description(""))
      ->type_name("minmax|percentile|mse|kl")
      ->capture_default_str();
  sub->add_option("--percentile", o->options.calibrator.percentile,
                  "Share of the values that stays below the clip")
      ->type_name("P")
      ->capture_default_str();
  sub->add_option("--limit", o->options.limit, "Magnitude beyond which values are flagged (448 x 6)")
      ->type_name("X")
      ->capture_default_str();
  sub->add_option("--drift", o->options.drift,
                  "Largest over smallest range of a site's steps that is not flagged")
      ->type_name("X")
      ->capture_default_str();
  sub->add_flag("--all", o->all, "Every site, not only flagged ones");
  sub->add_flag("--fail", o->fail, "Exit with 1 when a site is flagged");
  sub->add_option("--html", o->html, "Report with a heat map, one file that works offline")
      ->type_name("FILE.html");
  add_output_options(*sub, o->common);
  add_examples(*sub, "servoflow ranges build/tiny.stats --all",
               "servoflow ranges build/tiny.stats --code int8 --calibrator mse --json -");
  sub->callback([o, &action] {
    set_up_logging(o->common);
    action = [o] { return run_ranges(*o); };
  });
}

void add_e2m1(CLI::App& app, Action& action) {
  auto o = std::make_shared<StudyArguments>();
  CLI::App* sub = app.add_subcommand(
      "e2m1", "Numerics of the 4-bit float on a checkpoint's weights: bias, underflow, sums, rivals");
  sub->add_option("CHECKPOINT", o->checkpoint, "Checkpoint directory in floating point")->required();
  sub->add_option("--layer", o->layers,
                  "Layers to look at; * stands for anything, may be repeated; default: all")
      ->type_name("GLOB");
  sub->add_option("--limit", o->options.limit, "Layers at most, evenly spread")
      ->check(CLI::Range(1, 100000))
      ->type_name("N")
      ->capture_default_str();
  sub->add_option("--rows", o->options.rows, "Rows of each, evenly spread")
      ->check(CLI::Range(1, 1000000))
      ->type_name("N")
      ->capture_default_str();
  add_seed_option(*sub, o->options.seed, "Seed of the inputs of products");
  add_output_options(*sub, o->common);
  add_examples(*sub, "servoflow e2m1 tests/golden/openpi-tiny",
               "servoflow e2m1 tests/golden/openpi-tiny --layer '*mlp*' --json -");
  sub->callback([o, &action] {
    set_up_logging(o->common);
    action = [o] { return run_study(*o); };
  });
}

}  // namespace servoflow::cli
