#include <memory>

#include "commands.h"
#include "toolkit/inspect.h"

namespace servoflow::cli {
namespace {

struct Options {
  CommonOptions common;
  std::string checkpoint, robot;
  bool scan = false;
};

Status inspect(const Options& o) {
  Progress scanning("scanning weights");
  const toolkit::InspectReport report = toolkit::inspect(
      o.checkpoint,
      {.robot = o.robot,
       .assets = o.common.assets,
       .tokenizer = o.common.tokenizer,
       .scan = o.scan,
       .scanning = [&](std::uint64_t done, std::uint64_t total) { scanning.update(done, total); }});
  scanning.finish();
  const Output out(o.common);
  if (const Status written = out.json(toolkit::inspect_to_json(report)); !written.ok()) return written;
  out.text(toolkit::inspect_text(report));
  return toolkit::inspect_outcome(report);
}

}  // namespace

void add_inspect(CLI::App& app, Action& action) {
  auto o = std::make_shared<Options>();
  CLI::App* sub =
      app.add_subcommand("inspect", "Show what a checkpoint is and holds, and everything wrong with it");
  sub->add_option("CHECKPOINT", o->checkpoint, "Checkpoint directory")->required();
  sub->add_option("--robot", o->robot, "Built-in robot or contract file; default: the checkpoint's own")
      ->type_name("R");
  sub->add_flag("--scan", o->scan, "Also read every weight and look for NaN and infinity");
  add_checkpoint_options(*sub, o->common);
  add_output_options(*sub, o->common);
  add_examples(*sub, "servoflow inspect tests/golden/openpi-tiny --robot libero",
               "servoflow inspect tests/golden/lerobot-tiny --scan --json -");
  sub->callback([o, &action] {
    set_up_logging(o->common);
    action = [o] { return inspect(*o); };
  });
}

}  // namespace servoflow::cli
