// All memory of one network beside its weights, planned once for a capacity. Inference allocates nothing.
#pragma once

#include <cstdint>

#include "ops/composite/composite.h"
#include "stages/vision/vision.h"
#include "weights/architecture.h"

namespace servoflow::policy {

struct Capacity {
  int batch = 1;     // requests in one pass
  int pictures = 3;  // per request
};

// Device numbers of one pass, uploaded together.
struct Counts {
  std::int32_t pictures, vision_rows, text_rows, prefix_rows, suffix_rows, requests;
};

// What the host hands over for one pass beside pixels. It lies in one block, the same in staging memory and
// on the device, so that one copy moves all of it.
struct Inputs {
  Counts* counts = nullptr;
  ops::Segment* segments = nullptr;                         // pictures, then prefix, then suffix
  ops::Segment* alone = nullptr;                            // of each picture, were it the only one
  std::int32_t *vision_map = nullptr, *text_map = nullptr;  // rows of the prefix
  float* actions = nullptr;                                 // [rows, action_dim], both ways
  // Of raw inputs: tokens, one frame per picture, and the tables of all, of which only what they need is
  // copied. On the device the frames' pixels follow, straight from whoever holds them.
  std::int32_t* ids = nullptr;
  ops::Frame* frames = nullptr;
  std::byte* tables = nullptr;
};

struct Workspace {
  Inputs staged, device;
  std::uint64_t input_bytes = 0;  // up to the tables
  std::uint64_t table_bytes = 0, pixel_bytes = 0;
  // Host staging where inputs are not raw: pictures [pictures, image, image, 3], text [tokens, prefix width].
  float *staged_pixels = nullptr, *staged_text = nullptr;

  float* pixels = nullptr;  // device
  ops::Count picture_count, vision_rows, text_rows, prefix_rows, suffix_rows;
  ops::Segments picture_segments, prefix_segments, suffix_segments;

  ops::Matrix patches, vision_x, text, prefix_x, actions, velocity, suffix_x, final_normed;
  ops::BlockScratch vision, prefix, suffix;
  ops::KvCache picture_cache, prefix_cache;
  ops::RopeTable rope;

  std::uint64_t bytes = 0;  // device memory in all
};

// Parameters that go to the device: all but the token table where it is used in place, and what only the
// prefix's unused output needs.
std::uint64_t packed_parameters(const weights::Architecture& architecture, bool token_table);

Result<Workspace> plan_workspace(ops::Backend& backend, const weights::Architecture& architecture,
                                 const Capacity& capacity);

// The vision stage in this workspace: pictures in, rows of the prefix out.
stages::VisionRun vision_run(const Workspace& workspace);

}  // namespace servoflow::policy
