// Handles that can be checked. A handle is a number that looks like a pointer: it is looked up in a table and
// never followed, so a freed, foreign or invented one is an error and not a crash. Numbers are never used
// again.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <unordered_map>

#include "servoflow/status.h"

namespace servoflow::capi {

// Common to all tables: a session's handle is no policy's.
inline std::uintptr_t next_handle() {
  static std::atomic<std::uintptr_t> last{0};
  return ++last;
}

// Handle is the opaque type of the C interface, Object what it names. Thread-safe. Objects are shared: one
// that is freed while another call uses it lives until that call ends.
template <typename Handle, typename Object>
class HandleTable {
 public:
  explicit HandleTable(const char* kind) : kind_(kind) {}

  Handle* add(std::shared_ptr<Object> object) {
    const std::uintptr_t id = next_handle();
    const std::unique_lock lock(mutex_);
    objects_.emplace(id, std::move(object));
    return reinterpret_cast<Handle*>(id);  // NOLINT(performance-no-int-to-ptr): never followed
  }

  Result<std::shared_ptr<Object>> find(const Handle* handle) const {
    if (handle == nullptr) return Status::invalid(std::string(kind_) + ": is NULL");
    const std::shared_lock lock(mutex_);
    const auto it = objects_.find(reinterpret_cast<std::uintptr_t>(handle));
    if (it == objects_.end()) return dead();
    return it->second;
  }

  // The object outlives the lock: what its end takes must not hold up other calls.
  Status remove(const Handle* handle) {
    if (handle == nullptr) return {};
    std::shared_ptr<Object> last;
    const std::unique_lock lock(mutex_);
    const auto it = objects_.find(reinterpret_cast<std::uintptr_t>(handle));
    if (it == objects_.end()) return dead();
    last = std::move(it->second);
    objects_.erase(it);
    return {};
  }

 private:
  Status dead() const {
    return Status::invalid(std::string(kind_) + ": not a live handle (freed already, or of another kind)");
  }

  const char* kind_;
  mutable std::shared_mutex mutex_;
  std::unordered_map<std::uintptr_t, std::shared_ptr<Object>> objects_;
};

}  // namespace servoflow::capi
