// Pictures -> SigLIP -> projector: image tokens, written straight to their rows of the prefix.
#pragma once

#include <vector>

#include "ops/composite/composite.h"
#include "weights/architecture.h"
#include "weights/loader.h"

namespace servoflow::stages {

// Everything one run works on, planned once.
struct VisionRun {
  // Device. Frames to letterbox into `pixels`, their offsets counting from `data`; null: pixels are there.
  const ops::Frame* frames = nullptr;
  const std::byte* data = nullptr;
  float* pixels = nullptr;    // [pictures, image, image, 3] in [-1, 1]
  ops::Count pictures, rows;  // rows = pictures * tokens
  ops::Segments segments;     // one per picture, slot = picture
  // Device, one per picture: its segment if it were the only one. Null: `pictures.likely` is a hint, and
  // pictures go through the blocks together; otherwise it is their exact number, of which lanes may be made.
  const ops::Segment* alone = nullptr;
  const ops::KvCache* cache = nullptr;
  ops::Matrix patches;  // [rows, 3 patch²] float32, or [rows, 9 patch²] bfloat16 in parts
  ops::Matrix x;        // [rows, width] float32
  ops::BlockScratch scratch;
  ops::Matrix out;                        // the prefix's embeddings [rows, prefix width] float32
  const std::int32_t* row_map = nullptr;  // row of `out` for each row here
};

class Vision {
 public:
  static Result<Vision> load(weights::Loader& loader, const weights::Architecture& architecture);
  void run(ops::Backend& backend, const VisionRun& run) const;

 private:
  void run_blocks(ops::Backend& backend, const VisionRun& run) const;
  VisionRun alone(ops::Backend& backend, const VisionRun& run, int picture) const;

  weights::VisionSizes sizes_;
  // Float32 in the network's own BF16 form; where that is slow its operands come in bfloat16 parts.
  ops::Weight patch_, projector_;
  int patch_parts_ = 1;
  const float *patch_bias_ = nullptr, *position_ = nullptr, *norm_weight_ = nullptr, *norm_bias_ = nullptr,
              *projector_bias_ = nullptr;
  std::vector<ops::SiglipWeights> blocks_;
};

}  // namespace servoflow::stages
