// Structs of the C interface that start with their own size, so that programs and libraries of different
// versions can meet. Versions only append fields, and zero means "as before".
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <string>

#include "servoflow/status.h"

namespace servoflow::capi {

// No version will be as large: a larger size is an uninitialised struct.
inline constexpr std::size_t kMaxStructSize = 4096;

// `first` is the struct's size in version 1 of the interface.
inline Status check_struct_size(std::size_t size, std::size_t first, const std::string& name) {
  if (size >= first && size <= kMaxStructSize) return {};
  return Status::invalid(name + ".struct_size: is " + std::to_string(size) + ", expected at least " +
                         std::to_string(first) + "; start from the struct's INIT macro");
}

// Copies a caller's struct. What the caller's version lacks stays as it is in `out`; what it has beyond this
// library's must be zero, for it cannot be obeyed.
template <typename T>
Status read_struct(const void* given, std::size_t first, const std::string& name, T& out) {
  if (given == nullptr) return Status::invalid(name + ": is NULL");
  std::size_t size = 0;
  std::memcpy(&size, given, sizeof(size));
  if (Status status = check_struct_size(size, first, name); !status.ok()) return status;
  std::memcpy(&out, given, std::min(size, sizeof(T)));
  const auto* bytes = static_cast<const unsigned char*>(given);
  if (size > sizeof(T) &&
      std::any_of(bytes + sizeof(T), bytes + size, [](unsigned char b) { return b != 0; }))
    return Status::invalid(name + ": sets a field that this version of the library does not know");
  return {};
}

// Fills a caller's struct as far as its version goes; fields of a newer version become zero.
template <typename T>
Status write_struct(const T& value, std::size_t first, const std::string& name, T* given) {
  if (given == nullptr) return Status::invalid(name + ": is NULL");
  std::size_t size = 0;
  std::memcpy(&size, given, sizeof(size));
  if (Status status = check_struct_size(size, first, name); !status.ok()) return status;
  auto* bytes = reinterpret_cast<unsigned char*>(given);
  std::memcpy(bytes, &value, std::min(size, sizeof(T)));
  if (size > sizeof(T)) std::memset(bytes + sizeof(T), 0, size - sizeof(T));
  std::memcpy(bytes, &size, sizeof(size));
  return {};
}

}  // namespace servoflow::capi
