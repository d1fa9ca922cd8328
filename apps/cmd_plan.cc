#include <filesystem>
#include <memory>

#include "commands.h"
#include "core/status_macros.h"
#include "toolkit/plan_report.h"

namespace servoflow::cli {
namespace {

struct Options {
  CommonOptions common;
  toolkit::PlanOptions plan;
  std::string html, accuracy, fit, results = "bench/results";
  double target_hz = 0;
};

// The [engine] block of a profile, fitted anew on the results that it names.
Status fit(const Options& o, const Output& out) {
  SF_ASSIGN_OR_RETURN(const toolkit::DeviceProfile device, toolkit::load_device_profile(o.fit));
  if (!device.engine)
    return Status::invalid("--fit " + o.fit + ": the profile has no [engine] that names results to fit on");
  const auto result = [&](const std::string& source) {
    return toolkit::read_measured(
        (std::filesystem::path(o.results) / std::filesystem::path(source).filename()).string());
  };
  SF_ASSIGN_OR_RETURN(const toolkit::MeasuredCase single, result(device.engine->source));
  std::optional<toolkit::MeasuredCase> composition;
  if (!device.engine->composition_source.empty()) {
    SF_ASSIGN_OR_RETURN(composition, result(device.engine->composition_source));
  }
  SF_ASSIGN_OR_RETURN(
      const toolkit::EngineFactors engine,
      toolkit::fit_engine(device, single, composition ? &*composition : nullptr, *device.engine));
  SF_RETURN_IF_ERROR(out.json({{"device", device.name}, {"engine", toolkit::engine_toml(engine)}}));
  out.text(toolkit::engine_toml(engine));
  return {};
}

Status plan(const Options& o) {
  const Output out(o.common);
  if (!o.html.empty()) SF_RETURN_IF_ERROR(toolkit::check_html_path(o.html).with_context("--html"));
  if (!o.fit.empty()) return fit(o, out);
  SF_ASSIGN_OR_RETURN(const toolkit::PlanReport report,
                      o.accuracy.empty() ? toolkit::make_plan(o.plan) : toolkit::make_accuracy(o.accuracy));
  if (!o.html.empty()) SF_RETURN_IF_ERROR(toolkit::plan_html(report).write(o.html).with_context("--html"));
  SF_RETURN_IF_ERROR(out.json(report.json));
  out.text(toolkit::plan_text(report));
  if (report.target && !report.target->reached)
    return Status::check_failed("no plan reaches --target-hz on " + o.plan.device);
  return {};
}

}  // namespace

void add_plan(CLI::App& app, Action& action) {
  auto o = std::make_shared<Options>();
  CLI::App* sub = app.add_subcommand(
      "plan", "Predict latency, memory and energy on a device from exact counts; find the way to a rate");
  std::string devices;
  for (const std::string& name : toolkit::list_device_profiles())
    devices += (devices.empty() ? "" : "|") + name;
  toolkit::PlanOptions& p = o->plan;
  const auto number = [sub](const char* name, int& value, int low, int high, const char* help) {
    return sub->add_option(name, value, help)
        ->check(CLI::Range(low, high))
        ->type_name("N")
        ->capture_default_str();
  };
  sub->add_option("MODEL", p.model, "pi05, tiny, an architecture file, or a checkpoint directory")
      ->capture_default_str();
  sub->add_option("--device", p.device, "A profile: built in, a file of the same form, or a probe's result")
      ->type_name(devices + "|FILE.toml|FILE.json")
      ->capture_default_str();
  sub->add_option("--precision", p.precision, "What weights are stored and multiplied in")
      ->type_name("fp32|bf16|int8-w8a8|fp8-w8a8|nvfp4-w4a16|...")
      ->capture_default_str();
  number("--views", p.work.views, 0, 64, "Camera pictures");
  number("--tokens", p.work.tokens, 1, 65536, "Prompt tokens");
  number("--horizon", p.work.horizon, 1, 4096, "Actions in a chunk");
  number("--steps", p.work.steps, 1, 50, "Denoise steps");
  number("--batch", p.work.batch, 1, 64, "Requests in one pass");
  number("--reuse", p.reuse, 1, 100, "Inferences that share a prefix");
  CLI::Option* target =
      sub->add_option("--target-hz", o->target_hz,
                      "Also find the smallest change that reaches this; exit code 1 if none")
          ->type_name("HZ")
          ->check(CLI::PositiveNumber);
  CLI::Option* accuracy = sub->add_option("--accuracy", o->accuracy,
                                          "Instead: predictions beside the bench results in this folder")
                              ->type_name("DIR");
  sub->add_option("--fit", o->fit, "Instead: a profile's [engine] block, fitted anew on the results it names")
      ->type_name("DEVICE")
      ->excludes(accuracy);
  sub->add_option("--results", o->results, "Where --fit finds those results")
      ->type_name("DIR")
      ->capture_default_str();
  sub->add_option("--html", o->html, "Also write tables and figures as one file that works offline")
      ->type_name("FILE.html");
  add_output_options(*sub, o->common);
  add_examples(*sub, "servoflow plan --device thor --target-hz 20",
               "servoflow plan --accuracy bench/results --json build/accuracy.json");
  sub->callback([o, target, &action] {
    set_up_logging(o->common);
    if (target->count() > 0) o->plan.target_hz = o->target_hz;
    action = [o] { return plan(*o); };
  });
}

}  // namespace servoflow::cli
