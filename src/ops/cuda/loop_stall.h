// What the denoise loop's one launch leaves behind when a wait in it does not end, and what that means.
#pragma once

#include <string>

namespace servoflow::ops::cuda {

inline constexpr int kLoopRequests = 16;
inline constexpr int kLoopCounters = 33;  // per request

namespace loop {
// Counters of one request. One that a hundred blocks count on would make them wait for each other: there is
// one for each rank, of keys and values one for every eighth group, of attended rows one for each head, of
// hidden ones one for each slice.
enum Counter : int { kEdges, kColumns, kKeys = kColumns + 8, kAttended = kKeys + 8, kHidden = kAttended + 8 };
static_assert(kHidden + 8 == kLoopCounters);
}  // namespace loop

// Written by the thread that gives up, into host memory.
struct LoopStall {
  // Who gave up, at which counter, and what had been seen there of what was waited for (0: nobody has).
  unsigned block = 0, counter = 0, seen = 0, wanted = 0;
  unsigned counts[kLoopRequests * kLoopCounters] = {};  // every counter, a moment later
};

// What the host knows of the launch.
struct LoopLaunch {
  int first = 0, steps = 0, depth = 0;
  int rows = 0;  // of every request
};

// Which exchange the loop stands at (step, layer, phase, request), how many have counted there of how many,
// and who gave up waiting.
std::string describe(const LoopStall& stall, const LoopLaunch& launch);

}  // namespace servoflow::ops::cuda
