// Requests that `servoflow serve --record` wrote (safetensors files), read back as observations.
#pragma once

#include <string>

#include "action_timeline.h"
#include "client_wire.h"

namespace robot {

struct RecordedCase {
  Observation observation;  // with its noise and number of steps: the answer is determined
  Actions expected;         // what the server sent then
};

// Throws std::runtime_error: "FILE: what is wrong with it".
RecordedCase read_case(const std::string& path);

// The same from a file's bytes; the message does not name the file.
RecordedCase parse_case(std::string_view file);

}  // namespace robot
