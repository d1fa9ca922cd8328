#include "contract/statistics.h"

#include <algorithm>
#include <filesystem>
#include <system_error>

#include "contract/json_fields.h"
#include "contract/problems.h"
#include "contract/validate.h"
#include "core/status_macros.h"

namespace servoflow::contract {
namespace {

namespace fs = std::filesystem;

constexpr char kFileName[] = "norm_stats.json";
constexpr std::size_t kMaxFileBytes = std::size_t{16} << 20;
constexpr int kMaxDepth = 6;                // of assets/…/norm_stats.json
constexpr std::size_t kMaxEntries = 10000;  // looked at below assets/

Statistics read_feature(const Json& json, const std::string& path, Problems& problems) {
  JsonFields fields(json, path, problems);
  Statistics s;
  if (!fields.is_object()) return s;
  s.mean = fields.numbers("mean");
  s.std = fields.numbers("std");
  s.q01 = fields.numbers("q01", false);
  s.q99 = fields.numbers("q99", false);
  fields.refuse_unknown();
  const std::size_t width = s.mean.size();
  if (width == 0 && problems.empty()) problems.add(fields.field("mean"), "empty");
  if (width > kMaxWidth)
    problems.add(fields.field("mean"), "more than " + std::to_string(kMaxWidth) + " numbers");
  for (const auto& [name, values] : {std::pair{"std", &s.std}, {"q01", &s.q01}, {"q99", &s.q99}}) {
    const bool absent = values->empty() && name != std::string("std");
    if (!absent && values->size() != width) {
      problems.add(fields.field(name),
                   "has " + std::to_string(values->size()) + " numbers, mean has " + std::to_string(width));
    }
  }
  if (s.q01.empty() != s.q99.empty()) problems.add(path, "has only one of q01 and q99");
  for (std::size_t i = 0; i < s.std.size(); ++i) {
    if (s.std[i] < 0) problems.add(fields.field("std") + "[" + std::to_string(i) + "]", "negative");
  }
  for (std::size_t i = 0; i < std::min(s.q01.size(), s.q99.size()); ++i) {
    if (s.q99[i] < s.q01[i])
      problems.add(fields.field("q99") + "[" + std::to_string(i) + "]", "smaller than q01");
  }
  return s;
}

bool is_asset(const fs::path& assets, const std::string& id) {
  // An id comes from a user or a robot file: it must stay below assets/.
  const fs::path relative(id);
  if (id.empty() || relative.is_absolute()) return false;
  for (const fs::path& part : relative) {
    if (part == "..") return false;
  }
  std::error_code ignored;
  return fs::is_regular_file(assets / relative / kFileName, ignored);
}

}  // namespace

Result<OpenpiStatistics> parse_openpi_statistics(const Json& json, const std::string& where) {
  Problems problems(where);
  OpenpiStatistics out;
  JsonFields root(json, "", problems);
  if (const Json* stats = root.get("norm_stats", true)) {
    JsonFields features(*stats, "norm_stats", problems);
    if (const Json* state = features.get("state", true))
      out.state = read_feature(*state, "norm_stats.state", problems);
    if (const Json* actions = features.get("actions", true)) {
      out.actions = read_feature(*actions, "norm_stats.actions", problems);
    }
    features.refuse_unknown();
  }
  root.refuse_unknown();
  SF_RETURN_IF_ERROR(problems.status());
  return out;
}

std::vector<std::string> list_assets(const std::string& checkpoint_dir) {
  const fs::path assets = fs::path(checkpoint_dir) / "assets";
  std::vector<std::string> ids;
  std::error_code error;
  std::size_t looked_at = 0;
  fs::recursive_directory_iterator it(assets, fs::directory_options::skip_permission_denied, error), end;
  for (; !error && it != end && looked_at < kMaxEntries; it.increment(error), ++looked_at) {
    if (it.depth() >= kMaxDepth) it.disable_recursion_pending();
    std::error_code ignored;
    if (it->path().filename() != kFileName || !it->is_regular_file(ignored)) continue;
    const fs::path folder = it->path().parent_path();
    if (folder != assets) ids.push_back(folder.lexically_relative(assets).generic_string());
  }
  std::sort(ids.begin(), ids.end());
  return ids;
}

Result<std::string> choose_asset(const std::string& checkpoint_dir, const std::string& option,
                                 const std::string& robot_asset) {
  const fs::path assets = fs::path(checkpoint_dir) / "assets";
  if (!option.empty() && is_asset(assets, option)) return option;
  if (option.empty() && is_asset(assets, robot_asset)) return robot_asset;
  const std::vector<std::string> found = list_assets(checkpoint_dir);
  if (option.empty() && found.size() == 1) return found[0];
  if (found.empty()) {
    return Status::invalid(checkpoint_dir + ": assets: no statistics found; looked for assets/<asset id>/" +
                           kFileName + ". Copy the assets folder of the training checkpoint here");
  }
  const std::string asked = !option.empty()       ? "no statistics for \"" + option + "\""
                            : robot_asset.empty() ? std::string("several statistics folders")
                                                  : "no statistics for the robot's asset \"" + robot_asset +
                                                        "\", and several others";
  return Status::invalid(checkpoint_dir + ": assets: " + asked + "; found: " + join(found) +
                         ". Choose one with --assets");
}

Result<OpenpiStatistics> load_openpi_statistics(const std::string& checkpoint_dir, const std::string& option,
                                                const std::string& robot_asset) {
  SF_ASSIGN_OR_RETURN(const std::string asset, choose_asset(checkpoint_dir, option, robot_asset));
  const std::string path = (fs::path(checkpoint_dir) / "assets" / asset / kFileName).string();
  SF_ASSIGN_OR_RETURN(const Json json, read_json_file(path, kMaxFileBytes));
  SF_ASSIGN_OR_RETURN(OpenpiStatistics statistics, parse_openpi_statistics(json, path));
  statistics.asset = asset;
  statistics.path = path;
  return statistics;
}

}  // namespace servoflow::contract
