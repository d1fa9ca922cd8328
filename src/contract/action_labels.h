// Names and units of a contract's action columns: labels for people, which change no number.
#pragma once

#include <string>
#include <vector>

#include "contract/contract.h"
#include "contract/json_fields.h"
#include "contract/problems.h"

namespace servoflow::contract {

// How long one label may be, in bytes of UTF-8.
inline constexpr std::size_t kMaxLabelBytes = 64;

// The optional fields "names" and "units" of an "actions" object. A list that is there and empty, or holds
// something else than strings, is a problem.
void read_action_labels(JsonFields& actions, Actions& out);
// One list against the action's width: as many entries as columns, none of them empty, longer than
// kMaxLabelBytes or with control characters, and no name twice (`unique`; units may repeat).
void check_labels(const std::vector<std::string>& labels, int width, bool unique, const std::string& field,
                  Problems& problems);
// Both lists; an absent one is fine.
void check_action_labels(const Actions& actions, Problems& problems);

// The name, or "a" and the column's index where it is empty.
std::string column_name(const std::string& name, int column);
// The name of a column, by the same rule.
std::string action_name(const Actions& actions, int column);
// The unit of a column; empty where there is none.
std::string action_unit(const Actions& actions, int column);
// "x [m]"; the name alone where there is no unit, or the unit is "1", that of a plain number.
std::string label_text(const std::string& name, const std::string& unit);

}  // namespace servoflow::contract
