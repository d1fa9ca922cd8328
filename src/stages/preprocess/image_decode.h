// PNG and JPEG files to RGB pixels, as PIL's convert("RGB") gives them. Safe on hostile files: sizes are
// limited before memory is taken, damaged and truncated files are errors, and nothing leaks on the way out.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "servoflow/status.h"

namespace servoflow::stages {

struct Image {
  int width = 0, height = 0;
  std::vector<std::uint8_t> rgb;  // [height, width, 3]
};

// Decodes into `image`, whose memory is reused. Palettes are looked up, gray is repeated, alpha is dropped,
// 16-bit samples keep their upper byte. At most 16384 pixels a side and 64 Mpixel in all.
Status decode_image(std::span<const std::uint8_t> file, Image& image);

// Reads and decodes a file of at most 256 MiB; errors name the path.
Result<Image> read_image_file(const std::string& path);

}  // namespace servoflow::stages
