#include "toolkit/decision.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <set>
#include <sstream>

#include "contract/problems.h"
#include "contract/toml_json.h"
#include "core/status_macros.h"

namespace servoflow::toolkit {
namespace {

using contract::Problems;

bool is_known(const std::string& figure) { return figure_meanings().count(figure) > 0; }

std::string figure_text(const Figure& f) {
  if (const bool* flag = std::get_if<bool>(&f)) return *flag ? "true" : "false";
  if (const auto* text = std::get_if<std::string>(&f)) return *text;
  const double x = std::get<double>(f);
  return std::abs(x) >= 1000 && std::abs(x) < 1e9 ? fmt::format("{:.0f}", x) : fmt::format("{:.3g}", x);
}

bool number_of(const std::string& text, double& out) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), out);
  return error == std::errc() && end == text.data() + text.size() && std::isfinite(out);
}

// "figure > 1.2 * other", "figure == true", "figure == \"cpu\""
std::string parse_condition(const std::string& text, Condition& out) {
  std::istringstream words(text);
  std::vector<std::string> parts;
  for (std::string word; words >> word;) parts.push_back(word);
  if (parts.size() != 3 && !(parts.size() == 5 && parts[3] == "*"))
    return "expected \"FIGURE COMPARISON VALUE\", \"… OTHER\" or \"… NUMBER * OTHER\"";
  static const std::set<std::string> kComparisons = {"<", "<=", ">", ">=", "==", "!="};
  out.figure = parts[0];
  out.comparison = parts[1];
  if (!is_known(out.figure)) return "no figure is called \"" + out.figure + "\"";
  if (kComparisons.count(out.comparison) == 0) return "\"" + out.comparison + "\" compares nothing";
  const std::string& value = parts[2];
  bool ordered = true;  // numbers can be more or less than each other
  if (parts.size() == 5) {
    out.other = parts[4];
    if (!number_of(value, out.factor)) return "\"" + value + "\" is not a number";
  } else if (double number = 0; number_of(value, number)) {
    out.value = number;
  } else if (value == "true" || value == "false") {
    out.value = value == "true";
    ordered = false;
  } else if (value.size() >= 2 && value.front() == '"' && value.back() == '"') {
    out.value = value.substr(1, value.size() - 2);
    ordered = false;
  } else {
    out.other = value;
  }
  if (!out.other.empty() && !is_known(out.other)) return "no figure is called \"" + out.other + "\"";
  if (!ordered && out.comparison != "==" && out.comparison != "!=")
    return "\"" + out.comparison + "\" compares numbers only";
  return {};
}

// The names in braces; `wrong` is a brace that is never closed.
std::vector<std::string> placeholders(const std::string& advice, bool& wrong) {
  std::vector<std::string> out;
  for (std::size_t at = advice.find('{'); at != std::string::npos; at = advice.find('{', at + 1)) {
    const std::size_t end = advice.find('}', at);
    wrong = wrong || end == std::string::npos;
    if (end == std::string::npos) break;
    out.push_back(advice.substr(at + 1, end - at - 1));
  }
  return out;
}

std::string filled(const std::string& advice, const Figures& figures) {
  std::string out;
  for (std::size_t at = 0; at < advice.size(); ++at) {
    if (advice[at] != '{') {
      out += advice[at];
      continue;
    }
    const std::size_t end = advice.find('}', at);
    const auto found = figures.find(advice.substr(at + 1, end - at - 1));
    out += found != figures.end() ? figure_text(found->second) : "unmeasured";
    at = end;
  }
  return out;
}

template <typename T>
bool compared(const T& a, const std::string& comparison, const T& b) {
  if (comparison == "==") return a == b;
  if (comparison == "!=") return !(a == b);
  if (comparison == "<") return a < b;
  if (comparison == "<=") return a <= b;
  if (comparison == ">") return b < a;
  return b <= a;
}

// Whether it holds, and in words. Figures that are missing, or of another kind, hold nothing.
bool holds(const Condition& c, const Figures& figures, std::string& because) {
  const auto left = figures.find(c.figure);
  if (left == figures.end()) return false;
  Figure right = c.value;
  std::string name;
  if (!c.other.empty()) {
    const auto found = figures.find(c.other);
    if (found == figures.end()) return false;
    right = found->second;
    name = c.other + " = ";
    if (c.factor != 1) {
      if (!std::holds_alternative<double>(right)) return false;
      right = std::get<double>(right) * c.factor;
      name = fmt::format("{} * {} = ", c.factor, c.other);
    }
  }
  if (left->second.index() != right.index()) return false;
  because =
      c.figure + " = " + figure_text(left->second) + " " + c.comparison + " " + name + figure_text(right);
  return std::visit(
      [&](const auto& a) { return compared(a, c.comparison, std::get<std::decay_t<decltype(a)>>(right)); },
      left->second);
}

Json to_json(const Decision& d, const std::string& device) {
  return {{"device", device},     {"topic", d.topic},   {"rule", d.rule},
          {"verdict", d.verdict}, {"advice", d.advice}, {"because", d.because}};
}

}  // namespace

Result<std::vector<Rule>> parse_rules(std::string_view text, const std::string& where) {
  Problems problems(where);
  SF_ASSIGN_OR_RETURN(const Json json, contract::parse_toml(text, where, problems));
  std::vector<Rule> out;
  std::set<std::string> names;
  for (const auto& [key, value] : json.items())
    if (key != "rule" || !value.is_array()) problems.add(key, "only [[rule]] has a place here");
  const Json none = Json::array();
  const auto listed = json.find("rule");
  const Json& rules = listed != json.end() && listed->is_array() ? *listed : none;
  if (rules.empty()) problems.add("rule", "there is none");
  for (std::size_t i = 0; i < rules.size(); ++i) {
    const std::string path = "rule[" + std::to_string(i) + "]";
    const Json& table = rules[i];
    if (!table.is_object()) {
      problems.add(path, "must be a table");
      continue;
    }
    Rule rule;
    const auto field = [&](const char* name, std::string& to, const char* fallback = nullptr) {
      const auto found = table.find(name);
      if (found == table.end() && fallback != nullptr) {
        to = fallback;
      } else if (found == table.end() || !found->is_string()) {
        problems.add(path + "." + name, "must be a string");
      } else {
        to = found->get<std::string>();
      }
    };
    std::string scope;
    field("topic", rule.topic);
    field("name", rule.name);
    field("verdict", rule.verdict);
    field("advice", rule.advice);
    field("scope", scope, "device");
    if (scope != "device" && scope != "machine") problems.add(path + ".scope", "must be device or machine");
    rule.machine = scope == "machine";
    for (const auto& [key, value] : table.items())
      if (std::set<std::string>{"topic", "name", "verdict", "advice", "scope", "when"}.count(key) == 0)
        problems.add(path + "." + key, "is not known here");
    if (!rule.name.empty() && !names.insert(rule.name).second)
      problems.add(path + ".name", "\"" + rule.name + "\" is used twice");
    bool wrong = false;
    for (const std::string& name : placeholders(rule.advice, wrong))
      if (!is_known(name)) problems.add(path + ".advice", "no figure is called \"" + name + "\"");
    if (wrong) problems.add(path + ".advice", "a brace is never closed");
    const auto when = table.find("when");
    const Json& conditions = when != table.end() && when->is_array() ? *when : none;
    if (when == table.end() || !when->is_array())
      problems.add(path + ".when", "must be a list of conditions");
    for (std::size_t c = 0; c < conditions.size(); ++c) {
      Condition condition;
      const std::string wrong_with = conditions[c].is_string()
                                         ? parse_condition(conditions[c].get<std::string>(), condition)
                                         : "must be a string";
      if (!wrong_with.empty()) problems.add(path + ".when[" + std::to_string(c) + "]", wrong_with);
      rule.when.push_back(std::move(condition));
    }
    out.push_back(std::move(rule));
  }
  SF_RETURN_IF_ERROR(problems.status());
  return out;
}

// A test parses the text; should it not parse, nothing is advised.
const std::vector<Rule>& builtin_rules() {
  static const std::vector<Rule> kRules = [] {
    Result<std::vector<Rule>> rules = parse_rules(builtin_rules_text(), "decision_rules.toml");
    return rules.ok() ? std::move(*rules) : std::vector<Rule>();
  }();
  return kRules;
}

std::vector<Decision> decide(const std::vector<Rule>& rules, const Figures& figures, bool machine) {
  std::vector<Decision> out;
  std::set<std::string> decided;
  for (const Rule& rule : rules) {
    if (rule.machine != machine || decided.count(rule.topic) > 0) continue;
    Decision d{rule.topic, rule.name, rule.verdict, "", {}};
    const bool fires = std::all_of(rule.when.begin(), rule.when.end(), [&](const Condition& c) {
      std::string because;
      const bool yes = holds(c, figures, because);
      d.because.push_back(std::move(because));
      return yes;
    });
    if (!fires) continue;
    d.advice = filled(rule.advice, figures);
    decided.insert(rule.topic);
    out.push_back(std::move(d));
  }
  // In the order in which topics appear; rules of one topic need not stand together.
  std::vector<std::string> order;
  for (const Rule& rule : rules)
    if (std::find(order.begin(), order.end(), rule.topic) == order.end()) order.push_back(rule.topic);
  const auto place = [&](const Decision& d) { return std::find(order.begin(), order.end(), d.topic); };
  std::stable_sort(out.begin(), out.end(),
                   [&](const Decision& a, const Decision& b) { return place(a) < place(b); });
  return out;
}

void decide(const std::vector<Rule>& rules, MachineProfile& profile) {
  profile.decisions = Json::array();
  const Figures machine = machine_figures(profile.devices);
  Choice choice;
  if (const auto best = machine.find("best_device"); best != machine.end())
    choice.device = std::get<std::string>(best->second);
  const auto why = [&](const Decision& d) {
    choice.why += (choice.why.empty() ? "" : "; ") + d.rule +
                  (d.because.empty() ? "" : " (" + contract::join(d.because) + ")");
  };
  for (const Decision& d : decide(rules, machine, true)) {
    profile.decisions.push_back(to_json(d, "machine"));
    if (d.topic == "device") why(d);
  }
  for (const ProbedDevice& device : profile.devices) {
    const Figures figures = device_figures(device);
    for (const Decision& d : decide(rules, figures, false)) {
      profile.decisions.push_back(to_json(d, device.device));
      if (device.device != choice.device) continue;
      if (d.topic == "precision") choice.precision = d.verdict;
      if (d.rule == "fewer-threads")
        choice.threads = static_cast<int>(std::get<double>(figures.at("threads_best")));
      if (d.topic == "precision" || d.rule == "fewer-threads") why(d);
    }
  }
  profile.choice = std::move(choice);
}

}  // namespace servoflow::toolkit
