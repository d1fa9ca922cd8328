// Camera frames that arrive as files: decoding as preprocessing does it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "servoflow/status.h"

namespace servoflow {

struct DecodedImage {
  int height = 0, width = 0;
  std::vector<std::uint8_t> rgb;  // [height, width, 3]
};

// The pixels of a PNG or JPEG file, the same bytes that ImageLayout::kEncoded gives. Safe on hostile files;
// at most 16384 pixels a side and 64 Mpixel in all.
Result<DecodedImage> decode_image(std::span<const std::uint8_t> file);

}  // namespace servoflow
