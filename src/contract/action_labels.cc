#include "contract/action_labels.h"

#include <algorithm>
#include <set>

namespace servoflow::contract {
namespace {

std::vector<std::string> read_labels(JsonFields& actions, const std::string& key) {
  if (actions.get(key, false) == nullptr) return {};
  const std::size_t before = actions.problems().count();
  std::vector<std::string> labels = actions.texts(key);
  if (labels.empty() && actions.problems().count() == before)
    actions.problems().add(actions.field(key), "empty; name every column, or leave the list out");
  return labels;
}

std::string at(const std::vector<std::string>& labels, int column) {
  const auto i = static_cast<std::size_t>(column);
  return column >= 0 && i < labels.size() ? labels[i] : std::string();
}

}  // namespace

void read_action_labels(JsonFields& actions, Actions& out) {
  out.names = read_labels(actions, "names");
  out.units = read_labels(actions, "units");
}

void check_labels(const std::vector<std::string>& labels, int width, bool unique, const std::string& field,
                  Problems& problems) {
  if (width == 0) {
    problems.add(field, "needs the width: 0 means all of the model's columns; set it to " +
                            std::to_string(labels.size()));
  } else if (labels.size() != static_cast<std::size_t>(width)) {
    problems.add(field, "has " + std::to_string(labels.size()) + " entries, the action has " +
                            std::to_string(width) + " columns");
  }
  std::set<std::string> seen;
  for (std::size_t i = 0; i < labels.size(); ++i) {
    const std::string here = field + "[" + std::to_string(i) + "]";
    const std::string& label = labels[i];
    if (label.empty()) {
      problems.add(here,
                   unique ? "empty; every column has a name" : "empty; a plain number has the unit \"1\"");
    } else if (label.size() > kMaxLabelBytes) {
      problems.add(here, "longer than " + std::to_string(kMaxLabelBytes) + " bytes");
    } else if (std::any_of(label.begin(), label.end(),
                           [](unsigned char c) { return c < 0x20 || c == 0x7f; })) {
      problems.add(here, "holds a control character");
    } else if (unique && !seen.insert(label).second) {
      problems.add(here, "the name \"" + label + "\" is used twice");
    }
  }
}

void check_action_labels(const Actions& actions, Problems& problems) {
  if (!actions.names.empty()) check_labels(actions.names, actions.width, true, "actions.names", problems);
  if (!actions.units.empty()) check_labels(actions.units, actions.width, false, "actions.units", problems);
}

std::string column_name(const std::string& name, int column) {
  return name.empty() ? "a" + std::to_string(column) : name;
}

std::string action_name(const Actions& actions, int column) {
  return column_name(at(actions.names, column), column);
}

std::string action_unit(const Actions& actions, int column) { return at(actions.units, column); }

std::string label_text(const std::string& name, const std::string& unit) {
  return unit.empty() || unit == "1" ? name : name + " [" + unit + "]";
}

}  // namespace servoflow::contract
