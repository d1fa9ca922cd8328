// What a product kernel does with its sums, shared by every one of them: the Epilogue of ops.h on the device,
// and the order in which a packed weight keeps its rows.
#pragma once

#include "ops/cuda/device_code.cuh"

namespace servoflow::ops::cuda {

// Rows of a tensor-core weight come in groups of 16; rows r and r + 8 of a group end in one thread, so a pair
// of features that belong together is kept there. pair_features() says which two they are.
enum class RowOrder : std::uint8_t {
  kAdjacent,  // features 2p and 2p + 1
  kGated,     // gate p and up p
  kRotated,   // features i and i + head_dim / 2 of a q or k head; adjacent ones in v
};

// Element (row, k) of a matrix in tiles of 8 rows by 8 columns (128 bytes, the warpgroup instruction's core
// matrix), which follow each other along k: four of them are the 512 bytes that a warp reads at once.
__host__ __device__ __forceinline__ std::int64_t tiled_at(int row, int k, std::int64_t width) {
  return (row / 8 * (width / 8) + k / 8) * 64 + row % 8 * 8 + k % 8;
}

// Element (row, k) of a weight of `rows` rows in the same tiles, 128 columns of all rows behind each other: what a block
// needs of its rows at a time is one piece.
__host__ __device__ __forceinline__ std::int64_t chunked_at(int row, int k, int rows) {
  return (static_cast<std::int64_t>(k / 128) * (rows / 8) + row / 8) * 1024 + k % 128 / 8 * 64 + row % 8 * 8 + k % 8;
}

struct WeightLayout {
  RowOrder order = RowOrder::kAdjacent;
  int n = 0, k = 0;          // logical size; n counts gate and up
  int padded_n = 0;          // rows in memory, a multiple of 128; those beyond n are zero
  std::int64_t pitch = 0;    // elements from row to row, a multiple of 64 or, tiled, 128; those beyond k are zero
  int head_dim = 0;          // kRotated
  int rotated = 0;           // kRotated: features of all q and k heads
  bool f32 = false;          // element type: float32 or bf16
  bool tiled = false;        // the order of chunked_at(), for the expert's kernels
  bool tensor_core = false;  // taken by the tensor-core kernels: bf16, its input rounded to bf16

  __host__ __device__ __forceinline__ std::int64_t at(int row, int column) const {
    return tiled ? chunked_at(row, column, padded_n) : row * pitch + column;
  }
};

// The pair p (rows 16 (p / 8) + p % 8 and 8 further) -> features. kGated: the gate's and the up's index.
__host__ __device__ __forceinline__ void pair_features(const WeightLayout& w, int p, int& first,
                                                       int& second) {
  if (w.order == RowOrder::kGated) {
    first = p;
    second = w.n / 2 + p;
  } else if (w.order == RowOrder::kRotated && 2 * p < w.rotated) {
    const int half = w.head_dim / 2, head = p / half, i = p - head * half;
    first = head * w.head_dim + i;
    second = first + half;
  } else {
    first = 2 * p;
    second = 2 * p + 1;
  }
}

struct DeviceEpilogue {
  void* y = nullptr;
  std::int64_t pitch = 0;
  bool f32 = true;
  int n = 0;  // columns of y
  const float* bias = nullptr;
  Activation activation = Activation::kNone;
  const float* gate = nullptr;  // row 0 of the modulation's gate; rows of later steps `gate_pitch` further
  std::int64_t gate_pitch = 0;
  const std::int32_t* gate_row = nullptr;
  const float* row_bias = nullptr;
  int row_bias_period = 1;
  bool accumulate = false;
  const std::int32_t* row_map = nullptr;

  // The value that feature `c` of row `row` takes before it is stored or added.
  __device__ __forceinline__ float finish(int row, int c, float v) const {
    if (bias != nullptr) v += __ldg(bias + c);
    v = activate(activation, v);
    if (gate != nullptr) v *= gate[(gate_row != nullptr ? gate_row[row] : 0) * gate_pitch + c];
    if (row_bias != nullptr) v += row_bias[static_cast<std::int64_t>(row % row_bias_period) * n + c];
    return v;
  }
  __device__ __forceinline__ void store(int row, int c, float v) const {
    const std::int64_t at = static_cast<std::int64_t>(row_map != nullptr ? row_map[row] : row) * pitch + c;
    v = finish(row, c, v);
    if (accumulate) v += static_cast<const float*>(y)[at];
    store_element(y, f32, at, v);
  }
  // Features c and c + 1, c even.
  __device__ __forceinline__ void store2(int row, int c, float v0, float v1) const {
    if (c + 1 >= n || (pitch & 1) != 0) {
      if (c < n) store(row, c, v0);
      if (c + 1 < n) store(row, c + 1, v1);
      return;
    }
    const std::int64_t at = static_cast<std::int64_t>(row_map != nullptr ? row_map[row] : row) * pitch + c;
    v0 = finish(row, c, v0);
    v1 = finish(row, c + 1, v1);
    if (f32) {
      float2* out = reinterpret_cast<float2*>(static_cast<float*>(y) + at);
      if (accumulate) {
        const float2 old = *out;
        v0 += old.x;
        v1 += old.y;
      }
      *out = make_float2(v0, v1);
    } else {
      *reinterpret_cast<std::uint32_t*>(static_cast<__nv_bfloat16*>(y) + at) = pack_bf16(v0, v1);
    }
  }
};

// The pair turned by (cos, sin). Which product is fused is written down: left to the compiler, it may differ
// from one place to the other, and a row must not depend on which of them it meets.
__device__ __forceinline__ float2 turned(float x, float y, float2 turn) {
  return make_float2(__fmaf_rn(x, turn.x, -__fmul_rn(y, turn.y)), __fmaf_rn(y, turn.x, __fmul_rn(x, turn.y)));
}

// Where rotated queries, keys and values go: the fused end of the q, k, v product, and of split_qkv.
// Queries [row][head][head_dim]; keys and values [slot][kv head][position][head_dim] of one layer. Queries
// and keys keep the rotated pair (i, i + head_dim / 2) at columns 2i and 2i + 1: both sides of a dot product
// agree.
struct DeviceQkv {
  void *q = nullptr, *k = nullptr, *v = nullptr;
  bool f32 = false;
  int heads = 0, kv_heads = 0, head_dim = 0, keys = 0;
  const float *cos = nullptr, *sin = nullptr;  // null: nothing is rotated
  const Segment* segments = nullptr;
  Count segment_count;
  const float* bias = nullptr;  // [n], added first

  __device__ __forceinline__ std::int64_t cache_row(int slot, int head, int position) const {
    return ((static_cast<std::int64_t>(slot) * kv_heads + head) * keys + position) * head_dim;
  }
  __device__ __forceinline__ void store(void* to, std::int64_t at, float v0, float v1) const {
    if (f32) {
      static_cast<float*>(to)[at] = v0;
      static_cast<float*>(to)[at + 1] = v1;
    } else if ((at & 1) == 0) {
      *reinterpret_cast<std::uint32_t*>(static_cast<__nv_bfloat16*>(to) + at) = pack_bf16(v0, v1);
    } else {
      static_cast<__nv_bfloat16*>(to)[at] = __float2bfloat16(v0);
      static_cast<__nv_bfloat16*>(to)[at + 1] = __float2bfloat16(v1);
    }
  }
  // Features first and second of the fused row, a rotated pair of a q or k head or two neighbours of v, and
  // where they go.
  struct Place {
    int head = 0, i = 0;  // of the fused row's heads: q, then k, then v
    float bias0 = 0, bias1 = 0;
  };
  __device__ __forceinline__ Place place(int first, int second) const {
    Place p{first / head_dim, 0};
    p.i = first - p.head * head_dim;
    if (bias != nullptr) {
      p.bias0 = __ldg(bias + first);
      p.bias1 = __ldg(bias + second);
    }
    return p;
  }
  __device__ __forceinline__ bool rotates(const Place& p) const {
    return cos != nullptr && p.head < heads + kv_heads;
  }
  __device__ __forceinline__ float2 angle(const Place& p, int position) const {
    const std::int64_t at = static_cast<std::int64_t>(position) * (head_dim / 2) + p.i;
    return make_float2(__ldg(cos + at), __ldg(sin + at));
  }
  __device__ __forceinline__ void put(const Place& p, const Segment& s, int row, float2 turn, float a,
                                      float b) const {
    put(p, s.slot, s.past + row - s.row_begin, row, turn, a, b);
  }
  __device__ __forceinline__ void put(const Place& p, int slot, int position, int row, float2 turn, float a,
                                      float b) const {
    a += p.bias0;
    b += p.bias1;
    const float2 pair = turned(a, b, turn);
    if (p.head < heads) {
      store(q, (static_cast<std::int64_t>(row) * heads + p.head) * head_dim + 2 * p.i, pair.x, pair.y);
    } else if (p.head < heads + kv_heads) {
      store(k, cache_row(slot, p.head - heads, position) + 2 * p.i, pair.x, pair.y);
    } else {
      store(v, cache_row(slot, p.head - heads - kv_heads, position) + p.i, pair.x, pair.y);
    }
  }
  __device__ __forceinline__ void put(const Segment& s, int row, int first, int second, float a,
                                      float b) const {
    const Place p = place(first, second);
    put(p, s, row, rotates(p) ? angle(p, s.past + row - s.row_begin) : make_float2(1, 0), a, b);
  }
};

// Everything a product kernel is told.
struct Product {
  Matrix x;
  Count rows;
  WeightLayout w;
  const void* weight = nullptr;
  DeviceEpilogue epilogue;
  bool geglu = false;   // kGated: y = gelu(gate) * up
  bool to_qkv = false;  // qkv.put() takes the place of the epilogue
  DeviceQkv qkv;
  float* partials =
      nullptr;  // non-null: sums of split z go to partials + z * split_pitch, [rows, n], as they are
  int splits = 1;
  std::int64_t split_pitch = 0;
};

// The end of one pair of sums (see pair_features) of row `row`. `segment`: the row's, with to_qkv.
__device__ __forceinline__ void emit_pair(const Product& op, int pair, int row, const Segment& segment,
                                          int split, float a, float b) {
  int first, second;
  pair_features(op.w, pair, first, second);
  const int limit = op.w.order == RowOrder::kGated ? op.w.n / 2 : op.w.n;
  if (first >= limit) return;
  if (op.partials != nullptr) {
    float* out = op.partials + split * op.split_pitch + static_cast<std::int64_t>(row) * op.w.n;
    if (second == first + 1 && second < op.w.n && op.w.n % 2 == 0) {
      *reinterpret_cast<float2*>(out + first) = make_float2(a, b);
    } else {
      out[first] = a;
      if (second < op.w.n) out[second] = b;
    }
  } else if (op.to_qkv) {
    op.qkv.put(segment, row, first, second, a, b);
  } else if (op.geglu) {
    op.epilogue.store(row, first, gelu(a) * b);
  } else if (second == first + 1) {
    op.epilogue.store2(row, first, a, b);
  } else {
    op.epilogue.store(row, first, a);
    op.epilogue.store(row, second, b);
  }
}

}  // namespace servoflow::ops::cuda
