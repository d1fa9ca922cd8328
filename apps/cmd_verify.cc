#include <memory>

#include "commands.h"
#include "toolkit/verify.h"

namespace servoflow::cli {
namespace {

struct Options {
  CommonOptions common;
  std::string checkpoint, cases;
  bool all = false;
};

Status verify(const Options& o) {
  Progress loading("loading weights"), running("verifying");
  toolkit::VerifyOptions options{.cases = o.cases,
                                 .device = o.common.device,
                                 .precision = o.common.precision,
                                 .tokenizer = o.common.tokenizer,
                                 .assets = o.common.assets,
                                 .threads = o.common.threads};
  options.loading = [&](std::uint64_t done, std::uint64_t total) { loading.update(done, total); };
  options.running = [&](int done, int total, const std::string& next) {
    loading.finish();
    running.update(static_cast<std::uint64_t>(done), static_cast<std::uint64_t>(total), next);
  };
  const Result<toolkit::VerifyReport> report = toolkit::verify_checkpoint(o.checkpoint, options);
  running.finish();
  if (!report.ok()) return report.status();
  for (const std::string& note : report->notes) log_info(note);
  const Output out(o.common);
  if (const Status written = out.json(toolkit::verify_to_json(*report)); !written.ok()) return written;
  out.text(toolkit::verify_text(*report, o.all));
  return toolkit::verify_outcome(*report);
}

}  // namespace

void add_verify(CLI::App& app, Action& action) {
  auto o = std::make_shared<Options>();
  CLI::App* sub =
      app.add_subcommand("verify", "Recompute recorded cases and judge every stage against the reference");
  sub->add_option("CHECKPOINT", o->checkpoint, "Checkpoint directory")->required();
  sub->add_option("--cases", o->cases, "Folder of recorded cases; default: CHECKPOINT/cases")
      ->type_name("DIR");
  sub->add_flag("--all", o->all, "Print every record, not only the worst of each stage");
  add_device_options(*sub, o->common, "fp32");
  add_checkpoint_options(*sub, o->common);
  add_output_options(*sub, o->common);
  add_examples(*sub, "servoflow verify tests/golden/openpi-tiny",
               "servoflow verify tests/golden/lerobot-tiny --precision bf16 --all --json -");
  sub->callback([o, &action] {
    set_up_logging(o->common);
    action = [o] { return verify(*o); };
  });
}

}  // namespace servoflow::cli
