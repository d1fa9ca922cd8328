// All memory of one network beside its weights, planned once for a capacity. Inference allocates nothing.
#pragma once

#include <cstdint>

#include "ops/composite/composite.h"
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

struct Workspace {
  // Host staging, written by the host and uploaded.
  float* staged_pixels = nullptr;   // [pictures, image, image, 3]
  float* staged_text = nullptr;     // [tokens, prefix width]
  float* staged_actions = nullptr;  // [rows, action_dim], both ways
  std::int32_t* staged_vision_map = nullptr;
  std::int32_t* staged_text_map = nullptr;
  ops::Segment* staged_segments = nullptr;  // pictures, then prefix, then suffix
  Counts* staged_counts = nullptr;

  // Device.
  float* pixels = nullptr;
  std::int32_t *vision_map = nullptr, *text_map = nullptr;
  ops::Segment* segments = nullptr;
  Counts* counts = nullptr;
  ops::Count picture_count, vision_rows, text_rows, prefix_rows, suffix_rows;
  ops::Segments picture_segments, prefix_segments, suffix_segments;

  ops::Matrix patches, vision_x, text, prefix_x, actions, velocity, suffix_x, final_normed;
  ops::BlockScratch vision, prefix, suffix;
  ops::KvCache picture_cache, prefix_cache;
  ops::RopeTable rope;

  std::uint64_t bytes = 0;  // device memory in all
};

Result<Workspace> plan_workspace(ops::Backend& backend, const weights::Architecture& architecture,
                                 const Capacity& capacity);

}  // namespace servoflow::policy
