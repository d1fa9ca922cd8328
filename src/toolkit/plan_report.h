// What `servoflow plan` prints: tables that are Markdown and readable as they are, the same as JSON and, with
// figures, as one HTML file.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "toolkit/html_report.h"
#include "toolkit/plan_compare.h"
#include "toolkit/plan_fit.h"
#include "toolkit/plan_search.h"

namespace servoflow::toolkit {

struct PlanOptions {
  std::string model = "pi05";  // a name or a file of weights::named_architecture, or a checkpoint directory
  std::string device = "h200";
  std::string precision = "bf16";
  WorkShape work;
  int reuse = 1;
  std::optional<double> target_hz;
};

struct PlanFigure {
  std::string caption;
  Json traces, layout;
};

struct PlanReport {
  std::string title;
  std::vector<std::string> notes;  // paragraphs before the tables
  std::vector<HtmlTable> tables;
  std::vector<PlanFigure> figures;
  Json json;  // everything, for programs
  std::optional<TargetResult> target;
};

// Tables of one plan: work, latency by stage, precisions, views x tokens x horizon, steps x reuse, batches,
// students, memory and, if asked for, the way to a target.
Result<PlanReport> make_plan(const PlanOptions& options);
// Predicted beside measured: our committed results in `results`, others' published figures, the table of
// Thor.
Result<PlanReport> make_accuracy(const std::string& results);

std::string plan_text(const PlanReport& report);
HtmlReport plan_html(const PlanReport& report);

// "| a | b |" with columns of equal width.
std::string markdown_table(const HtmlTable& table);

}  // namespace servoflow::toolkit
