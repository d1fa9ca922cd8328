// Who may connect, and how fast they may send.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "servoflow/status.h"

namespace servoflow::serve {

// The API keys a server accepts; only their SHA-256 hashes stay in memory.
class KeyRing {
 public:
  // One key a line of `path` (empty: no file), lines that begin with # are comments; and the environment's
  // SERVOFLOW_API_KEY if it is set. Keys have 8 to 512 printable characters.
  static Result<KeyRing> load(const std::string& path);
  bool empty() const { return hashes_.empty(); }
  // Whether an Authorization header ("Api-Key K" or "Bearer K") holds one of the keys. Takes the same time
  // wherever a wrong key differs. True for everything when there are no keys.
  bool admits(std::string_view authorization) const;

 private:
  using Hash = std::array<std::uint8_t, 32>;
  Status add(std::string_view key, const std::string& where);
  std::vector<Hash> hashes_;
};

// A token bucket: `rate` requests a second on average, as many at once. Rate 0 lets everything pass.
class RateLimit {
 public:
  using Clock = std::chrono::steady_clock;
  explicit RateLimit(double rate) : rate_(rate), most_(rate < 1 ? 1 : rate), tokens_(most_) {}
  bool take(Clock::time_point now);

 private:
  double rate_, most_, tokens_;
  Clock::time_point last_{};
};

}  // namespace servoflow::serve
