// Where a number was measured: the machine, its state at that moment, and the build. A latency without them
// is hearsay.
#pragma once

#include <cstdint>

#include "core/json.h"

namespace servoflow::toolkit {

// {cpu, flags, cores, governor, mhz, kernel, memory_bytes, available_bytes, load_average, huge_pages}; what
// the system does not tell is null.
Json machine_json();

// {version, revision, compiler, flags, type}, as configured.
Json build_json();

// The largest resident set this process had so far (VmHWM), and that of now (VmRSS); 0 where unknown.
std::uint64_t peak_resident_bytes();
std::uint64_t resident_bytes();

}  // namespace servoflow::toolkit
