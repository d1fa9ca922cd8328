// Where exceptions and statuses become a status code and this thread's last error.
#pragma once

#include <exception>
#include <new>
#include <string>

#include "servoflow/servoflow.h"
#include "servoflow/status.h"

namespace servoflow::capi {

// This thread's last error. A text that could not be stored is replaced by a constant.
class LastError {
 public:
  const char* text() const { return shown_; }

  servoflow_status set(const Status& status) noexcept {
    shown_ = "";
    if (status.ok()) return SERVOFLOW_OK;
    try {
      stored_ = status.message();
      shown_ = stored_.c_str();
    } catch (...) {
      shown_ = kNoMemory;
    }
    return static_cast<servoflow_status>(status.code());
  }
  servoflow_status no_memory() noexcept {
    shown_ = kNoMemory;
    return SERVOFLOW_RUNTIME;
  }

 private:
  static constexpr const char* kNoMemory = "out of memory";
  std::string stored_;
  const char* shown_ = "";
};

inline LastError& last_error() {
  thread_local LastError error;
  return error;
}

// Runs the body of one C function. Nothing of the library throws on purpose, but memory can run out anywhere.
template <typename Body>
servoflow_status guarded(const Body& body) noexcept {
  try {
    return last_error().set(body());
  } catch (const std::bad_alloc&) {
    return last_error().no_memory();
  } catch (const std::exception& error) {
    try {
      return last_error().set(Status::runtime(std::string("unexpected failure: ") + error.what()));
    } catch (...) {
      return last_error().no_memory();
    }
  } catch (...) {
    return last_error().no_memory();
  }
}

}  // namespace servoflow::capi
