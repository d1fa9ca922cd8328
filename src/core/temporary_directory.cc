#include "core/temporary_directory.h"

#include <unistd.h>

#include <system_error>

namespace servoflow {

namespace fs = std::filesystem;

TemporaryDirectory::~TemporaryDirectory() {
  std::error_code ignored;
  if (!path_.empty()) fs::remove_all(path_, ignored);
}

Status TemporaryDirectory::create(const fs::path& target) {
  std::error_code error;
  if (target.has_parent_path()) fs::create_directories(target.parent_path(), error);
  // An interrupted run may have left a directory of this process number behind: never write into that.
  for (int serial = 0; !error; ++serial) {
    const fs::path path =
        target.string() + ".tmp" + std::to_string(::getpid()) + "." + std::to_string(serial);
    if (!fs::create_directory(path, error)) continue;
    path_ = path;
    return {};
  }
  return Status::invalid(target.string() + ": cannot create: " + error.message());
}

Status TemporaryDirectory::move_to(const fs::path& target) {
  std::error_code error;
  fs::rename(path_, target, error);  // replaces an empty directory
  if (error) return Status::runtime(target.string() + ": cannot create: " + error.message());
  path_.clear();
  return {};
}

Status check_new_directory(const std::string& path) {
  std::error_code error;
  if (!fs::exists(path, error)) return {};
  if (!fs::is_directory(path, error)) return Status::invalid(path + ": exists and is not a directory");
  if (!fs::is_empty(path, error) || error)
    return Status::invalid(path + ": exists and is not empty; remove it or choose another directory");
  return {};
}

}  // namespace servoflow
