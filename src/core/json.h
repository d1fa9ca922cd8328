// Parsing JSON that users hand us: errors instead of exceptions, duplicate keys refused, depth and size
// limited.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "servoflow/status.h"

namespace servoflow {

using Json = nlohmann::json;

// Parses `text`; `where` (a path) starts every error message. Nesting deeper than 64 and duplicate keys are
// errors.
Result<Json> parse_json(std::string_view text, const std::string& where);
// Reads and parses a file of at most max_bytes.
Result<Json> read_json_file(const std::string& path, std::size_t max_bytes = std::size_t{64} << 20);

// "object", "array", "string", … for error messages.
std::string json_kind(const Json& value);

}  // namespace servoflow
