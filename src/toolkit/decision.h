// From measurements to advice by rules that are data: src/toolkit/decision_rules.toml, compiled in.
//
// A rule belongs to a topic. The topics are gone through in the order in which they first appear, and in each
// the first rule decides whose conditions all hold. A condition compares a figure with a number, a truth
// value, a text or another figure (times a number). A figure that was not measured makes its conditions
// false. What fired is told with the figures that fired it.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "core/json.h"
#include "servoflow/status.h"
#include "toolkit/machine_profile.h"

namespace servoflow::toolkit {

using Figure = std::variant<bool, double, std::string>;
using Figures = std::map<std::string, Figure>;

struct Condition {
  std::string figure, comparison;  // < <= > >= == !=
  Figure value;                    // unless `other` is set
  std::string other;               // another figure, times `factor`
  double factor = 1;
};

struct Rule {
  std::string topic, name, verdict, advice;  // {figure} in the advice is replaced by its value
  bool machine = false;                      // about the devices together, not about one
  std::vector<Condition> when;
};

struct Decision {
  std::string topic, rule, verdict, advice;
  std::vector<std::string> because;  // "step_bytes_ms = 0.15 > step_flops_ms = 0.05"
};

// The names a rule may use, each with what it means.
const std::map<std::string, std::string>& figure_meanings();

// All problems of a rules file in one error: unknown figures, comparisons that are none, names used twice.
Result<std::vector<Rule>> parse_rules(std::string_view toml, const std::string& where);
const std::vector<Rule>& builtin_rules();
std::string_view builtin_rules_text();

// What the rules reason with, of one device; of all together.
Figures device_figures(const ProbedDevice& device);
Figures machine_figures(const std::vector<ProbedDevice>& devices);

std::vector<Decision> decide(const std::vector<Rule>& rules, const Figures& figures, bool machine);

// All of it: fills profile.choice and profile.decisions.
void decide(const std::vector<Rule>& rules, MachineProfile& profile);

}  // namespace servoflow::toolkit
