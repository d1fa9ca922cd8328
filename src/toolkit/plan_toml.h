// TOML files of the planner and of benchmark matrices as JSON, so that one strict reader serves all.
#pragma once

#include <string>
#include <string_view>

#include "core/json.h"

namespace servoflow::toolkit {

// contract/toml_json.h with every problem an error. `where` (a path) starts each line of it. Dates,
// non-finite numbers, multi-line strings and files beyond 1 MiB are errors.
Result<Json> parse_toml(std::string_view text, const std::string& where);
Result<Json> read_toml_file(const std::string& path);

}  // namespace servoflow::toolkit
