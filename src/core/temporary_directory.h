// A directory beside the final one, removed unless it gets its final name: a failure leaves nothing
// half-written.
#pragma once

#include <filesystem>
#include <string>

#include "servoflow/status.h"

namespace servoflow {

class TemporaryDirectory {
 public:
  TemporaryDirectory() = default;
  ~TemporaryDirectory();
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  // Makes TARGET.tmp<process>.<serial>, and TARGET's parents.
  Status create(const std::filesystem::path& target);
  // Replaces `target` if that is an empty directory.
  Status move_to(const std::filesystem::path& target);
  std::string file(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

// Fails, naming the path, unless nothing is there or an empty directory.
Status check_new_directory(const std::string& path);

}  // namespace servoflow
