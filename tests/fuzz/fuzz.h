// What all fuzz targets share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "servoflow/status.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace servoflow::fuzz {

inline std::string_view as_text(const std::uint8_t* data, std::size_t size) {
  return {reinterpret_cast<const char*>(data), size};
}

// A property that holds for every input.
inline void require(bool holds) {
  if (!holds) std::abort();
}

// Whether there is a value. A refusal must say why.
template <typename T>
bool accepted(const Result<T>& result) {
  require(result.ok() || (!result.status().message().empty() && result.status().code() != StatusCode::kOk));
  return result.ok();
}
inline bool accepted(const Status& status) {
  require(status.ok() || !status.message().empty());
  return status.ok();
}

}  // namespace servoflow::fuzz
