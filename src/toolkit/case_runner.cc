#include "toolkit/case_runner.h"

#include <algorithm>
#include <cstdlib>

#include "contract/load.h"
#include "contract/statistics.h"
#include "contract/toml_robot.h"
#include "core/status_macros.h"
#include "stages/postprocess/postprocessor.h"
#include "stages/preprocess/preprocessor.h"

namespace servoflow::toolkit {

std::string CaseTap::recorded_name(std::string_view stage) const {
  for (const std::string_view kind : {"vision/", "image/"}) {
    if (!stage.starts_with(kind)) continue;
    const std::size_t picture = std::strtoul(std::string(stage.substr(kind.size())).c_str(), nullptr, 10);
    if (picture < slots_.size()) return std::string(kind) + slots_[picture];
  }
  return std::string(stage);
}

Result<std::unique_ptr<CaseRunner>> CaseRunner::open(weights::Checkpoint checkpoint,
                                                     std::span<const CaseFile> cases,
                                                     const CaseRunnerOptions& options) {
  std::unique_ptr<CaseRunner> runner(new CaseRunner(options, std::move(checkpoint)));
  SF_RETURN_IF_ERROR(runner->check(cases));
  SF_RETURN_IF_ERROR(runner->open_network(cases));
  return runner;
}

// What can be known before any weight is read.
Status CaseRunner::check(std::span<const CaseFile> cases) const {
  std::string problems;
  const weights::Architecture& a = checkpoint_.architecture;
  const auto problem = [&](const CaseFile& c, const std::string& cause) {
    problems += (problems.empty() ? "" : "\n") + c.file.path() + ": " + cause;
  };
  const std::string layout = weights::layout_name(checkpoint_.layout);
  for (const CaseFile& c : cases) {
    if (c.horizon != a.horizon || c.action_dim != a.action_dim)
      problem(c, "input/noise: is [" + std::to_string(c.horizon) + ", " + std::to_string(c.action_dim) +
                     "], the checkpoint's horizon and action width are " + std::to_string(a.horizon) +
                     " and " + std::to_string(a.action_dim));
    if (checkpoint_.layout != weights::Layout::kServoflow && c.format != layout)
      problem(c,
              "metadata format: recorded with " + c.format + ", the checkpoint has " + layout + "'s layout");
    if (c.entry == CaseEntry::kTokens)
      for (const CaseImage& image : c.images)
        if (image.height != a.vision.image || image.width != a.vision.image)
          problem(c, "input/image/" + image.slot + ": entry \"tokens\" needs pictures at model size, " +
                         std::to_string(a.vision.image) + " x " + std::to_string(a.vision.image));
    for (const ExpectedStage& e : c.expected)
      if ((e.stage.group == "k" || e.stage.group == "v") && e.stage.index >= a.prefix.depth)
        problem(c, "expect/" + e.stage.name + ": the checkpoint has " + std::to_string(a.prefix.depth) +
                       " layers");
  }
  return problems.empty() ? Status() : Status::invalid(problems);
}

// One network serves all cases: as many pictures and tokens as the largest needs.
Status CaseRunner::open_network(std::span<const CaseFile> cases) {
  policy::NetworkOptions network{.device = options_.device,
                                 .precision = options_.precision,
                                 .threads = options_.threads,
                                 .max_pictures = 1,
                                 .progress = options_.loading};
  for (const CaseFile& c : cases) {
    network.max_pictures = std::max(network.max_pictures, static_cast<int>(c.images.size()));
    checkpoint_.architecture.max_tokens = std::max(checkpoint_.architecture.max_tokens, c.max_tokens);
    if (c.entry == CaseEntry::kFrames && tokenizer_.empty()) {
      SF_ASSIGN_OR_RETURN(tokenizer_, weights::find_tokenizer(checkpoint_, options_.tokenizer));
    }
  }
  SF_ASSIGN_OR_RETURN(
      network_, policy::Network::create(options_.source != nullptr ? options_.source : checkpoint_.source,
                                        checkpoint_.architecture, network));
  return {};
}

namespace {

// Labels that fit the case's columns: where neither case nor checkpoint has any, those of the built-in robot
// that the case names, else of the one that the contract is called after.
void label_actions(const std::string& case_robot, const std::string& contract_name,
                   contract::Actions& actions) {
  const auto drop_unfit = [&] {
    for (std::vector<std::string>* labels : {&actions.names, &actions.units})
      if (labels->size() != static_cast<std::size_t>(actions.width)) labels->clear();
  };
  drop_unfit();
  const std::vector<std::string> builtin = contract::list_builtin_robots();
  for (const std::string& robot : {case_robot, contract_name}) {
    if (!actions.names.empty() || !actions.units.empty()) break;
    if (std::find(builtin.begin(), builtin.end(), robot) == builtin.end()) continue;
    Result<contract::Contract> known = contract::load_robot(robot);
    if (!known.ok() || known->actions.width != actions.width) continue;
    actions.names = std::move(known->actions.names);
    actions.units = std::move(known->actions.units);
  }
  drop_unfit();
}

}  // namespace

// The case's own contract, or else the checkpoint's statistics; with the case's cameras, prompt and widths:
// what a case says wins over a robot's file.
Result<contract::Contract> CaseRunner::contract_for(const CaseFile& c) const {
  contract::Contract out;
  if (checkpoint_.layout == weights::Layout::kOpenpi) {
    SF_ASSIGN_OR_RETURN(const contract::OpenpiStatistics statistics,
                        contract::load_openpi_statistics(checkpoint_.path, options_.assets));
    out.asset = statistics.asset;
    out.state_norm.stats = statistics.state;
    out.action_norm.stats = statistics.actions;
    out.state_parts = {{"state", static_cast<int>(c.state.size())}};
    if (c.contract) {
      out.state_parts = c.contract->state_parts;
      out.state_transforms = c.contract->state_transforms;
      out.actions = c.contract->actions;
    }
  } else if (c.contract) {
    out = *c.contract;
  } else {
    const bool lerobot = checkpoint_.layout == weights::Layout::kLerobot;
    SF_ASSIGN_OR_RETURN(out, contract::load_contract(checkpoint_.path,
                                                     {.assets = options_.assets, .lerobot_layout = lerobot}));
  }
  const std::string contract_name = out.name;
  out.name = c.robot;
  out.cameras.clear();
  for (const std::string& slot : c.slots) out.cameras.push_back({slot, slot, true});
  out.ignored_images.clear();
  out.prompt.mode =
      c.prompt_mode == CasePrompt::kState ? contract::PromptMode::kState : contract::PromptMode::kPlain;
  out.prompt.max_tokens = c.max_tokens;
  if (c.action_width) out.actions.width = *c.action_width;
  label_actions(c.robot, contract_name, out.actions);
  return out;
}

Status CaseRunner::preprocess(const CaseFile& c, const contract::Contract& contract,
                              stages::ModelInput& input, CaseTap* tap) const {
  const weights::Architecture& a = checkpoint_.architecture;
  SF_ASSIGN_OR_RETURN(const auto stage,
                      stages::Preprocessor::create(contract, {.image_size = a.vision.image,
                                                              .tokenizer_path = tokenizer_,
                                                              .vocab = a.vocab,
                                                              .max_tokens = c.max_tokens,
                                                              .raw_frames = network_->info().raw_frames}));
  Observation observation;
  for (const CaseImage& image : c.images)
    observation.images.push_back({image.slot, ImageLayout::kHWC, image.height, image.width, image.rgb});
  observation.state = c.state;
  observation.prompt = c.prompt;
  SF_RETURN_IF_ERROR(stage->run(observation, input));
  if (tap == nullptr) return {};

  std::vector<std::string> slots;
  const Shape picture{a.vision.image, a.vision.image, 3};
  for (int p = 0; p < input.picture_count; ++p) {
    const stages::CameraPicture& one = input.pictures[static_cast<std::size_t>(p)];
    slots.push_back(contract.cameras[static_cast<std::size_t>(one.slot)].slot);
    if (!one.is_raw)  // else the network makes it, and is watched
      tap->add("image/" + slots.back(), values_of(std::span<const float>(one.pixels), picture));
  }
  tap->name_pictures(std::move(slots));

  const auto width = static_cast<std::int64_t>(input.state_normalized.size());
  tap->add("state_normalized", values_of(std::span<const double>(input.state_normalized), {width}));
  // Recorded ids are padded with 0 to whatever length the recorder used.
  const SafeTensor* recorded = c.file.find("expect/tokens");
  Values ids{{static_cast<std::int64_t>(input.tokens.size())}, {input.tokens.begin(), input.tokens.end()}};
  Values mask{ids.shape, std::vector<double>(ids.data.size(), 1)};
  if (recorded != nullptr && recorded->shape[0] > ids.shape[0])
    for (Values* v : {&ids, &mask}) {
      v->shape[0] = recorded->shape[0];
      v->data.resize(static_cast<std::size_t>(recorded->shape[0]), 0);
    }
  tap->add("tokens", ids);
  tap->add("token_mask", mask);
  return {};
}

namespace {

void take_pictures_and_tokens(const CaseFile& c, stages::ModelInput& input, CaseTap* tap) {
  for (const CaseImage& image : c.images) {
    stages::CameraPicture picture{.slot = static_cast<int>(input.pictures.size())};
    picture.pixels.resize(image.rgb.size());
    std::transform(image.rgb.begin(), image.rgb.end(), picture.pixels.begin(),
                   [](std::uint8_t v) { return static_cast<float>(v) / 255.0f * 2.0f - 1.0f; });
    input.pictures.push_back(std::move(picture));
  }
  input.picture_count = static_cast<int>(c.images.size());
  input.tokens = c.tokens;
  input.state = c.state;
  if (tap != nullptr) tap->name_pictures(c.slots);
}

}  // namespace

Result<CaseOutcome> CaseRunner::run(const CaseFile& c, CaseTap* tap, int steps) {
  CaseOutcome out;
  stages::ModelInput input;
  const bool frames = c.entry == CaseEntry::kFrames;
  if (frames) {
    SF_ASSIGN_OR_RETURN(out.contract, contract_for(c));
    SF_RETURN_IF_ERROR(preprocess(c, out.contract, input, tap));
  } else {
    take_pictures_and_tokens(c, input, tap);
  }
  const weights::Architecture& a = checkpoint_.architecture;
  out.normalized.resize(static_cast<std::size_t>(a.horizon) * static_cast<std::size_t>(a.action_dim));
  const policy::NetworkRequest request{.input = &input, .noise = c.noise, .actions = out.normalized};
  SF_RETURN_IF_ERROR(network_->run({&request, 1}, steps > 0 ? steps : c.steps, nullptr, tap));
  if (frames) {
    SF_ASSIGN_OR_RETURN(const auto post, stages::Postprocessor::create(out.contract, a.action_dim));
    SF_RETURN_IF_ERROR(post->run(out.normalized, a.horizon, input, out.actions, out.width));
    out.scale = action_scale(out.contract.action_norm, out.width);
  }
  return out;
}

// openpi records every column of the flow, lerobot only the robot's.
Values CaseRunner::normalized_actions(const CaseFile& c, const std::vector<float>& all) const {
  const weights::Architecture& a = checkpoint_.architecture;
  const SafeTensor* recorded = c.file.find("expect/actions_normalized");
  const bool cut = c.format == "lerobot" && recorded != nullptr && recorded->shape.rank() == 2 &&
                   recorded->shape[1] < a.action_dim &&
                   (!c.action_width || *c.action_width == recorded->shape[1]);
  const int columns = cut ? static_cast<int>(recorded->shape[1]) : a.action_dim;
  Values out{{a.horizon, columns}, {}};
  for (int h = 0; h < a.horizon; ++h) {
    const auto row = all.begin() + static_cast<std::ptrdiff_t>(h) * a.action_dim;
    out.data.insert(out.data.end(), row, row + columns);
  }
  return out;
}

}  // namespace servoflow::toolkit
