#include "contract/load.h"

#include <filesystem>

#include "contract/canonical.h"
#include "contract/lerobot.h"
#include "contract/problems.h"
#include "contract/toml_robot.h"
#include "contract/validate.h"
#include "core/status_macros.h"

namespace servoflow::contract {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kMaxContractBytes = std::size_t{16} << 20;

Result<Contract> load_whole(const std::string& path, const ContractRequest& request) {
  if (!request.assets.empty()) {
    return Status::invalid("--assets: " + path + " brings its own statistics; leave --assets out");
  }
  SF_ASSIGN_OR_RETURN(const Json json, read_json_file(path, kMaxContractBytes));
  return contract_from_json(json, path);
}

Result<Contract> load_with_openpi_statistics(const std::string& checkpoint_dir,
                                             const ContractRequest& request) {
  SF_ASSIGN_OR_RETURN(Contract contract, load_robot(request.robot));
  SF_ASSIGN_OR_RETURN(OpenpiStatistics statistics,
                      load_openpi_statistics(checkpoint_dir, request.assets, contract.asset));
  contract.asset = statistics.asset;
  contract.state_norm = {NormKind::kQuantile, NormStyle::kOpenpi, std::move(statistics.state)};
  contract.action_norm = {NormKind::kQuantile, NormStyle::kOpenpi, std::move(statistics.actions)};
  SF_RETURN_IF_ERROR(validated(contract, "robot " + contract.name + " with " + statistics.path));
  return contract;
}

}  // namespace

Result<Contract> load_contract(const std::string& checkpoint_dir, const ContractRequest& request) {
  if (request.robot.ends_with(".json")) return load_whole(request.robot, request);
  if (request.lerobot_layout) {
    if (!request.assets.empty()) {
      return Status::invalid(
          "--assets: " + checkpoint_dir +
          " is a lerobot checkpoint, whose statistics lie in its processors; leave --assets out");
    }
    SF_ASSIGN_OR_RETURN(Contract contract, load_lerobot_contract(checkpoint_dir));
    if (request.robot.empty()) return contract;
    return combine_robot_with_lerobot(request.robot, std::move(contract));
  }
  if (!request.robot.empty()) return load_with_openpi_statistics(checkpoint_dir, request);
  const std::string own = (fs::path(checkpoint_dir) / "contract.json").string();
  std::error_code ignored;
  if (fs::exists(own, ignored)) return load_whole(own, request);
  return Status::invalid(
      checkpoint_dir +
      ": robot: the checkpoint does not say which robot it is for; choose one with --robot: " +
      join(list_builtin_robots()) + ", or the path of a robot file (.toml)");
}

}  // namespace servoflow::contract
