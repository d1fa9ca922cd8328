// What a robot sees and is told: the input of one inference.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace servoflow {

enum class ImageLayout {
  kHWC,      // [height, width, 3] u8
  kCHW,      // [3, height, width] u8
  kEncoded,  // PNG or JPEG file bytes; height and width are ignored
};

// One camera frame. The pixels are borrowed: they must stay alive until infer() returns.
struct ImageView {
  std::string_view
      name;  // a request key of the robot contract ("observation/image") or a model slot ("base_0_rgb")
  ImageLayout layout = ImageLayout::kHWC;
  int height = 0, width = 0;
  std::span<const std::uint8_t> bytes;
};

struct Observation {
  std::vector<ImageView> images;
  // The robot's state in its own units: the contract's state parts, concatenated in the contract's order.
  std::span<const double> state;
  std::optional<std::string_view> prompt;  // absent: the contract's default prompt, else an error
  // Ready token ids instead of a prompt (models without a tokenizer at hand). Not both.
  std::span<const std::int32_t> tokens;
};

}  // namespace servoflow
