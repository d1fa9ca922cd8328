// TOML as JSON, so that one strict reader serves both.
#pragma once

#include <string>
#include <string_view>

#include "contract/problems.h"
#include "core/json.h"
#include "servoflow/status.h"

namespace servoflow::contract {

// The document's tables, arrays, strings, numbers and booleans. Dates and non-finite numbers are recorded in
// `problems`. `where` (a path) starts every message. The caller bounds the size.
Result<Json> parse_toml(std::string_view toml, const std::string& where, Problems& problems);

}  // namespace servoflow::contract
