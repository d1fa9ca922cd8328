// Pauses between attempts to connect: they double up to the longest, each with jitter, so that robots whose
// server went away do not all come back at the same moment.
#pragma once

#include <algorithm>
#include <cstdint>
#include <random>

namespace robot {

class Backoff {
 public:
  // Seconds; 0 < first_s <= longest_s.
  Backoff(double first_s, double longest_s, std::uint64_t seed)
      : first_s_(first_s), longest_s_(longest_s), pause_s_(first_s), random_(seed) {}

  // Seconds to wait now: half to all of the current pause, which then doubles.
  double next() {
    const double pause_s = pause_s_;
    pause_s_ = std::min(2 * pause_s_, longest_s_);
    return pause_s * std::uniform_real_distribution<double>(0.5, 1.0)(random_);
  }

  // A reply has come: the next pause is the first one again.
  void reset() { pause_s_ = first_s_; }

 private:
  double first_s_, longest_s_, pause_s_;
  std::mt19937_64 random_;
};

}  // namespace robot
