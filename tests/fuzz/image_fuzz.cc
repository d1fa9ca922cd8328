// Bytes from a client that should be a PNG or JPEG: refused, or a picture that can be letterboxed.
#include "stages/preprocess/image_decode.h"
#include "stages/preprocess/resize.h"
#include "tests/fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  namespace stages = servoflow::stages;
  stages::Image image;
  if (!servoflow::fuzz::accepted(stages::decode_image({data, size}, image))) return 0;
  const std::size_t pixels = static_cast<std::size_t>(image.width) * image.height;
  servoflow::fuzz::require(image.rgb.size() == pixels * 3);
  if (pixels > (1u << 16)) return 0;  // large pictures only cost time
  constexpr int kSize = 28;
  std::vector<float> out(std::size_t{kSize} * kSize * 3);
  using servoflow::contract::Resize;
  for (const Resize mode : {Resize::kPillow, Resize::kOpenpiFloat, Resize::kLerobotFloat}) {
    stages::Letterbox letterbox(mode);
    if (!servoflow::fuzz::accepted(letterbox.run(image.rgb, image.width, image.height, kSize, out))) continue;
    for (const float x : out) servoflow::fuzz::require(x >= -1.0f && x <= 1.0f);
  }
  return 0;
}
