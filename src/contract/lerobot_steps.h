// lerobot's saved processor pipelines: an ordered list of registered steps with their configurations.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "contract/json_fields.h"
#include "contract/problems.h"
#include "core/json.h"

namespace servoflow::contract {

// Lists of names, each of one place of a checkpoint.
using ColumnNames = std::vector<std::vector<std::string>>;
// Adds that of `key`: a list of strings, or an object with one such list in it, as lerobot's datasets
// describe features ({"motors": [...]}). Anything else names nothing.
void read_column_names(JsonFields& fields, const std::string& key, ColumnNames& out);

struct NormalizerStep {
  std::string name;                          // "normalizer_processor"
  std::string state_file;                    // empty: saved without statistics
  std::map<std::string, std::string> modes;  // "STATE" -> "QUANTILES"
  ColumnNames action_names;                  // of this pipeline
};

struct PreprocessorSteps {
  std::map<std::string, std::string> rename_map;  // request name -> feature
  NormalizerStep normalizer;
  int max_tokens = 200;
  std::string task_key = "task";
};

// {"VISUAL": "IDENTITY", "STATE": "QUANTILES", …}; other modes than IDENTITY, QUANTILES and MEAN_STD are
// problems.
std::map<std::string, std::string> read_norm_map(const Json& json, const std::string& path,
                                                 Problems& problems);

// Strict: a step or setting that would change the numbers and is not known here is a problem that names it.
PreprocessorSteps read_preprocessor(const Json& json, const std::string& path, Problems& problems);
NormalizerStep read_postprocessor(const Json& json, const std::string& path, Problems& problems);

}  // namespace servoflow::contract
