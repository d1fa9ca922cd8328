#include "servoflow/image.h"

#include <utility>

#include "core/status_macros.h"
#include "stages/preprocess/image_decode.h"

namespace servoflow {

Result<DecodedImage> decode_image(std::span<const std::uint8_t> file) {
  stages::Image image;
  SF_RETURN_IF_ERROR(stages::decode_image(file, image));
  return DecodedImage{image.height, image.width, std::move(image.rgb)};
}

}  // namespace servoflow
