// SHA-256 of what comes in pieces.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "servoflow/policy.h"
#include "servoflow/status.h"
#include "weights/checkpoint.h"

namespace servoflow::toolkit {

class Digest {
 public:
  Digest();
  ~Digest();
  Digest(const Digest&) = delete;
  Digest& operator=(const Digest&) = delete;
  void add(std::span<const std::byte> bytes);
  // With its length, so that "ab", "c" differs from "a", "bc".
  void add(std::string_view text);
  // 64 hexadecimal digits; nothing may be added afterwards.
  std::string hex();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Of all tensors that the network uses: names, dtypes, shapes and bytes, in the manifest's order. Reads every
// weight once.
Result<std::string> weights_digest(const weights::Checkpoint& checkpoint,
                                   const ProgressFunction& progress = {});
Result<std::string> file_digest(const std::string& path);

}  // namespace servoflow::toolkit
