#include "toolkit/plan_toml.h"

#include "contract/problems.h"
#include "contract/toml_json.h"
#include "core/file.h"
#include "core/status_macros.h"

namespace servoflow::toolkit {
namespace {

constexpr std::size_t kMaxBytes = std::size_t{1} << 20;

}  // namespace

Result<Json> parse_toml(std::string_view text, const std::string& where) {
  if (text.size() > kMaxBytes) return Status::invalid(where + ": larger than 1 MiB");
  contract::Problems problems(where);
  SF_ASSIGN_OR_RETURN(Json json, contract::parse_toml(text, where, problems));
  SF_RETURN_IF_ERROR(problems.status());
  return json;
}

Result<Json> read_toml_file(const std::string& path) {
  SF_ASSIGN_OR_RETURN(const std::string text, read_text_file(path, kMaxBytes));
  return parse_toml(text, path);
}

}  // namespace servoflow::toolkit
