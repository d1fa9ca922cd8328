// How sums leave product_wgmma.cu: the quick ends, many elements of a thread under way together, and the
// general one.
#pragma once

#include "ops/cuda/attention_wgmma.cuh"
#include "ops/cuda/kernels.h"

namespace servoflow::ops::cuda {

// A warpgroup's sums on their way out: rows of x, each with the group's 64 features, the two of a pair side
// by side. The pitch in floats lets a warp's stores fall into different banks.
inline constexpr int kHandedPitch = 68;

// Where two neighbouring pairs of q, k or v features go, for the rows of one segment.
struct QkvColumn {
  bool rotates = false;
  __nv_bfloat16* out = nullptr;  // of the tile's first row, were it the segment's
  int stride = 0;                // elements from row to row
  const float *cos = nullptr, *sin = nullptr;
  int angle_stride = 0;
};

// The segment of a tile's first row, if it has one, and the one behind it where the tile's rows are those of
// two, the second's from row `split` of the tile. How many there are: 3 if more than two or none.
__device__ __forceinline__ int segments_of(const DeviceQkv& qkv, int row0, int live, Segment& first,
                                           Segment& second, int& split) {
  const int count = valid(qkv.segment_count);
  split = live;
  if (!find_segment(qkv.segments, count, row0, first)) {
    first = {};
    return 3;
  }
  const int end = first.row_begin + first.rows - row0;
  if (end >= live) return 1;
  split = end;
  return find_segment(qkv.segments, count, row0 + end, second) &&
                 second.row_begin + second.rows - row0 >= live
             ? 2
             : 3;
}
__device__ __forceinline__ QkvColumn qkv_column(const DeviceQkv& qkv, const Segment& s, int row0, int first,
                                                int second) {
  QkvColumn c;
  const DeviceQkv::Place p = qkv.place(first, second);
  const int position = s.past + row0 - s.row_begin;
  c.stride = qkv.head_dim;
  c.rotates = qkv.rotates(p);
  if (c.rotates) {
    c.angle_stride = qkv.head_dim / 2;
    c.cos = qkv.cos + static_cast<std::int64_t>(position) * c.angle_stride + p.i;
    c.sin = qkv.sin + static_cast<std::int64_t>(position) * c.angle_stride + p.i;
  }
  if (p.head < qkv.heads) {
    c.stride = qkv.heads * qkv.head_dim;
    c.out = static_cast<__nv_bfloat16*>(qkv.q) + static_cast<std::int64_t>(row0) * c.stride +
            p.head * qkv.head_dim + 2 * p.i;
  } else if (p.head < qkv.heads + qkv.kv_heads) {
    c.out =
        static_cast<__nv_bfloat16*>(qkv.k) + qkv.cache_row(s.slot, p.head - qkv.heads, position) + 2 * p.i;
  } else {
    c.out = static_cast<__nv_bfloat16*>(qkv.v) +
            qkv.cache_row(s.slot, p.head - qkv.heads - qkv.kv_heads, position) + p.i;
  }
  return c;
}

// How a tile ends. Kernels come in three kinds, so that none holds registers for an end that it does not
// make; each knows the general one as well.
enum class Kind : std::uint8_t { kFloats, kTurned, kHalves };
enum class End : std::uint8_t {
  kGeneral,
  kPartials,  // kFloats: four columns of float32 at a time
  kPlain,
  kInto,
  kQkv,    // kTurned: likewise, rotated
  kGated,  // kHalves: in bf16 as they leave the registers
  kHeads,  // q, k and v as they are
  kColumns,
};

__host__ __device__ __forceinline__ End end_of(const Product& op) {
  const DeviceEpilogue& e = op.epilogue;
  if (op.to_qkv) {
    if (op.w.order != RowOrder::kRotated || op.qkv.head_dim % 4 != 0) return End::kGeneral;
    return op.qkv.cos == nullptr && op.qkv.head_dim % 8 == 0 && op.w.n % 16 == 0 ? End::kHeads : End::kQkv;
  }
  if (op.geglu) return op.w.n % 16 == 0 && e.pitch % 8 == 0 ? End::kGated : End::kGeneral;
  if (op.w.order != RowOrder::kAdjacent || op.w.n % 4 != 0) return End::kGeneral;
  if (op.partials != nullptr) return End::kPartials;
  if (e.activation == Activation::kSilu || e.pitch % 4 != 0) return End::kGeneral;
  if (e.gate != nullptr && (e.gate_row != nullptr || !e.accumulate)) return End::kGeneral;
  const bool by_row = e.row_bias != nullptr || e.row_map != nullptr;
  if (e.accumulate) return e.f32 && !by_row && e.activation == Activation::kNone ? End::kInto : End::kGeneral;
  return !e.f32 && !by_row && op.w.n % 16 == 0 && e.pitch % 8 == 0 ? End::kColumns : End::kPlain;
}
inline Kind kind_of(End end) {
  return end >= End::kGated ? Kind::kHalves : end == End::kQkv ? Kind::kTurned : Kind::kFloats;
}

// A thread's rows of a chunk are 8 apart, `kAtOnce` of them, of which those below `end` exist; half a warp
// has a row's 32 pairs, each thread two of them: a quad. Rows are under way together: a block has too few
// warps to hide one row's latency behind another's.
template <int kAtOnce>
__device__ __forceinline__ void handed_quads(std::uint32_t handed, const float4& bias, float4 (&v)[kAtOnce]) {
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    v[i] = load_shared(handed + 8 * i * kHandedPitch * 4);
    v[i] = plus(v[i], bias);
  }
}

// kInto: what the rows held so far, asked for a chunk ahead.
template <int kAtOnce>
__device__ __forceinline__ void old_quads(const Product& op, int row, int end, int first,
                                          float4 (&old)[kAtOnce]) {
  const float* x =
      static_cast<const float*>(op.epilogue.y) + static_cast<std::int64_t>(row) * op.epilogue.pitch + first;
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i)
    if (8 * i < end) old[i] = *reinterpret_cast<const float4*>(x + 8 * i * op.epilogue.pitch);
}

// `handed`, `row` and `tile_row` are the thread's first row's, `column` its first pair's; rows before `begin`
// are another segment's.
template <int kAtOnce>
__device__ __forceinline__ void end_turned(const QkvColumn& column, const float4& bias, std::uint32_t handed,
                                           int tile_row, int begin, int end) {
  float4 v[kAtOnce];
  float2 cosine[kAtOnce], sine[kAtOnce];
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    cosine[i] = make_float2(1, 1);
    sine[i] = make_float2(0, 0);
    if (column.rotates && 8 * i >= begin && 8 * i < end) {
      const int at = (tile_row + 8 * i) * column.angle_stride;
      cosine[i] = __ldg(reinterpret_cast<const float2*>(column.cos + at));
      sine[i] = __ldg(reinterpret_cast<const float2*>(column.sin + at));
    }
  }
  handed_quads<kAtOnce>(handed, bias, v);
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i)
    if (8 * i >= begin && 8 * i < end) {
      const float2 p = turned(v[i].x, v[i].y, make_float2(cosine[i].x, sine[i].x));
      const float2 q = turned(v[i].z, v[i].w, make_float2(cosine[i].y, sine[i].y));
      *reinterpret_cast<uint2*>(column.out + (tile_row + 8 * i) * column.stride) =
          make_uint2(pack_bf16(p.x, p.y), pack_bf16(q.x, q.y));
    }
}

// `old`, `next`: kInto; what the rows held, and room for a call that asks for the next rows'.
template <int kAtOnce, typename Next>
__device__ __forceinline__ void end_floats(const Product& op, End kind, const float4& bias, int split,
                                           std::uint32_t handed, float4 (&old)[kAtOnce], int row, int end,
                                           int first, const Next& next) {
  float4 v[kAtOnce];
  handed_quads<kAtOnce>(handed, bias, v);
  const DeviceEpilogue& e = op.epilogue;
  if (kind == End::kPlain) {
    int to[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      to[i] = 8 * i < end && e.row_map != nullptr ? e.row_map[row + 8 * i] : row + 8 * i;
    if (e.activation == Activation::kGeluTanh)
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        v[i] = make_float4(gelu(v[i].x), gelu(v[i].y), gelu(v[i].z), gelu(v[i].w));
    if (e.row_bias != nullptr)
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        v[i] = plus(v[i], *reinterpret_cast<const float4*>(
                              e.row_bias +
                              static_cast<std::int64_t>((row + 8 * i) % e.row_bias_period) * e.n + first));
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (8 * i >= end) continue;
      const std::int64_t at = to[i] * e.pitch + first;
      if (e.f32) {
        *reinterpret_cast<float4*>(static_cast<float*>(e.y) + at) = v[i];
      } else {
        *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(e.y) + at) =
            make_uint2(pack_bf16(v[i].x, v[i].y), pack_bf16(v[i].z, v[i].w));
      }
    }
    return;
  }
  float* out = static_cast<float*>(e.y) + row * e.pitch + first;
  std::int64_t pitch = e.pitch;
  if (kind == End::kPartials) {
    out = op.partials + split * op.split_pitch + static_cast<std::int64_t>(row) * op.w.n + first;
    pitch = op.w.n;
  } else {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (e.gate != nullptr) {  // of all rows
        const float4 gate = *reinterpret_cast<const float4*>(e.gate + first);
        v[i] = make_float4(v[i].x * gate.x, v[i].y * gate.y, v[i].z * gate.z, v[i].w * gate.w);
      }
      v[i] = plus(v[i], old[i]);
    }
    next();
  }
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i)
    if (8 * i < end) *reinterpret_cast<float4*>(out + 8 * i * pitch) = v[i];
}

// What ends in bf16 passes through shared memory as such, `kPassRows` rows of x at a time and a warpgroup's
// features side by side, and leaves in 16 bytes. `live`: how many of the tile's rows exist.
//
// kGated: gate and up of a feature are in one thread. `features`: how many of the group's 32 exist.
template <int kRows, int kPassRows, typename Sync>
__device__ __forceinline__ void end_gated(const Product& op, const float (&sum)[kRows / 2], int feature0,
                                          int features, int row0, int live, std::uint32_t handed,
                                          const Sync& sync) {
  constexpr int kEights = kPassRows / 8, kRowBytes = 80;
  static_assert(kPassRows % 32 == 0);
  const int within = static_cast<int>(threadIdx.x) % 128, lane = within % 32, piece = within % 4 * 8;
  const std::uint32_t to = handed + lane * kRowBytes + within / 32 * 16,
                      from = handed + within / 4 * kRowBytes + within % 4 * 16;
  const std::int64_t pitch = op.epilogue.pitch;
  auto* out = static_cast<__nv_bfloat16*>(op.epilogue.y) + (row0 + within / 4) * pitch + feature0 + piece;
#pragma unroll
  for (int first = 0; first < kRows / 8; first += kEights) {
    if (8 * first >= live) break;
#pragma unroll
    for (int j = first; j < first + kEights && j < kRows / 8; j += 4) {
      std::uint32_t packed[4] = {};
#pragma unroll
      for (int i = 0; i < 4 && j + i < kRows / 8; ++i) {
        const float* s = sum + 4 * (j + i);
        packed[i] = pack_bf16(gelu(s[0]) * s[2], gelu(s[1]) * s[3]);
      }
      store_matrix_transposed(to + (j - first) * 8 * kRowBytes, packed[0], packed[1], packed[2], packed[3]);
    }
    sync();
#pragma unroll
    for (int i = 0; i < kPassRows / 32; ++i)
      if (8 * first + within / 4 + 32 * i < live && piece < features)
        *reinterpret_cast<float4*>(out + (8 * first + 32 * i) * pitch) =
            load_shared(from + 32 * i * kRowBytes);
    sync();
  }
}

// kHeads and kColumns: a thread's 16 columns of a row, in two pieces that may belong to two heads.
struct Piece {
  __nv_bfloat16* out = nullptr;     // of the tile's first row; null: there are no such columns
  std::int64_t stride = 0;          // elements from row to row
  __nv_bfloat16* behind = nullptr;  // likewise, for rows of the tile's second segment
};

__device__ __forceinline__ Piece column_piece(const DeviceEpilogue& e, int row0, int column) {
  auto* out = static_cast<__nv_bfloat16*>(e.y) + row0 * e.pitch + column;
  return {out, e.pitch, out};
}
__device__ __forceinline__ Piece head_piece(const Product& op, const Segment& s, const Segment& behind,
                                            int row0, int pair) {
  int first, second;
  pair_features(op.w, pair, first, second);
  const QkvColumn c = qkv_column(op.qkv, s, row0, first, second);
  return {c.out, c.stride, qkv_column(op.qkv, behind, row0, first, second).out};
}

inline constexpr int kColumnsBytes = 144;  // a row of 64 columns; those that follow fall into other banks

// `bias0`, `bias1`: of the features whose sums the thread has. `split`: the first row of the second segment.
template <int kRows, int kPassRows, bool kGelu, typename Sync>
__device__ __forceinline__ void end_columns(const float (&sum)[kRows / 2], float bias0, float bias1,
                                            const Piece (&piece)[2], int split, int live,
                                            std::uint32_t handed, const Sync& sync) {
  constexpr int kEights = kPassRows / 8, kRowBytes = kColumnsBytes;
  static_assert(kPassRows % 32 == 0);
  const int within = static_cast<int>(threadIdx.x) % 128, lane = within % 32;
  // Of a warp's 16 columns in a row, the pairs' first ones lie before their second ones.
  const std::uint32_t to =
      handed + (lane / 16 * 8 + lane % 8) * kRowBytes + within / 32 * 32 + lane / 8 % 2 * 16;
  const std::uint32_t from = handed + within / 4 * kRowBytes + within % 4 * 32;
  const auto ended = [](float a, float b, float bias) {
    a += bias;
    b += bias;
    return kGelu ? pack_bf16(gelu(a), gelu(b)) : pack_bf16(a, b);
  };
#pragma unroll
  for (int first = 0; first < kRows / 8; first += kEights) {
    if (8 * first >= live) break;
#pragma unroll
    for (int j = first; j < first + kEights && j < kRows / 8; j += 2) {
      std::uint32_t packed[4] = {};
#pragma unroll
      for (int i = 0; i < 2 && j + i < kRows / 8; ++i) {
        const float* s = sum + 4 * (j + i);
        packed[2 * i] = ended(s[0], s[1], bias0);
        packed[2 * i + 1] = ended(s[2], s[3], bias1);
      }
      store_matrix_transposed(to + (j - first) * 8 * kRowBytes, packed[0], packed[1], packed[2], packed[3]);
    }
    sync();
#pragma unroll
    for (int i = 0; i < kPassRows / 32; ++i) {
      const int row = 8 * first + within / 4 + 32 * i;
      const float4 a = load_shared(from + 32 * i * kRowBytes),
                   b = load_shared(from + 32 * i * kRowBytes + 16);
      const auto mixed = [](float p, float q, float r, float s) {
        const std::uint32_t x = __float_as_uint(p), y = __float_as_uint(q), z = __float_as_uint(r),
                            w = __float_as_uint(s);
        return make_uint4(__byte_perm(x, y, 0x5410), __byte_perm(x, y, 0x7632), __byte_perm(z, w, 0x5410),
                          __byte_perm(z, w, 0x7632));
      };
      if (row < live && piece[0].out != nullptr)
        *reinterpret_cast<uint4*>((row < split ? piece[0].out : piece[0].behind) + row * piece[0].stride) =
            mixed(a.x, b.x, a.y, b.y);
      if (row < live && piece[1].out != nullptr)
        *reinterpret_cast<uint4*>((row < split ? piece[1].out : piece[1].behind) + row * piece[1].stride) =
            mixed(a.z, b.z, a.w, b.w);
    }
    sync();
  }
}

// Anything else, a pair per thread and one row after the other. Seldom used: its code is kept short.
// `handed`: the thread's pair of the chunk's first row.
__device__ __forceinline__ void end_pairs(const Product& op, int pair, int split, std::uint32_t handed,
                                          int row0, int warp, int end) {
  Segment segment{};
#pragma unroll 1
  for (int r = warp; r < end; r += 4) {
    const int row = row0 + r;
    if (op.to_qkv && (row < segment.row_begin || row >= segment.row_begin + segment.rows) &&
        !find_segment(op.qkv.segments, valid(op.qkv.segment_count), row, segment))
      segment = {};
    if (op.to_qkv && segment.rows == 0) continue;
    float a, b;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(a), "=f"(b)
                 : "r"(handed + r * kHandedPitch * 4)
                 : "memory");
    emit_pair(op, pair, row, segment, split, a, b);
  }
}

}  // namespace servoflow::ops::cuda
