#include "toolkit/plan_report.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>

#include "core/status_macros.h"
#include "toolkit/plan_tables.h"
#include "weights/checkpoint.h"

namespace servoflow::toolkit {
namespace {

Result<weights::Architecture> read_architecture_of(const std::string& model) {
  std::error_code ignored;
  if (!std::filesystem::is_directory(model, ignored)) return weights::named_architecture(model);
  SF_ASSIGN_OR_RETURN(const weights::Checkpoint checkpoint, weights::open_checkpoint(model));
  return checkpoint.architecture;
}

// Characters, not bytes: columns line up although names hold "×" and "π".
std::size_t width(const std::string& text) {
  return static_cast<std::size_t>(std::count_if(
      text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; }));
}

}  // namespace

std::string markdown_table(const HtmlTable& table) {
  std::vector<std::size_t> widths;
  for (const std::string& h : table.header) widths.push_back(width(h));
  for (const auto& row : table.rows)
    for (std::size_t c = 0; c < std::min(row.size(), widths.size()); ++c)
      widths[c] = std::max(widths[c], width(row[c]));
  const auto line = [&](const std::vector<std::string>& cells) {
    std::string out = "|";
    for (std::size_t c = 0; c < widths.size(); ++c) {
      const std::string& cell = c < cells.size() ? cells[c] : "";
      const std::string space(widths[c] - width(cell), ' ');
      // Numbers line up at their right end.
      out += " " + (c == 0 ? cell + space : space + cell) + " |";
    }
    return out + "\n";
  };
  std::string out = line(table.header) + "|";
  for (std::size_t c = 0; c < widths.size(); ++c)
    out += std::string(widths[c] + (c == 0 ? 2 : 1), '-') + (c == 0 ? "|" : ":|");
  out += "\n";
  for (const auto& row : table.rows) out += line(row);
  return out;
}

std::string plan_text(const PlanReport& r) {
  std::string out = r.title + "\n\n";
  for (const std::string& note : r.notes) out += note + "\n";
  for (const HtmlTable& t : r.tables) out += "\n" + t.caption + "\n\n" + markdown_table(t);
  return out;
}

HtmlReport plan_html(const PlanReport& r) {
  HtmlReport html(r.title);
  for (const std::string& note : r.notes) html.paragraph(note);
  html.section("Figures");
  for (const PlanFigure& f : r.figures) html.figure(f.caption, f.traces, f.layout);
  html.section("Tables");
  for (const HtmlTable& t : r.tables) html.table(t);
  html.data("plan", r.json);
  return html;
}

Result<PlanReport> make_plan(const PlanOptions& o) {
  SF_ASSIGN_OR_RETURN(const weights::Architecture architecture, read_architecture_of(o.model));
  SF_ASSIGN_OR_RETURN(const DeviceProfile device, load_device_profile(o.device));
  SF_ASSIGN_OR_RETURN(const UsedRates rates, used_rates(device));
  PlanCase base{.architecture = architecture, .precision = o.precision, .reuse = o.reuse};
  base.requests.assign(static_cast<std::size_t>(std::max(1, o.work.batch)), o.work);
  for (WorkShape& r : base.requests) r.batch = 1;
  const PlanContext context{base, device, rates};
  SF_ASSIGN_OR_RETURN(const Prediction p, predict(base, device, rates));

  PlanReport out;
  out.title = fmt::format("{} on {}: {:.4g} ms, {:.4g} Hz", o.model, device.title, p.average_ms, p.hz);
  out.notes.push_back(fmt::format(
      "{} views, {} prompt tokens, horizon {}, {} steps, {} request{}, {}{}. Predicted; nothing ran.",
      o.work.views, o.work.tokens, o.work.horizon, o.work.steps, base.requests.size(),
      base.requests.size() > 1 ? "s" : "", o.precision,
      o.reuse > 1 ? fmt::format(", a new prefix every {} inferences", o.reuse) : ""));
  for (const std::string& source : rates.sources) out.notes.push_back("- " + source);
  out.tables.push_back(work_table(context));
  out.tables.push_back(stage_table(context, p));
  out.json = {{"model", o.model},
              {"device", device.name},
              {"title", device.title},
              {"work",
               {{"views", o.work.views},
                {"tokens", o.work.tokens},
                {"horizon", o.work.horizon},
                {"steps", o.work.steps},
                {"batch", base.requests.size()}}},
              {"reuse", o.reuse},
              {"sources", rates.sources},
              {"rates_borrowed", rates.rates_borrowed},
              {"engine_borrowed", rates.engine_borrowed},
              {"prediction", prediction_to_json(p)}};
  for (const auto& make : {precision_table, sequence_table, steps_table, batch_table, student_table}) {
    SF_ASSIGN_OR_RETURN(HtmlTable table, make(context));
    out.tables.push_back(std::move(table));
  }
  if (o.target_hz) {
    SF_ASSIGN_OR_RETURN(out.target, find_target(base, device, rates, *o.target_hz));
    out.tables.push_back(target_table(context, *out.target));
    out.notes.push_back(target_sentence(context, *out.target));
    out.json["target"] = target_to_json(*out.target);
  }
  SF_ASSIGN_OR_RETURN(out.figures, plan_figures(context));
  out.json["tables"] = tables_to_json(out.tables);
  return out;
}

Result<PlanReport> make_accuracy(const std::string& results) {
  SF_ASSIGN_OR_RETURN(const Accuracy accuracy, check_accuracy(results));
  SF_ASSIGN_OR_RETURN(const Published published, compare_published());
  PlanReport out;
  out.title = fmt::format(
      "Predicted and measured: mean absolute error {:.1f} % end to end, {:.1f} % by stage, {} results",
      100 * accuracy.mape, 100 * accuracy.stage_mape, accuracy.predicted);
  out.notes.push_back(
      "Factors are fitted on the results marked so, one for each device (docs/planning.md); all other rows "
      "are "
      "predictions. Medians, ms.");
  out.tables = {accuracy_table(accuracy), accuracy_stage_table(accuracy), memory_accuracy_table(accuracy),
                published_table(published), thor_table(published)};
  out.notes.push_back(thor_sentence(published));
  out.figures = accuracy_figures(accuracy, published);
  out.json = {{"accuracy", accuracy_to_json(accuracy)},
              {"published", published_to_json(published)},
              {"tables", tables_to_json(out.tables)}};
  return out;
}

}  // namespace servoflow::toolkit
