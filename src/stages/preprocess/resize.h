// Letterboxing a camera frame into the square picture the vision tower sees: the aspect ratio is kept, the
// rest is border.
//
// kPillow reproduces, bit for bit, what Pillow's bilinear resampling does with uint8 pixels: antialiased when
// it shrinks (support max(1, in/out) on each axis), weights in 22-bit fixed point, the horizontal pass
// rounded to uint8 before the vertical one. The float variants reproduce torch's bilinear interpolation
// without antialiasing, coordinates in float32.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "contract/contract.h"
#include "servoflow/status.h"
#include "stages/flow.h"

namespace servoflow::stages {

// Frames beyond these are refused before anything is computed.
inline constexpr int kMaxImageSide = 16384;
inline constexpr std::int64_t kMaxImagePixels = std::int64_t{64} << 20;

// Where the resized frame lies inside the square.
struct Placement {
  int width = 0, height = 0, left = 0, top = 0;
};

// Fails when a side would shrink to nothing (a 3x700 frame).
Result<Placement> fit(int width, int height, int size);

class Letterbox {
 public:
  explicit Letterbox(contract::Resize mode);

  // u8 [height, width, 3] -> float [size, size, 3] in [-1, 1]. A frame that is already size x size is only
  // scaled. Scratch memory and weights are kept: calling again with a size seen before allocates nothing.
  Status run(std::span<const std::uint8_t> rgb, int width, int height, int size, std::span<float> pixels);

  // kPillow's intermediate result: u8 [size, size, 3].
  Status run_u8(std::span<const std::uint8_t> rgb, int width, int height, int size,
                std::span<std::uint8_t> out);

  // The same resampling for a device that does it itself, to the bit; fails where `run` would. Frames that
  // `fits_device` refuses must go through `run`. `out` keeps its tables from one frame to the next.
  Status describe(std::span<const std::uint8_t> bytes, int width, int height, bool planes, int size,
                  RawFrame& out);
  static bool fits_device(int width, int height);

 private:
  struct Cache {
    std::vector<std::unique_ptr<AxisTable>> axes;
    std::size_t next = 0;  // the slot that the next new size takes once the cache is full
  };
  const AxisTable& axis(int in, int out);

  void resize_pillow(const std::uint8_t* rgb, int width, int height, const Placement& place, int size,
                     std::uint8_t* out);
  void resize_torch(const std::uint8_t* rgb, int width, int height, const Placement& place, int size,
                    float* out);

  contract::Resize mode_;
  Cache cache_;
  std::vector<std::uint8_t> narrow_, square_;  // after the horizontal pass; the letterboxed picture
  std::vector<std::int32_t> sums_;
};

}  // namespace servoflow::stages
