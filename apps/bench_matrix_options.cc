#include "bench_matrix_options.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <chrono>

#include "core/status_macros.h"
#include "toolkit/bench_matrix_report.h"

namespace servoflow::cli {
namespace {

std::string time_text(double seconds) {
  if (seconds < 90) return fmt::format("{:.0f} s", seconds);
  if (seconds < 5400) return fmt::format("{:.0f} min", seconds / 60);
  return fmt::format("{:.1f} h", seconds / 3600);
}

}  // namespace

void add_matrix_options(CLI::App& app, MatrixCommand& c) {
  constexpr std::array<const char*, 5> kShared = {"--help", "--json", "--log-level", "--tokenizer",
                                                  "--assets"};
  std::vector<CLI::Option*> others;
  for (CLI::Option* option : app.get_options())
    if (std::none_of(kShared.begin(), kShared.end(),
                     [&](const char* name) { return option->check_name(name); }))
      others.push_back(option);
  CLI::Option* matrix =
      app.add_option("--matrix", c.matrix,
                     "Instead: every combination that this file lists, in turns (docs/benchmarking.md)")
          ->type_name("FILE.toml");
  for (CLI::Option* option : others) matrix->excludes(option);
  app.add_option("--out", c.out,
                 "Folder for the matrix's JSON, CSV and HTML; a run that was cut short continues there")
      ->type_name("DIR")
      ->needs(matrix);
  app.add_option("--compare", c.compare,
                 "Verdict against an earlier matrix.json; exit code 1 if an arm is slower")
      ->type_name("OLD.json")
      ->needs(matrix);
  app.add_option("--tolerance", c.tolerance_percent, "Per cent that do not count as slower or faster")
      ->check(CLI::Range(0.0, 100.0))
      ->type_name("P")
      ->capture_default_str()
      ->needs(matrix);
}

Status run_matrix_command(const MatrixCommand& c, const CommonOptions& common) {
  SF_ASSIGN_OR_RETURN(const toolkit::MatrixSpec spec, toolkit::read_matrix(c.matrix));
  // What would be missed after hours is looked at first.
  std::optional<toolkit::MatrixResult> before;
  if (!c.compare.empty()) {
    SF_ASSIGN_OR_RETURN(before, toolkit::read_matrix_result(c.compare));
  }
  if (!c.out.empty() && toolkit::plotly_blob().compressed.empty())
    log_warning("report.html cannot be written, JSON and CSV can: " +
                std::string(toolkit::plotly_blob().why));
  using Clock = std::chrono::steady_clock;
  Progress measuring("measuring");
  std::optional<std::pair<Clock::time_point, std::uint64_t>> began;
  const toolkit::MatrixOptions options{
      .folder = c.out,
      .policy = {.tokenizer = common.tokenizer, .assets = common.assets},
      .running = [&](std::uint64_t done, std::uint64_t total, const std::string& doing) {
        if (!began) began = {Clock::now(), done};
        const double spent = std::chrono::duration<double>(Clock::now() - began->first).count();
        const auto here = static_cast<double>(done - began->second);
        const std::string left =
            here > 0 ? ", " + time_text(spent / here * static_cast<double>(total - done)) + " left" : "";
        measuring.update(done, total, doing + left);
      }};
  SF_ASSIGN_OR_RETURN(const toolkit::MatrixResult result, toolkit::run_matrix(spec, options));
  measuring.finish();

  std::optional<toolkit::MatrixComparison> comparison;
  if (before) {
    SF_ASSIGN_OR_RETURN(comparison,
                        toolkit::compare_matrices(result, *before, c.compare, c.tolerance_percent / 100));
  }
  const toolkit::MatrixComparison* verdict = comparison ? &*comparison : nullptr;
  const Output out(common);
  Json json = toolkit::matrix_to_json(result);
  if (verdict != nullptr) json["comparison"] = toolkit::comparison_to_json(*verdict);
  SF_RETURN_IF_ERROR(out.json(json));
  out.text(toolkit::matrix_text(result) + (verdict != nullptr ? toolkit::comparison_text(*verdict) : ""));
  if (!c.out.empty()) SF_RETURN_IF_ERROR(toolkit::write_matrix(result, verdict, c.out));
  for (const toolkit::ArmResult& a : result.arms)
    if (!a.same_actions)
      return Status::check_failed(toolkit::arm_text(a.arm) + ": rounds of the same work gave other actions");
  return verdict != nullptr ? toolkit::comparison_outcome(*verdict) : Status();
}

}  // namespace servoflow::cli
