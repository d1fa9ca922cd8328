#include <memory>

#include "commands.h"
#include "core/status_macros.h"
#include "toolkit/compare.h"

namespace servoflow::cli {
namespace {

struct Options {
  CommonOptions common;
  toolkit::CompareSide a, b;
  std::string cases, gates, html;
  bool no_layers = false;
  int limit = 0, random_cases = 0;
  std::uint64_t seed = 0;
};

Status run_compare(const Options& o) {
  if (!o.html.empty()) SF_RETURN_IF_ERROR(toolkit::check_html_path(o.html));
  Progress loading("loading weights"), running("comparing");
  toolkit::CompareOptions options{.a = o.a,
                                  .b = o.b,
                                  .cases = o.cases,
                                  .gates = o.gates,
                                  .layers = !o.no_layers,
                                  .tokenizer = o.common.tokenizer,
                                  .assets = o.common.assets,
                                  .threads = o.common.threads,
                                  .limit = o.limit,
                                  .random_cases = o.random_cases,
                                  .seed = o.seed};
  if (options.b.checkpoint.empty()) options.b.checkpoint = o.a.checkpoint;
  options.loading = [&](std::uint64_t done, std::uint64_t total) { loading.update(done, total); };
  options.running = [&](int done, int total, const std::string& next) {
    loading.finish();
    running.update(static_cast<std::uint64_t>(done), static_cast<std::uint64_t>(total), next);
  };
  SF_ASSIGN_OR_RETURN(const toolkit::CompareReport report, toolkit::compare(options));
  loading.finish();
  running.finish();
  const Output out(o.common);
  SF_RETURN_IF_ERROR(out.json(toolkit::compare_to_json(report)));
  if (!o.html.empty()) SF_RETURN_IF_ERROR(toolkit::compare_html(report).write(o.html));
  out.text(toolkit::compare_text(report));
  return toolkit::compare_outcome(report);
}

}  // namespace

void add_compare(CLI::App& app, Action& action) {
  auto o = std::make_shared<Options>();
  CLI::App* sub = app.add_subcommand(
      "compare",
      "What another precision, checkpoint or device changes: by layer, by step, by action; with gates");
  sub->add_option("A", o->a.checkpoint, "Checkpoint directory: the original")->required();
  sub->add_option("B", o->b.checkpoint,
                  "Checkpoint directory that is judged; default: A in another precision or device");
  sub->add_option("--cases", o->cases,
                  "Folder of recorded cases (`serve --record` makes them); default: A/cases")
      ->type_name("DIR");
  o->a.precision = "fp32";
  sub->add_option("--precision-a", o->a.precision, "Precision of A")->type_name("P")->capture_default_str();
  sub->add_option("--precision-b", o->b.precision,
                  "Precision of B: fp32, bf16, auto, a recipe or a plan file")
      ->type_name("P")
      ->capture_default_str();
  sub->add_option("--device-a", o->a.device, "auto, cpu, cuda, cuda:N")
      ->type_name("D")
      ->capture_default_str();
  sub->add_option("--device-b", o->b.device, "auto, cpu, cuda, cuda:N")
      ->type_name("D")
      ->capture_default_str();
  sub->add_option("--gates", o->gates,
                  "noise: bands from the format's own noise, for random weights; trained: published cosines, "
                  "for trained "
                  "weights; or a JSON file. A failed gate exits with 1")
      ->type_name("noise|trained|FILE");
  sub->add_option("--html", o->html, "Report with figures, one file that works offline")
      ->type_name("FILE.html");
  sub->add_flag("--no-layers", o->no_layers, "Compare stages alone, not the inputs of every linear layer");
  sub->add_option("--limit", o->limit, "Cases at most, evenly spread over the folder; 0: all")
      ->check(CLI::NonNegativeNumber.description(""))
      ->type_name("N");
  CLI::Option* random = sub->add_option("--random-cases", o->random_cases,
                                        "Random observations instead of recorded cases, for random weights")
                            ->check(CLI::Range(1, 100000))
                            ->type_name("N");
  random->excludes("--cases");
  add_seed_option(*sub, o->seed, "Seed of random observations");
  sub->add_option("--threads", o->common.threads, "CPU threads; 0 is one per core this process may use")
      ->check(CLI::Range(0, 1024))
      ->type_name("N");
  add_checkpoint_options(*sub, o->common);
  add_output_options(*sub, o->common);
  add_examples(
      *sub, "servoflow compare tests/golden/openpi-tiny --precision-b bf16",
      "servoflow compare tests/golden/openpi-tiny --precision-b int8-w8a8 --gates noise --html compare.html");
  sub->callback([o, &action] {
    set_up_logging(o->common);
    action = [o] { return run_compare(*o); };
  });
}

}  // namespace servoflow::cli
