// What this machine can do at most, measured in a second: the ceiling that achieved rates are printed next
// to.
//
// Arithmetic: independent multiply-add chains that live in registers, in the widest instructions the CPU has.
// Memory: a streaming read of a block far larger than the caches. Each number is the best of three short
// runs.
#pragma once

#include <string>

#include "core/json.h"

namespace servoflow::toolkit {

struct Peak {
  double one = 0, all = 0;  // one thread, all threads; 0: the CPU has no such instruction
  std::string instruction;
};

struct Peaks {
  int threads = 1;
  Peak fp32, bf16, int8;  // 1e9 operations per second; a multiply-add is two
  Peak read;              // 1e9 bytes per second
};

// `seconds` is the length of one run; there are up to 24 of them.
Peaks measure_peaks(int threads, double seconds = 0.03);

Json peaks_to_json(const Peaks& peaks);

}  // namespace servoflow::toolkit
