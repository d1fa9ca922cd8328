// The contracts of every operation a backend offers: what goes in, what comes out, in which shapes.
//
// Rows. Activations are matrices of rows. A matrix has a host-side capacity; how many of its rows are valid
// this time is a number in device memory, so that one captured graph serves any prompt length, mask and mix
// of robots. Rows beyond the count are never read by anyone and may hold anything. Segments. A batch is
// ragged: each segment is a run of consecutive rows that belongs to one K/V slot. Summation. Every sum runs
// in an order given by its length and the weight's format alone, never by the number of rows or by timing: a
// request has the same bits alone and in any batch. Memory. Pointers are device pointers of the backend that
// made them; the host never looks through them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "core/dtype.h"
#include "core/shape.h"
#include "quant/formats.h"

namespace servoflow::ops {

// Device integer that may be unknown to the host when work is enqueued. `device` null: all `capacity` rows
// are valid. `likely`: how many to expect, 0 if unknown; it may choose a kernel's shape, never a result.
struct Count {
  int capacity = 0;
  const std::int32_t* device = nullptr;
  int likely = 0;
};

// Row-major matrix in device memory. `pitch` is the distance between rows in elements.
struct Matrix {
  void* data = nullptr;
  DType dtype = DType::kF32;
  int rows = 0;  // capacity
  int cols = 0;
  std::int64_t pitch = 0;
};

// A weight packed by Backend::pack: [n, k] for y = x · Wᵀ, in a layout of the backend's own.
struct Weight {
  int n = 0, k = 0;
  DType stored = DType::kF32;  // precision of the packed elements
  bool paired = false;         // gate and up rows interleaved for the GeGLU epilogue; n counts both
  const void* data = nullptr;
  std::uint64_t bytes = 0;
  const char* name = nullptr;  // of its tensors, a space between them; null if nobody said
  // Of a weight that was packed quantized, and how its product rounds inputs; else not quantized and null.
  quant::LinearFormat format = {};
  const void* layout = nullptr;  // the backend's own
};

enum class Activation : std::uint8_t { kNone, kGeluTanh, kSilu };

// AdaRMS modulation of an N-step schedule: rows of [layer-norm site][scale, shift, gate][width] float32.
// Row of a token: base + (row_offset ? row_offset[token] : 0).
struct ModulationRow {
  const float* table = nullptr;  // [steps, sites, 3, width]
  std::int64_t step_pitch = 0;   // elements between steps
  int site = 0, width = 0;
  int base = 0;
  const std::int32_t* row_offset = nullptr;  // device, one per token, or null
};

// What happens to x · Wᵀ before it is stored, in this order.
struct Epilogue {
  const float* bias = nullptr;  // [n]
  Activation activation = Activation::kNone;
  bool geglu = false;                   // paired weight: y = gelu(gate) * up, n/2 columns
  const ModulationRow* gate = nullptr;  // multiply by the modulation's gate row
  const float* row_bias =
      nullptr;  // [period, n] float32 added to row i as row_bias[i % period] (position table)
  int row_bias_period = 0;
  bool accumulate = false;                // y += instead of y = (float32 output only)
  const std::int32_t* row_map = nullptr;  // row i of the product goes to row row_map[i] of y
};

// A run of rows on one K/V slot. The rows sit at positions past … past+rows-1 of the slot and attend to all
// of 0 … past+rows-1 (bidirectionally among themselves).
struct Segment {
  std::int32_t row_begin = 0, rows = 0;
  std::int32_t slot = 0, past = 0;
};

struct Segments {
  const Segment* device = nullptr;
  Count count;
  int max_rows = 0;  // of one segment
  int max_keys = 0;  // past + rows of one segment
};

// Keys and values of `slots` independent sequences over `layers` layers; the layout inside is the backend's
// own.
struct KvCache {
  int layers = 0, slots = 0, keys = 0 /* capacity of one slot */, kv_heads = 0, head_dim = 0;
  DType dtype = DType::kF32;
  void* data = nullptr;
  std::uint64_t bytes = 0;
};

// Rotation angles, made once: cos and sin [positions, head_dim / 2] float32, from float64 angles rounded
// once.
struct RopeTable {
  const float* cos = nullptr;
  const float* sin = nullptr;
  int positions = 0, half = 0;
};

// How the pixels of a frame become those of a picture.
enum class Resampling : std::int32_t {
  kFixedPoint,  // bytes; sums with weights of 22 fraction bits, columns first, each pass rounded to a byte;
                // then v / 255 · 2 - 1
  kSymmetric,   // bytes; float32 between two neighbours on each axis of v / 255 · 2 - 1, clamped to [-1, 1]
  kUnit,        // the same of v / 255, clamped to [0, 1], then · 2 - 1
  kReady,       // a float32 picture already
};

// One camera's frame in device memory and its way into a picture. It lies there itself, so that one record
// serves frames of any size. Offsets are bytes into Letterbox::data, multiples of 4.
struct Frame {
  Resampling resampling = Resampling::kReady;
  std::int32_t width = 0, height = 0;
  std::int32_t planes = 0;  // 0: [height, width, 3]; 1: [3, height, width]
  // Where the resized frame lies in the picture; the rest is border, -1.
  std::int32_t left = 0, top = 0, columns = 0, rows = 0;
  std::int64_t pixels = 0;
  // Of an axis with n outputs, int32: n times `first`, n times `second`, then [n, taps] weights.
  // kFixedPoint: output i is the weighted sum of `second` inputs from `first` on.
  // kSymmetric, kUnit: in[first] (1 - w) + in[second] w; w is the bits of a float32, taps is 1.
  std::int64_t column_table = 0, row_table = 0;
  std::int32_t column_taps = 0, row_taps = 0;
};
inline constexpr int kResamplingBits = 22;
// The largest frame that is resized on the device; larger ones arrive as pictures.
inline constexpr std::uint64_t kMaxFrameBytes = std::uint64_t{3} * 1280 * 960;
inline constexpr int kMaxFrameSide = 4096;
// Enough for the tables of one frame; for its pixels or a picture.
constexpr std::uint64_t max_table_bytes(int image) {
  return 2 * (2 * std::uint64_t{kMaxFrameSide} + 5 * static_cast<std::uint64_t>(image)) *
             sizeof(std::int32_t) +
         64;
}
constexpr std::uint64_t max_pixel_bytes(int image) {
  const std::uint64_t picture = static_cast<std::uint64_t>(image) * static_cast<std::uint64_t>(image) * 12;
  return ((picture > kMaxFrameBytes ? picture : kMaxFrameBytes) + 255) / 256 * 256;
}

// ---- arguments of the fused-size operations, in the order of one inference

// frames -> pixels [pictures, image, image, 3] float32 in [-1, 1], to the bit what stages/preprocess
// computes. The frames must have passed check_frame.
struct Letterbox {
  const Frame* frames = nullptr;  // device
  const std::byte* data = nullptr;
  Count pictures;
  int image = 0;
  float* pixels = nullptr;
};

// pixels [pictures, image, image, 3] float32 -> rows [pictures * tokens, n], n = 3 * patch * patch,
// channel-major inside a row (as the convolution's weight [width, 3, patch, patch] is laid out), patches row
// by row. A float32 `out` gets the values. A bfloat16 one has 2n or 3n columns and gets each in parts: what
// bfloat16 holds of it, what it holds of the rest, and with 3n the first part again. A product with weights
// [w | w] or [w | w | what bfloat16 left of w] then has 16 bits of each operand.
struct PatchRows {
  const float* pixels = nullptr;
  Count pictures;
  int image = 0, patch = 0;
  Matrix out;
};

// y[row_map[i]] = x[ids[i]] · scale, in float32; x float32 or bfloat16: token rows as gathered on the host
// (no ids: x[i]) or the whole table. Ids are within x.
struct ScaleRows {
  Matrix x, y;
  Count rows;
  float scale = 1;
  const std::int32_t* row_map = nullptr;
  const std::int32_t* ids = nullptr;
};

// With a quantized weight each row of x is first multiplied by the weight's input multiplier, if it has one,
// and rounded to format.input as quant::fake_quantize_rows does; the weight means what quant::dequantize_row
// gives.
struct Matmul {
  Matrix x;  // [rows, k]
  const Weight* w = nullptr;
  Matrix y;  // [rows, n] (n / 2 with geglu)
  Count rows;
  Epilogue epilogue;
  const char* zone = "matmul";
};

// y = (x - mean) / sqrt(var + eps) * weight + bias over each row, in float32.
struct LayerNorm {
  Matrix x, y;
  Count rows;
  const float *weight = nullptr, *bias = nullptr;
  float eps = 1e-6f;
};

// y = x / sqrt(mean(x²) + eps) * (1 + weight), or with a modulation: … * (1 + scale) + shift; in float32.
struct RmsNorm {
  Matrix x, y;
  Count rows;
  const float* weight = nullptr;  // [width]; ignored when modulation is set
  const ModulationRow* modulation = nullptr;
  float eps = 1e-6f;
};

// Splits rows of [q heads | k heads | v heads] (each head_dim wide), rotates q and k when `rope` is set,
// scales nothing, puts q into `q` (layout of the backend's attention, see Backend::query_elements) and k, v
// into the slot of each segment at past … past+rows-1.
struct SplitQkv {
  Matrix qkv;  // float32 [rows, (heads + 2 kv_heads) head_dim]
  int heads = 0;
  Segments segments;
  const RopeTable* rope = nullptr;
  void* q = nullptr;
  const KvCache* cache = nullptr;
  int layer = 0;
};

// softmax(q · kᵀ · scale) · v per head, float32 softmax and accumulation; kv head = head / (heads /
// kv_heads).
struct Attention {
  const void* q = nullptr;
  int heads = 0;
  const KvCache* cache = nullptr;
  int layer = 0;
  Segments segments;
  float scale = 1;
  Matrix out;  // [rows, heads * head_dim]
  const char* zone = "attention";
};

// Sinusoidal features [sin…, cos…] of `steps` times, computed in float64, rounded to float32: out [steps,
// width].
struct TimeEmbedding {
  const float* times = nullptr;  // device, [steps]
  int steps = 0, width = 0;
  double min_period = 0, max_period = 0;
  Matrix out;
};

// x += dt · v, float32.
struct EulerStep {
  Matrix x, v;
  Count rows;
  float dt = 0;
};

}  // namespace servoflow::ops
