// The tables and figures of plan_report.h, one function each.
#pragma once

#include <string>
#include <vector>

#include "toolkit/plan_report.h"

namespace servoflow::toolkit {

struct PlanContext {
  const PlanCase& base;
  const DeviceProfile& device;
  const UsedRates& rates;
};

HtmlTable work_table(const PlanContext& context);
HtmlTable stage_table(const PlanContext& context, const Prediction& prediction);
Result<HtmlTable> precision_table(const PlanContext& context);
Result<HtmlTable> sequence_table(const PlanContext& context);
Result<HtmlTable> steps_table(const PlanContext& context);
Result<HtmlTable> batch_table(const PlanContext& context);
Result<HtmlTable> student_table(const PlanContext& context);
HtmlTable target_table(const PlanContext& context, const TargetResult& target);
std::string target_sentence(const PlanContext& context, const TargetResult& target);
Json target_to_json(const TargetResult& target);
Result<std::vector<PlanFigure>> plan_figures(const PlanContext& context);

HtmlTable accuracy_table(const Accuracy& accuracy);
HtmlTable accuracy_stage_table(const Accuracy& accuracy);
HtmlTable memory_accuracy_table(const Accuracy& accuracy);
HtmlTable published_table(const Published& published);
HtmlTable thor_table(const Published& published);
std::string thor_sentence(const Published& published);
std::vector<PlanFigure> accuracy_figures(const Accuracy& accuracy, const Published& published);

Json tables_to_json(const std::vector<HtmlTable>& tables);

}  // namespace servoflow::toolkit
