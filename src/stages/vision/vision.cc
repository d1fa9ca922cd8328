#include "stages/vision/vision.h"

#include "core/status_macros.h"

namespace servoflow::stages {
namespace {
const std::string kPali = "paligemma_with_expert.paligemma.model.";
const std::string kTower = kPali + "vision_tower.vision_model.";
}  // namespace

Result<Vision> Vision::load(weights::Loader& loader, const weights::Architecture& architecture) {
  Vision v;
  v.sizes_ = architecture.vision;
  const std::string patch = kTower + "embeddings.patch_embedding.weight";
  if (loader.backend().prefers_parts()) {
    SF_ASSIGN_OR_RETURN(v.patch_, loader.matrix_in_parts(patch, v.patch_parts_));
  } else {
    SF_ASSIGN_OR_RETURN(v.patch_, loader.matrix({patch}, {.keep_float32 = true}));
  }
  SF_ASSIGN_OR_RETURN(v.patch_bias_, loader.vector(kTower + "embeddings.patch_embedding.bias"));
  SF_ASSIGN_OR_RETURN(v.position_, loader.vector(kTower + "embeddings.position_embedding.weight"));
  for (int i = 0; i < v.sizes_.depth; ++i) {
    const std::string layer = kTower + "encoder.layers." + std::to_string(i) + ".";
    const std::string attention = layer + "self_attn.";
    ops::SiglipWeights b{};
    SF_ASSIGN_OR_RETURN(b.norm1_weight, loader.vector(layer + "layer_norm1.weight"));
    SF_ASSIGN_OR_RETURN(b.norm1_bias, loader.vector(layer + "layer_norm1.bias"));
    SF_ASSIGN_OR_RETURN(
        b.qkv,
        loader.matrix({attention + "q_proj.weight", attention + "k_proj.weight", attention + "v_proj.weight"},
                      {.mode = ops::PackMode::kHeads, .head_dim = v.sizes_.head_dim()}));
    SF_ASSIGN_OR_RETURN(b.qkv_bias, loader.vector({attention + "q_proj.bias", attention + "k_proj.bias",
                                                   attention + "v_proj.bias"}));
    SF_ASSIGN_OR_RETURN(b.out, loader.matrix({attention + "out_proj.weight"}));
    SF_ASSIGN_OR_RETURN(b.out_bias, loader.vector(attention + "out_proj.bias"));
    SF_ASSIGN_OR_RETURN(b.norm2_weight, loader.vector(layer + "layer_norm2.weight"));
    SF_ASSIGN_OR_RETURN(b.norm2_bias, loader.vector(layer + "layer_norm2.bias"));
    SF_ASSIGN_OR_RETURN(b.fc1, loader.matrix({layer + "mlp.fc1.weight"}));
    SF_ASSIGN_OR_RETURN(b.fc1_bias, loader.vector(layer + "mlp.fc1.bias"));
    SF_ASSIGN_OR_RETURN(b.fc2, loader.matrix({layer + "mlp.fc2.weight"}));
    SF_ASSIGN_OR_RETURN(b.fc2_bias, loader.vector(layer + "mlp.fc2.bias"));
    v.blocks_.push_back(b);
  }
  SF_ASSIGN_OR_RETURN(v.norm_weight_, loader.vector(kTower + "post_layernorm.weight"));
  SF_ASSIGN_OR_RETURN(v.norm_bias_, loader.vector(kTower + "post_layernorm.bias"));
  SF_ASSIGN_OR_RETURN(v.projector_, loader.matrix({kPali + "multi_modal_projector.linear.weight"}));
  SF_ASSIGN_OR_RETURN(v.projector_bias_, loader.vector(kPali + "multi_modal_projector.linear.bias"));
  return v;
}

void Vision::run(ops::Backend& backend, const VisionRun& run) const {
  if (run.frames != nullptr)
    backend.letterbox({.frames = run.frames,
                       .data = run.data,
                       .pictures = run.pictures,
                       .image = sizes_.image,
                       .pixels = run.pixels});
  ops::Matrix patches = run.patches;  // planned for three parts
  patches.cols = patch_parts_ * 3 * sizes_.patch * sizes_.patch;
  backend.patch_rows({.pixels = run.pixels,
                      .pictures = run.pictures,
                      .image = sizes_.image,
                      .patch = sizes_.patch,
                      .out = patches});
  backend.matmul(
      {.x = patches,
       .w = &patch_,
       .y = run.x,
       .rows = run.rows,
       .epilogue = {.bias = patch_bias_, .row_bias = position_, .row_bias_period = sizes_.tokens()},
       .zone = "vision/patches"});
  // Pictures do not look at each other: a few go through the blocks side by side, where the device can.
  const int pictures = run.alone == nullptr ? 1 : run.pictures.likely;
  if (const int lanes = backend.lanes(pictures); lanes > 1) {
    for (int p = 0; p < lanes; ++p) {
      backend.begin_lane(p, lanes);
      run_blocks(backend, alone(backend, run, p));
    }
    backend.end_lanes();
  } else {
    run_blocks(backend, run);
  }
  backend.layer_norm(
      {.x = run.x, .y = run.scratch.normed, .rows = run.rows, .weight = norm_weight_, .bias = norm_bias_});
  // Image tokens are not rescaled (text tokens are).
  backend.matmul({.x = run.scratch.normed,
                  .w = &projector_,
                  .y = run.out,
                  .rows = run.rows,
                  .epilogue = {.bias = projector_bias_, .row_map = run.row_map},
                  .zone = "vision/projector"});
}

// What one picture's part of a run looks like to the blocks. Its rows are there: `likely` is what the call
// has.
VisionRun Vision::alone(ops::Backend& backend, const VisionRun& run, int picture) const {
  const int tokens = sizes_.tokens(), first = picture * tokens;
  const auto rows_of = [&](ops::Matrix m) {
    if (m.data != nullptr)
      m.data = static_cast<std::byte*>(m.data) +
               static_cast<std::uint64_t>(first) * static_cast<std::uint64_t>(m.pitch) * dtype_size(m.dtype);
    m.rows = tokens;
    return m;
  };
  VisionRun one = run;
  one.rows = {.capacity = tokens, .likely = tokens};
  one.segments = {.device = run.alone + picture,
                  .count = {.capacity = 1, .likely = 1},
                  .max_rows = run.segments.max_rows,
                  .max_keys = run.segments.max_keys};
  one.x = rows_of(run.x);
  one.scratch.normed = rows_of(run.scratch.normed);
  one.scratch.qkv = rows_of(run.scratch.qkv);
  const auto queries = [&](int rows) { return backend.query_bytes(rows, sizes_.heads, sizes_.head_dim()); };
  one.scratch.q = static_cast<std::byte*>(run.scratch.q) + (queries(first + tokens) - queries(tokens));
  one.scratch.attended = rows_of(run.scratch.attended);
  one.scratch.hidden = rows_of(run.scratch.hidden);
  return one;
}

void Vision::run_blocks(ops::Backend& backend, const VisionRun& run) const {
  for (std::size_t i = 0; i < blocks_.size(); ++i)
    backend.siglip_block({.weights = &blocks_[i],
                          .x = run.x,
                          .rows = run.rows,
                          .segments = run.segments,
                          .cache = run.cache,
                          .heads = sizes_.heads,
                          .scratch = run.scratch,
                          .next = i + 1 < blocks_.size() ? &blocks_[i + 1] : nullptr,
                          .normed = i > 0});
}

}  // namespace servoflow::stages
