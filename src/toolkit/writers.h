// An action chunk as a file: .npy for programs, .json for everything, .csv for a spreadsheet.
#pragma once

#include <string>
#include <vector>

#include "core/json.h"
#include "servoflow/action_chunk.h"
#include "servoflow/policy.h"
#include "servoflow/status.h"

namespace servoflow::toolkit {

// PolicyInfo::components: [{"component", "precision", "kernel", "layers", "parameters", "weight_bytes"}, …].
Json precisions_to_json(const std::vector<ComponentPrecision>& components);
// A line each for what is not plain bf16 or fp32; empty if nothing is.
std::string precisions_text(const std::vector<ComponentPrecision>& components);

// Everything in the chunk, actions and normalised actions as arrays of rows.
Json chunk_to_json(const ActionChunk& chunk);

// "step,a0,a1,…", one row per action, shortest digits that read back exactly.
std::string chunk_to_csv(const ActionChunk& chunk);

// Writes by the path's ending: .npy (float64 [horizon, action_dim]), .json or .csv; another ending is an
// error.
Status write_chunk(const ActionChunk& chunk, const std::string& path);
// The same error without writing, for telling the user before the work is done.
Status check_chunk_path(const std::string& path);

// JSON for people and programs: two spaces of indent; bytes that are not UTF-8 become U+FFFD instead of an
// exception.
std::string json_text(const Json& json);

}  // namespace servoflow::toolkit
