#include <fmt/format.h>

#include <cmath>
#include <limits>
#include <memory>
#include <set>

#include "commands.h"
#include "core/file.h"
#include "core/status_macros.h"
#include "core/zones.h"
#include "toolkit/npy.h"
#include "toolkit/plot.h"
#include "toolkit/trace.h"
#include "toolkit/writers.h"

namespace servoflow::cli {
namespace {

constexpr std::size_t kMaxImageFile = std::size_t{256} << 20;

struct Options {
  CommonOptions common;
  std::string checkpoint, robot, state, noise, out, plot, trace;
  std::optional<std::string> prompt;
  std::vector<std::string> images;
  std::uint64_t seed = 0;
  int steps = 0;
};

// The files and numbers behind an Observation, which borrows all of them.
struct Inputs {
  std::vector<std::pair<std::string, std::string>> images;  // slot, path
  std::vector<std::vector<std::uint8_t>> files;
  std::vector<double> state;
  std::vector<float> noise;
  Shape noise_shape;

  Observation observation(const std::optional<std::string>& prompt) const {
    Observation out;
    for (std::size_t i = 0; i < images.size(); ++i)
      out.images.push_back({.name = images[i].first, .layout = ImageLayout::kEncoded, .bytes = files[i]});
    out.state = state;
    if (prompt) out.prompt = *prompt;
    return out;
  }
};

Status read_noise(const std::string& path, Inputs& in) {
  SF_ASSIGN_OR_RETURN(const toolkit::NpyArray array, toolkit::read_npy(path));
  in.noise_shape = array.shape;
  for (double value : array.values) {
    if (!(std::abs(value) <= std::numeric_limits<float>::max()))
      return Status::invalid(path + ": noise: value " + std::to_string(in.noise.size()) +
                             " is not a finite float32");
    in.noise.push_back(static_cast<float>(value));
  }
  return {};
}

// Everything that can be wrong without a checkpoint, before a long load.
Result<Inputs> read_inputs(const Options& o) {
  Inputs in;
  if (!o.out.empty()) SF_RETURN_IF_ERROR(toolkit::check_chunk_path(o.out));
  std::set<std::string> seen;
  for (const std::string& text : o.images) {
    SF_ASSIGN_OR_RETURN(auto pair, parse_assignment(text, "--image"));
    if (!seen.insert(pair.first).second) return Status::invalid("--image " + pair.first + ": given twice");
    Result<std::vector<std::uint8_t>> file = read_binary_file(pair.second, kMaxImageFile);
    if (!file.ok()) return file.status().with_context("--image " + pair.first);
    in.files.push_back(std::move(*file));
    in.images.push_back(std::move(pair));
  }
  if (!o.state.empty()) {
    SF_ASSIGN_OR_RETURN(in.state, parse_numbers(o.state, "--state"));
  }
  if (!o.noise.empty()) SF_RETURN_IF_ERROR(read_noise(o.noise, in).with_context("--noise"));
  return in;
}

std::string action_table(const ActionChunk& c) {
  std::string out = "  step";
  for (int d = 0; d < c.action_dim; ++d) out += fmt::format("{:>12}", fmt::format("a{}", d));
  out += "\n";
  for (int h = 0; h < c.horizon; ++h) {
    out += fmt::format("{:>6}", h);
    for (int d = 0; d < c.action_dim; ++d)
      out += fmt::format("{:>12.5g}",
                         c.actions[static_cast<std::size_t>(h) * static_cast<std::size_t>(c.action_dim) +
                                   static_cast<std::size_t>(d)]);
    out += "\n";
  }
  return out;
}

std::string times_text(const StageTimes& t) {
  return fmt::format(
      "ms: preprocess {:.2f} + vision {:.2f} + prefix {:.2f} + denoise {:.2f} ({} steps of {:.2f}) + "
      "postprocess {:.2f} = total "
      "{:.2f}\n",
      t.preprocess, t.vision, t.prefix, t.denoise, t.steps.size(),
      t.steps.empty() ? 0 : t.denoise / static_cast<double>(t.steps.size()), t.postprocess, t.total);
}

Status run(Options& o) {
  SF_ASSIGN_OR_RETURN(const Inputs in, read_inputs(o));
  Progress loading("loading weights"), preparing("recording");
  SF_ASSIGN_OR_RETURN(const Json chosen, apply_machine_profile(o.common, o.checkpoint));
  PolicyOptions options = policy_options(o.common);
  options.robot = o.robot;
  options.check_robot = true;  // a wrong robot is told at once, not after the weights
  if (o.steps != 0) options.prepare_steps = {o.steps};
  options.progress = [&](std::uint64_t done, std::uint64_t total) { loading.update(done, total); };
  options.preparing = [&](std::uint64_t done, std::uint64_t total) {
    loading.finish();
    preparing.update(done, total);
  };
  SF_ASSIGN_OR_RETURN(const Policy policy, Policy::open(o.checkpoint, options));
  loading.finish();
  preparing.finish();
  const PolicyInfo& info = policy.info();
  const Shape wanted{info.horizon, info.model_action_dim};
  if (!o.noise.empty() && !(in.noise_shape == wanted))
    return Status::invalid("--noise " + o.noise + ": shape " + in.noise_shape.to_string() +
                           ", this policy needs " + wanted.to_string());
  SF_ASSIGN_OR_RETURN(Session session, policy.new_session({.seed = o.seed}));

  const Observation observation = in.observation(o.prompt);
  if (!o.trace.empty()) zones::enable(true);
  SF_ASSIGN_OR_RETURN(const ActionChunk chunk,
                      session.infer(observation, {.steps = o.steps, .noise = in.noise}));
  zones::enable(false);
  if (chunk.times.recorded)
    log_info("the device had to record this inference first; the next of its kind is several times faster");
  if (chunk.prompt_truncated)
    log_warning("the prompt is longer than the policy's " + std::to_string(info.max_tokens) +
                " tokens; its end was cut off");

  Json json = toolkit::chunk_to_json(chunk);
  json["checkpoint"] = info.checkpoint;
  json["layout"] = info.layout;
  json["threads"] = info.threads;
  json["ready_s"] = info.ready_seconds;
  json["precisions"] = toolkit::precisions_to_json(info.components);
  json["seed"] = o.seed;
  json["chosen"] = chosen;
  std::string text =
      fmt::format("{} ({}) on {}, {}, {} threads; ready in {:.2f} s\n", info.checkpoint, info.layout,
                  chunk.backend, chunk.precision, info.threads, info.ready_seconds);
  text += toolkit::precisions_text(info.components);
  text +=
      fmt::format("contract {}; {} prefix tokens\n\nactions [{}, {}] in robot units\n",
                  chunk.contract_hash.substr(0, 16), chunk.prefix_tokens, chunk.horizon, chunk.action_dim);
  text += action_table(chunk) + "\n" + times_text(chunk.times);

  if (!o.out.empty()) SF_RETURN_IF_ERROR(toolkit::write_chunk(chunk, o.out));
  if (!o.plot.empty()) {
    const toolkit::PlotOptions plot{
        .title = o.prompt.value_or("actions"),
        .subtitle = info.checkpoint + ", " + chunk.precision + ", seed " + std::to_string(o.seed)};
    SF_RETURN_IF_ERROR(write_file_atomically(o.plot, toolkit::plot_actions_svg(chunk, plot)));
  }
  if (!o.trace.empty()) {
    const std::vector<zones::Event> events = zones::collect();
    SF_RETURN_IF_ERROR(write_file_atomically(o.trace, toolkit::trace_to_json(events).dump() + "\n"));
    const std::vector<toolkit::Component> table = toolkit::component_table(events);
    text += "\n" + toolkit::component_text(table);
    json["components"] = toolkit::components_to_json(table);
  }
  const Output output(o.common);
  SF_RETURN_IF_ERROR(output.json(json));
  output.text(text);
  return {};
}

}  // namespace

void add_run(CLI::App& app, Action& action) {
  auto o = std::make_shared<Options>();
  CLI::App* sub =
      app.add_subcommand("run", "One inference on real files: camera pictures, state and prompt to actions");
  sub->add_option("CHECKPOINT", o->checkpoint, "Checkpoint directory")->required();
  sub->add_option("--robot", o->robot, "Built-in robot or contract file; default: the checkpoint's own")
      ->type_name("R");
  sub->add_option("--image", o->images,
                  "Camera picture (PNG or JPEG) by model slot or request key; repeat per camera")
      ->type_name("SLOT=FILE")
      ->allow_extra_args(false);
  sub->add_option("--state", o->state, "Robot state in its own units, separated by commas")
      ->type_name("0.1,-2,…");
  sub->add_option("--prompt", o->prompt, "What the robot is told to do")->type_name("TEXT");
  sub->add_option("--steps", o->steps, "Denoise steps; default: the checkpoint's")
      ->check(CLI::Range(1, 50))
      ->type_name("N");
  add_seed_option(*sub, o->seed, "Seed of the noise the flow starts from");
  sub->add_option("--noise", o->noise,
                  "Noise instead of a seed: float array [horizon, action dims of the model]")
      ->type_name("FILE.npy");
  sub->add_option("--out", o->out, "Write the actions; the ending decides the format")
      ->type_name("FILE.{json,npy,csv}");
  sub->add_option("--plot", o->plot, "Draw the actions")->type_name("FILE.svg");
  sub->add_option("--trace", o->trace, "Write a trace for chrome://tracing and print the time per component")
      ->type_name("FILE.json");
  add_device_options(*sub, o->common, "auto");
  add_profile_option(*sub, o->common);
  add_checkpoint_options(*sub, o->common);
  add_output_options(*sub, o->common);
  add_examples(
      *sub,
      "servoflow run tests/golden/openpi-tiny --robot libero --state 0,0,0,0,0,0,0,0 --prompt 'open the "
      "drawer' "
      "--image base_0_rgb=tests/golden/images/drawer_open_corner4_224x224.png "
      "--image left_wrist_0_rgb=tests/golden/images/push_gripperPOV_256x256.png",
      "servoflow run tests/golden/lerobot-tiny --state 0,0,0,0,0,0,0,0 --prompt 'push' --precision fp32 "
      "--image observation.images.top=tests/golden/images/push_corner4_640x480.png --json -");
  sub->callback([o, &action] {
    set_up_logging(o->common);
    action = [o] { return run(*o); };
  });
}

}  // namespace servoflow::cli
