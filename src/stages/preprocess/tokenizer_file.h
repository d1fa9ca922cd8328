// A look at a SentencePiece model file before the library reads it.
#pragma once

#include <string_view>

#include "servoflow/status.h"

namespace servoflow::stages {

// Checks that the file is a protobuf message and that its character maps stay inside themselves: the library
// follows the offsets of a map's double array without looking, so that a damaged file would make it read
// outside its memory.
Status check_tokenizer_file(std::string_view bytes);

}  // namespace servoflow::stages
