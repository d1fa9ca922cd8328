// Errors without exceptions: every call that can meet a user's mistake returns a Status or a Result<T>.
#pragma once

#include <cassert>
#include <optional>
#include <string>
#include <utility>

namespace servoflow {

// What kind of failure it is. The command line's exit codes follow from it (see exit_code).
enum class StatusCode {
  kOk = 0,
  kCheckFailed,   // a comparison, gate or parity check did not hold
  kInvalidInput,  // the user's files, fields or arguments are wrong; the message names file, field and cause
  kRuntime,       // the machine or device failed: out of memory, an I/O error, a non-finite result
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  static Status ok_status() { return {}; }
  static Status invalid(std::string message) { return {StatusCode::kInvalidInput, std::move(message)}; }
  static Status runtime(std::string message) { return {StatusCode::kRuntime, std::move(message)}; }
  static Status check_failed(std::string message) { return {StatusCode::kCheckFailed, std::move(message)}; }

  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }
  // The same failure, told in a wider context: "context: message".
  Status with_context(const std::string& context) const {
    return ok() ? *this : Status(code_, context + ": " + message_);
  }

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

// Process exit code: 0 success, 1 a check failed, 2 bad input or usage, 3 device or run-time failure.
inline int exit_code(const Status& status) { return static_cast<int>(status.code()); }

// A value, or the reason why there is none.
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}  // NOLINT: implicit on purpose
  Result(Status status) : status_(std::move(status)) {
    assert(!status_.ok());
  }  // NOLINT: implicit on purpose

  bool ok() const { return value_.has_value(); }
  const Status& status() const { return status_; }
  T& value() & { return *value_; }
  const T& value() const& { return *value_; }
  T&& value() && { return std::move(*value_); }
  T& operator*() & { return *value_; }
  const T& operator*() const& { return *value_; }
  T&& operator*() && { return std::move(*value_); }
  T* operator->() { return &*value_; }
  const T* operator->() const { return &*value_; }

 private:
  std::optional<T> value_;
  Status status_;
};

}  // namespace servoflow
