// Host entry points of the CUDA kernels: each enqueues on a stream and returns the launch's error.
#pragma once

#include <cstdint>

#include "ops/backend.h"
#include "ops/cuda/epilogue.cuh"
#include "ops/cuda/launch.h"

namespace servoflow::ops::cuda {

// A modulation as kernels take it: the row of base step 0 of one site.
struct DeviceModulation {
  const float* scale = nullptr;  // [width], shift follows after `width` elements
  std::int64_t step_pitch = 0;
  const std::int32_t* row_offset = nullptr;
};

// The next norm over a row that was just completed. kind 0: none.
struct NextNorm {
  enum Kind : std::uint8_t { kNone, kLayer, kRms, kModulated } kind = kNone;
  const float *weight = nullptr, *bias = nullptr;
  DeviceModulation modulation;
  float eps = 1e-6f;
  Matrix y;
};

// Success if this build holds machine code for the current device.
cudaError_t kernels_run_here();

cudaError_t letterbox(const Stream& s, const Letterbox& op);
cudaError_t patch_rows(const Stream& s, const PatchRows& op);
cudaError_t scale_rows(const Stream& s, const ScaleRows& op);
// y = bf16(x), x float32.
cudaError_t round_rows(const Stream& s, const Matrix& x, const Matrix& y, Count rows);
// y = norm(x). With `partials` (splits x [rows, width] float32, `split_pitch` elements apart), first
// x += epilogue(sum of the partials in order): the end of a product whose sums were split.
struct FinishRows {
  Matrix x;
  Count rows;
  const float* partials = nullptr;
  int splits = 0;
  std::int64_t split_pitch = 0;
  DeviceEpilogue epilogue;
  NextNorm norm;
};
cudaError_t finish_rows(const Stream& s, const FinishRows& op);
cudaError_t split_qkv(const Stream& s, const Matrix& qkv, const DeviceQkv& out, Count rows);
cudaError_t time_embedding(const Stream& s, const TimeEmbedding& op);
cudaError_t euler_step(const Stream& s, const EulerStep& op);

// `from` [rows, k] of the checkpoint's dtype -> its rows' places in the packed weight, for features
// first … first + rows - 1. A value that is not finite, or stops being so, sets *bad.
cudaError_t pack_rows(cudaStream_t stream, const void* from, DType dtype, int rows, int first,
                      const WeightLayout& layout, void* to, int* bad);

// A kernel that does nothing, so that those behind it on a stream that has just forked or joined can start
// early like any others.
cudaError_t start_chain(const Stream& s);

// Elements first … first + count - 1 of a sequence, float32 or bfloat16.
cudaError_t fill_sequence(cudaStream_t stream, const Sequence& sequence, std::uint64_t first,
                          std::uint64_t count, DType dtype, void* to);

// y = epilogue(x · Wᵀ), one float32 sum per element in order of k. For any shape and dtype, without tensor
// cores; never split.
cudaError_t product_plain(const Stream& s, const Product& op);
// On tensor cores of sm_80 and later; x bf16 with 16-byte rows; never split.
cudaError_t product_mma(const Stream& s, const Product& op);
// On the warpgroup instructions of sm_90a. `likely_rows`: how many rows to expect, for the tile's shape.
cudaError_t product_wgmma(const Stream& s, const Product& op, int likely_rows);
bool wgmma_is_built();
bool wgmma_takes(const Product& op);
// How often product_wgmma splits the sums of an [n, k] weight, and partials must be given: a matter of the
// weight alone, so that the order of summation is.
int wgmma_splits(int n, int k);

// softmax(q kᵀ scale) v over segments; queries, keys and values as DeviceQkv lays them out.
struct DeviceAttention {
  const void *q = nullptr, *k = nullptr, *v = nullptr;
  bool f32 = false;  // of q, k, v
  int heads = 0, kv_heads = 0, head_dim = 0, keys = 0, slots = 0;
  Segments segments;
  float scale = 1;
  Matrix out;
};
cudaError_t attention_plain(const Stream& s, const DeviceAttention& op);
cudaError_t attention_mma(const Stream& s, const DeviceAttention& op);
bool attention_mma_takes(int head_dim);
// On the warpgroup instructions of sm_90a: heads of 256 that share one key/value head; heads of 72, each with
// its own, over at most 256 keys.
cudaError_t attention_wide(const Stream& s, const DeviceAttention& op);
bool attention_wide_takes(const DeviceAttention& op);
cudaError_t attention_picture(const Stream& s, const DeviceAttention& op);
bool attention_picture_takes(const DeviceAttention& op);

}  // namespace servoflow::ops::cuda
