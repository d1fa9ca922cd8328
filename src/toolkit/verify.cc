#include "toolkit/verify.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string_view>
#include <tuple>

#include "contract/load.h"
#include "contract/statistics.h"
#include "core/status_macros.h"
#include "policy/network.h"
#include "stages/postprocess/postprocessor.h"
#include "stages/preprocess/preprocessor.h"
#include "toolkit/case_file.h"
#include "weights/checkpoint.h"

namespace servoflow::toolkit {
namespace {

// Stages in the order an inference produces them: by group, then layer or step, then k before v and v before
// x.
std::tuple<int, int, std::string> pipeline_order(const StageName& stage) {
  return {pipeline_rank(stage.group), stage.index, stage.group};
}

template <typename T>
Values values_of(std::span<const T> data, const Shape& shape) {
  return {shape, std::vector<double>(data.begin(), data.end())};
}

Values values_of(const SafeTensor& tensor) {
  Result<std::vector<double>> values = to_doubles(tensor);
  // The reader of cases admits only types that have values.
  return {tensor.shape, values.ok() ? std::move(*values) : std::vector<double>()};
}

// Judges one case's stages as they are produced.
class CaseJudge : public policy::StageTap {
 public:
  CaseJudge(const CaseFile& c, const ToleranceTable& table)
      : case_(c), table_(table), records_(c.expected.size()) {
    for (std::size_t i = 0; i < c.expected.size(); ++i) index_[c.expected[i].stage.name] = i;
  }

  // The network numbers pictures; recorded names carry the slot.
  void name_pictures(std::vector<std::string> slots) { slots_ = std::move(slots); }

  bool wants(std::string_view stage) const override { return index_.contains(recorded_name(stage)); }
  void record(std::string_view stage, std::span<const float> values, const Shape& shape) override {
    add(recorded_name(stage), values_of(values, shape));
  }

  void add(const std::string& name, const Values& got) {
    const auto it = index_.find(name);
    if (it == index_.end()) return;
    const ExpectedStage& e = case_.expected[it->second];
    const Values expected = values_of(*e.tensor);
    records_[it->second] = e.stage.exact ? judge_exact(e.stage, expected, got)
                                         : judge_stage(e.stage, expected, got, gates(e.stage));
  }
  // Normalised actions of the same case by another way, under the gates of the watched ones.
  void add_unwatched(const std::string& way, const Values& got) {
    const auto it = index_.find("actions_normalized");
    if (it == index_.end()) return;
    const ExpectedStage& e = case_.expected[it->second];
    unwatched_.push_back(judge_stage(e.stage, values_of(*e.tensor), got, gates(e.stage)));
    unwatched_.back().stage += "/" + way;
    unwatched_.back().case_name = case_.name;
  }
  void add_actions(const Values& got, std::span<const double> scale) {
    const auto it = index_.find("actions");
    if (it == index_.end()) return;
    const ExpectedStage& e = case_.expected[it->second];
    const double rms = root_mean_square(values_of(*case_.file.find("expect/actions_normalized")).data);
    records_[it->second] = judge_actions(values_of(*e.tensor), got, gates(e.stage), scale, rms);
  }

  // All records in the order of the pipeline. A stage nothing was produced for is a failure, not a silence;
  // tokens that were the case's input are neither.
  std::vector<Record> finish() {
    std::vector<std::size_t> order;
    for (std::size_t i = 0; i < records_.size(); ++i) {
      const StageName& stage = case_.expected[i].stage;
      if (!records_[i]) {
        if (stage.exact && case_.entry == CaseEntry::kTokens) continue;
        records_[i] = Record{
            .stage = stage.name, .group = stage.group, .gates = gates(stage), .judged = true, .pass = false};
        records_[i]->note = "the engine produces no such stage for this case";
      }
      records_[i]->case_name = case_.name;
      order.push_back(i);
    }
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
      return pipeline_order(case_.expected[a].stage) < pipeline_order(case_.expected[b].stage);
    });
    std::vector<Record> out;
    for (std::size_t i : order) out.push_back(std::move(*records_[i]));
    for (Record& r : unwatched_) out.push_back(std::move(r));
    return out;
  }

 private:
  std::string recorded_name(std::string_view stage) const {
    for (const std::string_view kind : {"vision/", "image/"}) {
      if (!stage.starts_with(kind)) continue;
      const std::size_t picture = std::strtoul(std::string(stage.substr(kind.size())).c_str(), nullptr, 10);
      if (picture < slots_.size()) return std::string(kind) + slots_[picture];
    }
    return std::string(stage);
  }
  Gates gates(const StageName& stage) const {
    const auto it = table_.find(stage.group);
    return it == table_.end() ? Gates{} : it->second;
  }

  const CaseFile& case_;
  const ToleranceTable& table_;
  std::map<std::string, std::size_t> index_;
  std::vector<std::optional<Record>> records_;
  std::vector<Record> unwatched_;
  std::vector<std::string> slots_;
};

class Verifier {
 public:
  Verifier(const VerifyOptions& options, weights::Checkpoint checkpoint)
      : options_(options), checkpoint_(std::move(checkpoint)) {}

  // What can be known before any weight is read.
  Status check(const std::vector<CaseFile>& cases) const {
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
        problem(
            c, "metadata format: recorded with " + c.format + ", the checkpoint has " + layout + "'s layout");
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
  Status open(const std::vector<CaseFile>& cases) {
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
    SF_ASSIGN_OR_RETURN(network_,
                        policy::Network::create(checkpoint_.source, checkpoint_.architecture, network));
    return {};
  }

  const policy::NetworkInfo& info() const { return network_->info(); }
  std::string layout() const { return weights::layout_name(checkpoint_.layout); }

  Result<std::vector<Record>> run(const CaseFile& c, const ToleranceTable& table) {
    CaseJudge judge(c, table);
    stages::ModelInput input;
    std::optional<contract::Contract> contract;
    if (c.entry == CaseEntry::kFrames) {
      SF_ASSIGN_OR_RETURN(contract, contract_for(c));
      SF_RETURN_IF_ERROR(preprocess(c, *contract, input, judge));
    } else {
      take_pictures_and_tokens(c, input, judge);
    }

    const weights::Architecture& a = checkpoint_.architecture;
    std::vector<float> normalized(static_cast<std::size_t>(a.horizon) *
                                  static_cast<std::size_t>(a.action_dim));
    const policy::NetworkRequest request{.input = &input, .noise = c.noise, .actions = normalized};
    SF_RETURN_IF_ERROR(network_->run({&request, 1}, c.steps, nullptr, &judge));

    judge.add("actions_normalized", normalized_actions(c, normalized));
    if (contract && c.file.find("expect/actions") != nullptr) {
      SF_ASSIGN_OR_RETURN(const auto post, stages::Postprocessor::create(*contract, a.action_dim));
      std::vector<double> actions;
      int width = 0;
      SF_RETURN_IF_ERROR(post->run(normalized, a.horizon, input, actions, width));
      judge.add_actions(values_of(std::span<const double>(actions), {a.horizon, width}),
                        action_scale(contract->action_norm, width));
    }
    // Watched, a GPU goes stage by stage; unwatched it replays one record. That is what a robot gets, so it
    // is judged as well: the first call records, the second one replays.
    if (!info().hardware.empty())
      for (int call = 0; call < 2; ++call) {
        std::fill(normalized.begin(), normalized.end(), std::numeric_limits<float>::quiet_NaN());
        SF_RETURN_IF_ERROR(network_->run({&request, 1}, c.steps, nullptr, nullptr));
        judge.add_unwatched(call == 0 ? "recording" : "replayed", normalized_actions(c, normalized));
      }
    return judge.finish();
  }

 private:
  // The case's own contract, or else the checkpoint's statistics; with the case's cameras, prompt and widths:
  // what a case says wins over a robot's file.
  Result<contract::Contract> contract_for(const CaseFile& c) const {
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
      SF_ASSIGN_OR_RETURN(out, contract::load_contract(
                                   checkpoint_.path, {.assets = options_.assets, .lerobot_layout = lerobot}));
    }
    out.name = c.robot;
    out.cameras.clear();
    for (const std::string& slot : c.slots) out.cameras.push_back({slot, slot, true});
    out.ignored_images.clear();
    out.prompt.mode =
        c.prompt_mode == CasePrompt::kState ? contract::PromptMode::kState : contract::PromptMode::kPlain;
    out.prompt.max_tokens = c.max_tokens;
    if (c.action_width) out.actions.width = *c.action_width;
    return out;
  }

  Status preprocess(const CaseFile& c, const contract::Contract& contract, stages::ModelInput& input,
                    CaseJudge& judge) const {
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

    std::vector<std::string> slots;
    const Shape picture{a.vision.image, a.vision.image, 3};
    for (int p = 0; p < input.picture_count; ++p) {
      const stages::CameraPicture& one = input.pictures[static_cast<std::size_t>(p)];
      slots.push_back(contract.cameras[static_cast<std::size_t>(one.slot)].slot);
      if (!one.is_raw)  // else the network makes it, and is watched
        judge.add("image/" + slots.back(), values_of(std::span<const float>(one.pixels), picture));
    }
    judge.name_pictures(std::move(slots));

    const auto width = static_cast<std::int64_t>(input.state_normalized.size());
    judge.add("state_normalized", values_of(std::span<const double>(input.state_normalized), {width}));
    // Recorded ids are padded with 0 to whatever length the recorder used.
    const SafeTensor* recorded = c.file.find("expect/tokens");
    Values ids{{static_cast<std::int64_t>(input.tokens.size())}, {input.tokens.begin(), input.tokens.end()}};
    Values mask{ids.shape, std::vector<double>(ids.data.size(), 1)};
    if (recorded != nullptr && recorded->shape[0] > ids.shape[0])
      for (Values* v : {&ids, &mask}) {
        v->shape[0] = recorded->shape[0];
        v->data.resize(static_cast<std::size_t>(recorded->shape[0]), 0);
      }
    judge.add("tokens", ids);
    judge.add("token_mask", mask);
    return {};
  }

  static void take_pictures_and_tokens(const CaseFile& c, stages::ModelInput& input, CaseJudge& judge) {
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
    judge.name_pictures(c.slots);
  }

  // openpi records every column of the flow, lerobot only the robot's.
  Values normalized_actions(const CaseFile& c, const std::vector<float>& all) const {
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

  const VerifyOptions& options_;
  weights::Checkpoint checkpoint_;
  std::string tokenizer_;
  std::unique_ptr<policy::Network> network_;
};

}  // namespace

Result<VerifyReport> verify_checkpoint(const std::string& checkpoint, const VerifyOptions& options) {
  VerifyReport report{.checkpoint = checkpoint,
                      .cases = options.cases.empty() ? (std::filesystem::path(checkpoint) / "cases").string()
                                                     : options.cases};
  SF_ASSIGN_OR_RETURN(weights::Checkpoint opened, weights::open_checkpoint(checkpoint));
  SF_ASSIGN_OR_RETURN(const std::vector<CaseFile> cases, read_cases(report.cases));
  Verifier verifier(options, std::move(opened));
  SF_RETURN_IF_ERROR(verifier.check(cases));
  SF_RETURN_IF_ERROR(verifier.open(cases));
  report.layout = verifier.layout();
  report.device = verifier.info().device;
  report.backend = verifier.info().backend;
  report.precision = verifier.info().precision;
  report.threads = verifier.info().threads;
  report.case_count = static_cast<int>(cases.size());

  for (std::size_t i = 0; i < cases.size(); ++i) {
    const CaseFile& c = cases[i];
    if (options.running) options.running(static_cast<int>(i), report.case_count, c.name);
    const auto table = c.tolerances.find(report.precision);
    if (table == c.tolerances.end())
      report.notes.push_back(c.name + ": has no tolerances for " + report.precision +
                             ": its stages are not judged");
    const ToleranceTable none;
    Result<std::vector<Record>> records = verifier.run(c, table == c.tolerances.end() ? none : table->second);
    if (!records.ok()) return records.status().with_context(c.file.path());
    for (Record& r : *records) {
      if (r.judged) ++(r.pass ? report.passed : report.failed);
      report.records.push_back(std::move(r));
    }
    for (const std::string& note : c.notes) report.notes.push_back(c.name + ": " + note);
  }
  return report;
}

Status verify_outcome(const VerifyReport& report) {
  if (report.failed > 0)
    return Status::check_failed(report.checkpoint + ": " + std::to_string(report.failed) + " of " +
                                std::to_string(report.passed + report.failed) +
                                " judged records are outside their gates");
  if (report.passed == 0)
    return Status::check_failed(report.cases + ": nothing in these cases is judged at precision " +
                                report.precision);
  return {};
}

}  // namespace servoflow::toolkit
