// What a comparison's sums mean, and how it reads: text for people, JSON for programs, one HTML file with
// figures.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "contract/action_labels.h"
#include "toolkit/compare.h"

namespace servoflow::toolkit {
namespace {

constexpr double kTolerance = 0.1;  // relative error of a tensor that is worth pointing at

std::string cosine_text(double c) {
  // Many nines are hard to count: the distance from 1 says more.
  return c > 0.99 ? fmt::format("1 - {:.2e}", 1 - c) : fmt::format("{:.5f}", c);
}

std::string bounds_text(const GateResult& g) {
  if (g.least && g.most) return fmt::format("{} … {}", cosine_text(*g.least), cosine_text(*g.most));
  if (g.least) return fmt::format(">= {:g}", *g.least);
  if (g.most) return fmt::format("<= {:g}", *g.most);
  return "-";
}

std::string value_text(const GateResult& g) {
  if (!g.value) return "-";
  return g.metric.find("cosine") != std::string::npos ? cosine_text(*g.value) : fmt::format("{:g}", *g.value);
}

// Of one kind, the worst tensors.
std::vector<const ComparedTensor*> worst(const CompareReport& r, std::size_t count) {
  std::vector<const ComparedTensor*> out;
  for (const ComparedTensor& t : r.tensors)
    if (t.group == "input") out.push_back(&t);
  std::stable_sort(out.begin(), out.end(),
                   [](const auto* a, const auto* b) { return a->total.relative() > b->total.relative(); });
  out.resize(std::min(out.size(), count));
  return out;
}

std::vector<std::string> tensor_row(const ComparedTensor& t) {
  return {t.name,
          cosine_text(t.total.cosine()),
          fmt::format("{:.2e}", t.total.relative()),
          fmt::format("{:.2e}", t.total.mae()),
          fmt::format("{:.2e}", t.total.mse()),
          fmt::format("{:.2e}", t.total.largest),
          t.growth > 0 ? fmt::format("{:.2f}x", t.growth) : "-",
          t.dead > 0 ? fmt::format("{} of {}", t.dead, t.channels) : "-",
          t.worst_case};
}
const std::vector<std::string> kTensorHeader = {"tensor",  "cosine", "relative error", "MAE",       "MSE",
                                                "max-abs", "growth", "dead",           "worst case"};

std::vector<std::string> action_row(const ComparedAction& a) {
  return {a.label(), fmt::format("{:.3g}", a.total.mae()), fmt::format("{:.3g}", std::sqrt(a.total.mse())),
          fmt::format("{:.3g}", a.total.largest),
          fmt::format("{} row {}: {:.4g} -> {:.4g}", a.worst_case, a.worst_row, a.worst_a, a.worst_b)};
}
const std::vector<std::string> kActionHeader = {"action", "MAE", "RMS", "max-abs", "worst frame"};

std::vector<std::string> gate_row(const GateResult& g) {
  return {g.metric, value_text(g), bounds_text(g), g.pass ? "pass" : "FAIL", g.why};
}
const std::vector<std::string> kGateHeader = {"gate", "value", "bounds", "", "why"};

std::string table_text(const std::vector<std::string>& header,
                       const std::vector<std::vector<std::string>>& rows) {
  std::vector<std::size_t> widths;
  const auto length = [](const std::string& s) {  // characters, not bytes
    return static_cast<std::size_t>(
        std::count_if(s.begin(), s.end(), [](char c) { return (c & 0xc0) != 0x80; }));
  };
  const auto grow = [&](const std::vector<std::string>& row) {
    widths.resize(std::max(widths.size(), row.size()));
    for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], length(row[i]));
  };
  grow(header);
  for (const auto& row : rows) grow(row);
  std::string out;
  const auto print = [&](const std::vector<std::string>& row) {
    std::string line;
    for (std::size_t i = 0; i < row.size(); ++i)
      line += row[i] + std::string(i + 1 < row.size() ? widths[i] - length(row[i]) + 2 : 0, ' ');
    out += line.substr(0, line.find_last_not_of(' ') + 1) + "\n";
  };
  print(header);
  for (const auto& row : rows) print(row);
  return out;
}

Json number(double v) { return std::isfinite(v) ? Json(v) : Json(nullptr); }

Json difference_json(const Difference& d) {
  return {{"elements", d.count},
          {"not_finite", d.not_finite},
          {"cosine", number(d.cosine())},
          {"relative", number(d.relative())},
          {"mae", d.mae()},
          {"mse", d.mse()},
          {"max_abs", d.largest}};
}

Json side_json(const SideReport& s) {
  return {{"checkpoint", s.checkpoint},     {"device", s.device},
          {"backend", s.backend},           {"precision", s.precision},
          {"weight_bytes", s.weight_bytes}, {"workspace_bytes", s.workspace_bytes},
          {"watched_ms", s.milliseconds}};
}

std::string side_text(const char* name, const SideReport& s) {
  return fmt::format("{}: {} on {} ({}), precision {}, {:.1f} MB of weights\n", name, s.checkpoint, s.device,
                     s.backend, s.precision, static_cast<double>(s.weight_bytes) / 1e6);
}

}  // namespace

std::string ComparedAction::label() const {
  return contract::label_text(contract::column_name(name, index), unit);
}

void Difference::add(double a, double b) {
  if (!std::isfinite(a) || !std::isfinite(b)) {
    ++not_finite;
    return;
  }
  ++count;
  dot += a * b;
  aa += a * a;
  bb += b * b;
  const double d = std::fabs(a - b);
  absolute += d;
  squared += d * d;
  largest = std::max(largest, d);
}

void Difference::add(const Difference& o) {
  count += o.count;
  not_finite += o.not_finite;
  dot += o.dot;
  aa += o.aa;
  bb += o.bb;
  absolute += o.absolute;
  squared += o.squared;
  largest = std::max(largest, o.largest);
}

double Difference::cosine() const {
  if (squared == 0) return 1;
  if (aa == 0 || bb == 0) return 0;
  return std::min(1.0, dot / std::sqrt(aa) / std::sqrt(bb));
}

double Difference::relative() const {
  if (squared == 0) return 0;
  return aa > 0 ? std::sqrt(squared / aa) : std::numeric_limits<double>::infinity();
}

std::string compare_text(const CompareReport& r) {
  std::string out = side_text("A", r.a) + side_text("B", r.b) +
                    fmt::format("{} cases of {}\n\n", r.case_names.size(), r.cases);
  std::vector<std::vector<std::string>> rows;
  for (const ComparedTensor& t : r.tensors)
    if (t.group != "input" && t.group != "x") rows.push_back(tensor_row(t));
  out += table_text(kTensorHeader, rows);
  if (r.layers) {
    rows.clear();
    for (const ComparedTensor* t : worst(r, 8)) rows.push_back(tensor_row(*t));
    out += "\nInputs of linear layers that differ most (all of them: --json, --html)\n" +
           table_text(kTensorHeader, rows);
  }
  const ComparedTensor* first = first_beyond(r, kTolerance);
  out += first == nullptr ? fmt::format("\nNo tensor differs by more than {:g} of its size.\n", kTolerance)
                          : fmt::format("\nFirst tensor beyond {:g} of its size: {} ({:.3g})\n", kTolerance,
                                        first->name, first->total.relative());
  rows.clear();
  for (const ComparedAction& a : r.actions) rows.push_back(action_row(a));
  out +=
      fmt::format("\nActions, {}: cosine {} (worst case {}), all normalised columns\n",
                  r.robot_units ? "robot units" : "normalised", cosine_text(r.normalized.cosine()),
                  r.metrics.contains("actions.cosine") ? cosine_text(r.metrics.at("actions.cosine")) : "-");
  out += table_text(kActionHeader, rows);
  for (const std::string& note : r.notes) out += "note: " + note + "\n";
  if (r.gates.empty()) return out + "\nNot judged: no --gates.\n";
  rows.clear();
  for (const GateResult& g : r.gates) rows.push_back(gate_row(g));
  return out + "\n" + table_text(kGateHeader, rows);
}

Json compare_to_json(const CompareReport& r) {
  Json tensors = Json::array(), actions = Json::array(), gates = Json::array(), metrics = Json::object();
  for (const ComparedTensor& t : r.tensors) {
    Json one = difference_json(t.total);
    one.update({{"name", t.name},
                {"group", t.group},
                {"step", t.step >= 0 ? Json(t.step) : Json(nullptr)},
                {"growth", number(t.growth)},
                {"channels", t.channels},
                {"dead", t.dead},
                {"worst_case", t.worst_case},
                {"worst_cosine", number(t.worst_cosine)}});
    tensors.push_back(std::move(one));
  }
  for (const ComparedAction& a : r.actions) {
    Json one = difference_json(a.total);
    one.update(
        {{"index", a.index},
         {"label", a.label()},
         {"name", a.name.empty() ? Json(nullptr) : Json(a.name)},
         {"unit", a.unit.empty() ? Json(nullptr) : Json(a.unit)},
         {"worst", {{"case", a.worst_case}, {"row", a.worst_row}, {"a", a.worst_a}, {"b", a.worst_b}}}});
    actions.push_back(std::move(one));
  }
  const auto bound = [](const std::optional<double>& v) { return v ? Json(*v) : Json(nullptr); };
  for (const GateResult& g : r.gates)
    gates.push_back({{"metric", g.metric},
                     {"min", bound(g.least)},
                     {"max", bound(g.most)},
                     {"value", bound(g.value)},
                     {"pass", g.pass},
                     {"why", g.why}});
  for (const auto& [name, value] : r.metrics) metrics[name] = number(value);
  const ComparedTensor* first = first_beyond(r, kTolerance);
  return {{"a", side_json(r.a)},
          {"b", side_json(r.b)},
          {"cases", r.case_names},
          {"metrics", metrics},
          {"gates", gates},
          {"passed", compare_outcome(r).ok()},
          {"first_beyond",
           {{"tolerance", kTolerance}, {"tensor", first != nullptr ? Json(first->name) : Json(nullptr)}}},
          {"actions",
           {{"units", r.robot_units ? "robot" : "normalised"},
            {"all", difference_json(r.normalized)},
            {"columns", actions}}},
          {"tensors", tensors},
          {"notes", r.notes}};
}

HtmlReport compare_html(const CompareReport& r) {
  HtmlReport html("servoflow compare: " + r.a.precision + " and " + r.b.precision);
  html.section("What was compared")
      .preformatted(side_text("A", r.a) + side_text("B", r.b) +
                    fmt::format("{} cases of {}", r.case_names.size(), r.cases));
  for (const std::string& note : r.notes) html.paragraph("Note: " + note);
  HtmlTable gates{.caption = "Gates", .header = kGateHeader};
  for (const GateResult& g : r.gates) gates.rows.push_back(gate_row(g));
  html.section("Gates");
  if (r.gates.empty()) {
    html.paragraph("Nothing was judged: the comparison was made without gates.");
  } else {
    html.table(gates);
  }

  Json steps = Json::array(), distance = Json::array();
  for (const ComparedTensor& t : r.tensors)
    if (t.group == "velocity") {
      steps.push_back(t.step);
      distance.push_back(std::max(1 - t.worst_cosine, 1e-16));
    }
  html.section("Velocity, step by step")
      .paragraph(
          "1 - cosine of the velocity in the worst case of each step. The noise that actions start from "
          "hides "
          "errors in the actions; here they show.")
      .figure("Distance of velocities",
              Json::array({{{"x", steps},
                            {"y", distance},
                            {"type", "scatter"},
                            {"mode", "lines+markers"},
                            {"name", "1 - cosine"}}}),
              {{"xaxis", {{"title", {{"text", "denoise step"}}}}},
               {"yaxis", {{"type", "log"}, {"title", {{"text", "1 - cosine, worst case"}}}}}});

  html.section("Layer by layer");
  std::map<std::string, std::pair<Json, Json>> lines;  // group -> names, errors
  for (const ComparedTensor& t : r.tensors) {
    auto& [x, y] = lines[t.group];
    if (x.is_null()) x = y = Json::array();
    x.push_back(t.name);
    y.push_back(std::max(number(t.total.relative()).is_null() ? 1e3 : t.total.relative(), 1e-9));
  }
  Json traces = Json::array();
  for (const auto& [group, line] : lines)
    traces.push_back(
        {{"x", line.first}, {"y", line.second}, {"type", "scatter"}, {"mode", "markers"}, {"name", group}});
  html.figure("Relative error of every tensor, in the order of the pipeline", traces,
              {{"xaxis", {{"showticklabels", false}}},
               {"yaxis", {{"type", "log"}, {"title", {{"text", "relative error"}}}}}});
  HtmlTable tensors{.caption = "All tensors", .header = kTensorHeader};
  for (const ComparedTensor& t : r.tensors) tensors.rows.push_back(tensor_row(t));
  html.table(tensors);

  html.section("Actions");
  HtmlTable actions{.caption = r.robot_units ? "In robot units" : "Normalised", .header = kActionHeader};
  Json labels = Json::array(), mae = Json::array(), most = Json::array();
  for (const ComparedAction& a : r.actions) {
    actions.rows.push_back(action_row(a));
    labels.push_back(a.label());
    mae.push_back(a.total.mae());
    most.push_back(a.total.largest);
  }
  html.table(actions);
  html.figure("Error of each action column",
              Json::array({{{"x", labels}, {"y", mae}, {"type", "bar"}, {"name", "MAE"}},
                           {{"x", labels}, {"y", most}, {"type", "bar"}, {"name", "max-abs"}}}),
              {{"barmode", "group"}});
  html.data("compare", compare_to_json(r));
  return html;
}

}  // namespace servoflow::toolkit
