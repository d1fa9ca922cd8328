#include <memory>

#include "commands.h"
#include "contract/toml_robot.h"
#include "contract/validate.h"
#include "core/status_macros.h"
#include "policy/neutral_contract.h"
#include "toolkit/memory_plan.h"
#include "weights/write_synthetic.h"

namespace servoflow::cli {
namespace {

struct Options {
  CommonOptions common;
  std::string model, layout = "openpi", dtype = "bf16", robot, tokenizer, out;
  std::uint64_t seed = 0;
  int horizon = 50;
};

Status synth(const Options& o) {
  weights::SynthOptions options{
      .out = o.out,
      .layout = o.layout == "lerobot" ? weights::Layout::kLerobot : weights::Layout::kOpenpi,
      .dtype = o.dtype == "fp32" ? DType::kF32 : DType::kBF16,
      .seed = o.seed,
      .tokenizer = o.tokenizer,
      .threads = o.common.threads};
  SF_ASSIGN_OR_RETURN(options.architecture, policy::synthetic_architecture(o.model, o.horizon));
  if (!o.robot.empty()) {
    SF_ASSIGN_OR_RETURN(const contract::Contract robot, contract::load_robot(o.robot));
    options.state_width = contract::state_width(robot);
    options.action_width = robot.actions.width;
    if (!robot.asset.empty()) options.asset = robot.asset;
  }
  Progress writing("writing weights");
  std::uint64_t bytes = 0;
  SF_RETURN_IF_ERROR(weights::write_synthetic(options, [&](std::uint64_t done, std::uint64_t total) {
    bytes = total;
    writing.update(done, total);
  }));
  writing.finish();
  const Output out(o.common);
  SF_RETURN_IF_ERROR(out.json({{"checkpoint", o.out},
                               {"model", o.model},
                               {"layout", o.layout},
                               {"dtype", o.dtype},
                               {"seed", o.seed},
                               {"horizon", o.horizon},
                               {"robot", o.robot.empty() ? Json(nullptr) : Json(o.robot)},
                               {"weight_bytes", bytes}}));
  out.text(o.out + ": synthetic " + o.model + ", " + o.layout + " layout, " + o.dtype + ", seed " +
           std::to_string(o.seed) + ", " + toolkit::bytes_text(static_cast<double>(bytes)) + " of weights\n");
  return {};
}

}  // namespace

void add_synth(CLI::App& app, Action& action) {
  auto o = std::make_shared<Options>();
  CLI::App* sub =
      app.add_subcommand("synth", "Write a checkpoint of random weights that anyone can regenerate");
  sub->add_option("OUT", o->out, "Directory to make; must not exist or be empty")->required();
  sub->add_option("--model", o->model, "pi05, tiny, or a JSON file with an `architecture` block")
      ->required()
      ->type_name("pi05|tiny|FILE.json");
  sub->add_option("--layout", o->layout, "Layout of the directory")
      ->check(CLI::IsMember({"openpi", "lerobot"}).description(""))
      ->type_name("openpi|lerobot")
      ->capture_default_str();
  sub->add_option("--dtype", o->dtype, "What the weights are rounded to")
      ->check(CLI::IsMember({"bf16", "fp32"}).description(""))
      ->type_name("bf16|fp32")
      ->capture_default_str();
  add_seed_option(*sub, o->seed, "Seed of the weights");
  sub->add_option("--robot", o->robot, "Robot whose widths the statistics get; default: 32 columns")
      ->type_name("R");
  sub->add_option("--horizon", o->horizon, "Actions in a chunk")
      ->check(CLI::Range(1, 4096))
      ->type_name("H")
      ->capture_default_str();
  sub->add_option("--tokenizer", o->tokenizer, "SentencePiece model to copy into the directory")
      ->type_name("FILE");
  sub->add_option("--threads", o->common.threads, "CPU threads; 0 is one per core this process may use")
      ->check(CLI::Range(0, 1024))
      ->type_name("N")
      ->capture_default_str();
  add_output_options(*sub, o->common);
  add_examples(*sub,
               "servoflow synth --model tiny --robot libero --tokenizer "
               "tests/golden/tokenizer/tokenizer.model build/synth-tiny",
               "servoflow synth --model tiny --layout lerobot --dtype fp32 --seed 7 build/synth-lerobot");
  sub->callback([o, &action] {
    set_up_logging(o->common);
    action = [o] { return synth(*o); };
  });
}

}  // namespace servoflow::cli
