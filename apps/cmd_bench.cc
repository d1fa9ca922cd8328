#include <memory>

#include "bench_matrix_options.h"
#include "commands.h"
#include "core/status_macros.h"
#include "toolkit/bench.h"

namespace servoflow::cli {
namespace {

struct Options {
  CommonOptions common;
  toolkit::BenchOptions bench;
  bool no_peaks = false;
  MatrixCommand matrix;
};

Status bench(Options& o) {
  if (o.matrix.used()) return run_matrix_command(o.matrix, o.common);
  if (o.bench.checkpoint.empty() == o.bench.synthetic.empty())
    return Status::invalid("bench: give either a CHECKPOINT or --synthetic pi05|tiny");
  Progress loading("loading weights"), preparing("recording"), running("measuring");
  o.bench.peaks = !o.no_peaks;
  SF_ASSIGN_OR_RETURN(const Json chosen, apply_machine_profile(o.common, o.bench.checkpoint));
  o.bench.policy = policy_options(o.common);
  o.bench.policy.progress = [&](std::uint64_t done, std::uint64_t total) { loading.update(done, total); };
  o.bench.policy.preparing = [&](std::uint64_t done, std::uint64_t total) {
    loading.finish();
    preparing.update(done, total);
  };
  o.bench.running = [&](int done, int total) {
    loading.finish();
    preparing.finish();
    running.update(static_cast<std::uint64_t>(done), static_cast<std::uint64_t>(total));
  };
  SF_ASSIGN_OR_RETURN(const toolkit::BenchReport report, toolkit::run_bench(o.bench));
  running.finish();
  const Output out(o.common);
  Json json = toolkit::bench_to_json(report);
  json["chosen"] = chosen;
  SF_RETURN_IF_ERROR(out.json(json));
  out.text(toolkit::bench_text(report));
  return toolkit::bench_outcome(report);
}

}  // namespace

void add_bench(CLI::App& app, Action& action) {
  auto o = std::make_shared<Options>();
  CLI::App* sub =
      app.add_subcommand("bench", "Measure latency per stage and end to end, beside the machine's peaks");
  toolkit::WorkShape& work = o->bench.work;
  const auto number = [sub](const char* name, int& value, int low, int high, const char* help) {
    return sub->add_option(name, value, help)
        ->check(CLI::Range(low, high))
        ->type_name("N")
        ->capture_default_str();
  };
  sub->add_option("CHECKPOINT", o->bench.checkpoint, "Checkpoint directory; or use --synthetic");
  sub->add_option("--synthetic", o->bench.synthetic, "Random weights of this size instead of a checkpoint")
      ->type_name("pi05|tiny|FILE.json");
  sub->add_option("--robot", o->bench.robot, "Built-in robot or contract file; default: the checkpoint's own")
      ->type_name("R");
  CLI::Option* views =
      number("--views", work.views, 0, 64, "Camera pictures; a checkpoint's robot: all that it must send");
  number("--tokens", work.tokens, 1, 65536, "Prompt tokens, given as ids");
  sub->add_option("--prompt", o->bench.prompt, "A prompt instead of token ids (needs a tokenizer)")
      ->type_name("TEXT")
      ->excludes("--tokens");
  CLI::Option* horizon =
      number("--horizon", work.horizon, 1, 4096, "Actions in a chunk (a checkpoint has its own)");
  number("--steps", work.steps, 1, 50, "Denoise steps");
  number("--batch", work.batch, 1, 64, "Robots in one pass");
  sub->add_flag("--ragged", o->bench.ragged, "Requests of a batch differ: fewer tokens, a view less");
  sub->add_flag("--batches", o->bench.batches,
                "Also every batch of 1 to --batch, each request compared with itself alone");
  number("--repeat", o->bench.repeat, 1, 1000000, "Measured inferences");
  number("--warmup", o->bench.warmup, 0, 1000000, "Inferences before, not counted");
  sub->add_flag("--components", o->bench.components,
                "Also trace one inference and print the time per component");
  sub->add_flag("--soak", o->bench.soak, "Fail when memory grows over the repeats");
  CLI::Option* no_peaks = sub->add_flag("--no-peaks", o->no_peaks, "Do not measure the machine's peak rates");
  sub->add_option("--ceilings", o->bench.ceilings, "A GPU's peak rates from a file instead")
      ->type_name("FILE.json")
      ->excludes(no_peaks);
  add_device_options(*sub, o->common, "auto");
  add_profile_option(*sub, o->common);
  add_checkpoint_options(*sub, o->common);
  add_output_options(*sub, o->common);
  add_matrix_options(*sub, o->matrix);
  add_examples(*sub, "servoflow bench --synthetic tiny --views 2 --tokens 48 --repeat 50",
               "servoflow bench --matrix bench/matrices/tiny.toml --out build/matrix");
  sub->callback([o, horizon, views, &action] {
    set_up_logging(o->common);
    o->bench.horizon_given = horizon->count() > 0;
    o->bench.robot_views = views->count() == 0;
    action = [o] { return bench(*o); };
  });
}

}  // namespace servoflow::cli
