#include "toolkit/verify.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string_view>
#include <tuple>

#include "core/status_macros.h"
#include "toolkit/case_file.h"
#include "toolkit/case_runner.h"
#include "weights/checkpoint.h"

namespace servoflow::toolkit {
namespace {

// Stages in the order an inference produces them: by group, then layer or step, then k before v and v before
// x.
std::tuple<int, int, std::string> pipeline_order(const StageName& stage) {
  return {pipeline_rank(stage.group), stage.index, stage.group};
}

Values recorded_values(const SafeTensor& tensor) {
  Result<std::vector<double>> values = to_doubles(tensor);
  // The reader of cases admits only types that have values.
  return {tensor.shape, values.ok() ? std::move(*values) : std::vector<double>()};
}

// Judges one case's stages as they are produced.
class CaseJudge : public CaseTap {
 public:
  CaseJudge(const CaseFile& c, const ToleranceTable& table)
      : case_(c), table_(table), records_(c.expected.size()) {
    for (std::size_t i = 0; i < c.expected.size(); ++i) index_[c.expected[i].stage.name] = i;
  }

  bool wants(std::string_view stage) const override { return index_.contains(recorded_name(stage)); }
  void record(std::string_view stage, std::span<const float> values, const Shape& shape) override {
    add(recorded_name(stage), values_of(values, shape));
  }

  void add(const std::string& name, const Values& got) override {
    const auto it = index_.find(name);
    if (it == index_.end()) return;
    const ExpectedStage& e = case_.expected[it->second];
    const Values expected = recorded_values(*e.tensor);
    records_[it->second] = e.stage.exact ? judge_exact(e.stage, expected, got)
                                         : judge_stage(e.stage, expected, got, gates(e.stage));
  }
  // Normalised actions of the same case by another way, under the gates of the watched ones.
  void add_unwatched(const std::string& way, const Values& got) {
    const auto it = index_.find("actions_normalized");
    if (it == index_.end()) return;
    const ExpectedStage& e = case_.expected[it->second];
    unwatched_.push_back(judge_stage(e.stage, recorded_values(*e.tensor), got, gates(e.stage)));
    unwatched_.back().stage += "/" + way;
    unwatched_.back().case_name = case_.name;
  }
  void add_actions(const Values& got, std::span<const double> scale) {
    const auto it = index_.find("actions");
    if (it == index_.end()) return;
    const ExpectedStage& e = case_.expected[it->second];
    const double rms = root_mean_square(recorded_values(*case_.file.find("expect/actions_normalized")).data);
    records_[it->second] = judge_actions(recorded_values(*e.tensor), got, gates(e.stage), scale, rms);
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
  Gates gates(const StageName& stage) const {
    const auto it = table_.find(stage.group);
    return it == table_.end() ? Gates{} : it->second;
  }

  const CaseFile& case_;
  const ToleranceTable& table_;
  std::map<std::string, std::size_t> index_;
  std::vector<std::optional<Record>> records_;
  std::vector<Record> unwatched_;
};

// One case, judged: watched stage by stage, and on a device that records its work once more as a robot gets
// it.
Result<std::vector<Record>> judge_case(CaseRunner& runner, const CaseFile& c, const ToleranceTable& table) {
  CaseJudge judge(c, table);
  SF_ASSIGN_OR_RETURN(const CaseOutcome outcome, runner.run(c, &judge));
  judge.add("actions_normalized", runner.normalized_actions(c, outcome.normalized));
  if (outcome.width > 0 && c.file.find("expect/actions") != nullptr) {
    const int horizon = runner.checkpoint().architecture.horizon;
    judge.add_actions(values_of(std::span<const double>(outcome.actions), {horizon, outcome.width}),
                      outcome.scale);
  }
  // Watched, a GPU goes stage by stage; unwatched it replays one record. That is what a robot gets, so it
  // is judged as well: the first call records, the second one replays.
  if (!runner.info().hardware.empty())
    for (int call = 0; call < 2; ++call) {
      SF_ASSIGN_OR_RETURN(const CaseOutcome again, runner.run(c, nullptr));
      judge.add_unwatched(call == 0 ? "recording" : "replayed",
                          runner.normalized_actions(c, again.normalized));
    }
  return judge.finish();
}

}  // namespace

Result<VerifyReport> verify_checkpoint(const std::string& checkpoint, const VerifyOptions& options) {
  VerifyReport report{.checkpoint = checkpoint,
                      .cases = options.cases.empty() ? (std::filesystem::path(checkpoint) / "cases").string()
                                                     : options.cases};
  SF_ASSIGN_OR_RETURN(weights::Checkpoint opened, weights::open_checkpoint(checkpoint));
  SF_ASSIGN_OR_RETURN(const std::vector<CaseFile> cases, read_cases(report.cases));
  report.layout = weights::layout_name(opened.layout);
  SF_ASSIGN_OR_RETURN(const auto runner, CaseRunner::open(std::move(opened), cases,
                                                          {.device = options.device,
                                                           .precision = options.precision,
                                                           .tokenizer = options.tokenizer,
                                                           .assets = options.assets,
                                                           .threads = options.threads,
                                                           .loading = options.loading}));
  report.device = runner->info().device;
  report.backend = runner->info().backend;
  report.precision = runner->info().precision;
  report.threads = runner->info().threads;
  report.case_count = static_cast<int>(cases.size());

  for (std::size_t i = 0; i < cases.size(); ++i) {
    const CaseFile& c = cases[i];
    if (options.running) options.running(static_cast<int>(i), report.case_count, c.name);
    const auto table = c.tolerances.find(report.precision);
    if (table == c.tolerances.end())
      report.notes.push_back(c.name + ": has no tolerances for " + report.precision +
                             ": its stages are not judged");
    const ToleranceTable none;
    Result<std::vector<Record>> records =
        judge_case(*runner, c, table == c.tolerances.end() ? none : table->second);
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
