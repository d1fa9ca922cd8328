// How sums leave product_wgmma.cu: the quick ends, many elements of a thread under way together, and the
// general one.
#pragma once

#include "ops/cuda/attention_wgmma.cuh"
#include "ops/cuda/kernels.h"

namespace servoflow::ops::cuda {

// A warpgroup's sums on their way out: rows of x, each with the group's 64 features, the two of a pair side by
// side. The pitch in floats lets a warp's stores fall into different banks.
inline constexpr int kHandedPitch = 68;

// Where two neighbouring pairs of q, k or v features go when all rows of a tile belong to one segment.
struct QkvColumn {
  bool rotates = false;
  __nv_bfloat16* out = nullptr;  // of the tile's first row; null: the rows are several segments'
  int stride = 0;                // elements from row to row
  const float *cos = nullptr, *sin = nullptr;
  int angle_stride = 0;
};

__device__ __forceinline__ QkvColumn qkv_column(const DeviceQkv& qkv, int row0, int last_row, int first,
                                                int second) {
  QkvColumn c;
  Segment s;
  if (!find_segment(qkv.segments, valid(qkv.segment_count), row0, s) || last_row >= s.row_begin + s.rows)
    return c;
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

// Which of the quick ways a tile ends in, if any; all but kGated four columns at a time.
enum class Quads : std::uint8_t { kNone, kPartials, kGated, kQkv, kPlain, kInto };

__device__ __forceinline__ Quads quads_of(const Product& op) {
  const DeviceEpilogue& e = op.epilogue;
  if (op.to_qkv)
    return op.w.order == RowOrder::kRotated && op.qkv.head_dim % 4 == 0 ? Quads::kQkv : Quads::kNone;
  if (op.geglu) return op.w.n % 16 == 0 && e.pitch % 8 == 0 ? Quads::kGated : Quads::kNone;
  if (op.w.order != RowOrder::kAdjacent || op.w.n % 4 != 0) return Quads::kNone;
  if (op.partials != nullptr) return Quads::kPartials;
  if (e.gate != nullptr || e.row_bias != nullptr || e.row_map != nullptr || e.pitch % 4 != 0)
    return Quads::kNone;
  if (e.accumulate) return e.f32 && e.activation == Activation::kNone ? Quads::kInto : Quads::kNone;
  return e.activation != Activation::kSilu ? Quads::kPlain : Quads::kNone;
}

// A thread's rows of a chunk are 8 apart, `kAtOnce` of them, of which those below `end` exist; half a warp has
// a row's 32 pairs, each thread two of them. Rows are under way together: a block has too few warps to hide
// one row's latency behind another's.
//
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

// `handed`, `row` and `tile_row` are the thread's first row's, `column` its first pair's.
template <int kAtOnce>
__device__ __forceinline__ void end_quads(const Product& op, Quads quads, const QkvColumn& column,
                                          const float4& bias, int split, std::uint32_t handed,
                                          const float4 (&old)[kAtOnce], int row, int tile_row, int end,
                                          int first) {
  float4 v[kAtOnce];  // first 0, second 0, first 1, second 1
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    v[i] = load_shared(handed + 8 * i * kHandedPitch * 4);
    v[i] = make_float4(v[i].x + bias.x, v[i].y + bias.y, v[i].z + bias.z, v[i].w + bias.w);
  }
  const DeviceEpilogue& e = op.epilogue;
  if (quads == Quads::kPartials) {
    float* out = op.partials + split * op.split_pitch + static_cast<std::int64_t>(row) * op.w.n + first;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (8 * i < end) *reinterpret_cast<float4*>(out + 8 * i * op.w.n) = v[i];
  } else if (quads == Quads::kQkv) {
    float2 cosine[kAtOnce], sine[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      cosine[i] = make_float2(1, 1);
      sine[i] = make_float2(0, 0);
      if (column.rotates && 8 * i < end) {
        const int at = (tile_row + 8 * i) * column.angle_stride;
        cosine[i] = __ldg(reinterpret_cast<const float2*>(column.cos + at));
        sine[i] = __ldg(reinterpret_cast<const float2*>(column.sin + at));
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (8 * i < end) {
        const float2 p = turned(v[i].x, v[i].y, make_float2(cosine[i].x, sine[i].x));
        const float2 q = turned(v[i].z, v[i].w, make_float2(cosine[i].y, sine[i].y));
        *reinterpret_cast<uint2*>(column.out + (tile_row + 8 * i) * column.stride) =
            make_uint2(pack_bf16(p.x, p.y), pack_bf16(q.x, q.y));
      }
  } else if (quads == Quads::kInto) {
    float* out = static_cast<float*>(e.y) + row * e.pitch + first;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (8 * i < end)
        *reinterpret_cast<float4*>(out + 8 * i * e.pitch) =
            make_float4(v[i].x + old[i].x, v[i].y + old[i].y, v[i].z + old[i].z, v[i].w + old[i].w);
  } else {
    if (e.activation == Activation::kGeluTanh)
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        v[i] = make_float4(gelu(v[i].x), gelu(v[i].y), gelu(v[i].z), gelu(v[i].w));
    const std::int64_t at = row * e.pitch + first;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (8 * i < end) {
        if (e.f32) {
          *reinterpret_cast<float4*>(static_cast<float*>(e.y) + at + 8 * i * e.pitch) = v[i];
        } else {
          *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(e.y) + at + 8 * i * e.pitch) =
              make_uint2(pack_bf16(v[i].x, v[i].y), pack_bf16(v[i].z, v[i].w));
        }
      }
  }
}

// A transposed store of four 8 x 8 tiles of bf16: each thread gives the address of a row.
__device__ __forceinline__ void store_transposed(std::uint32_t shared, const std::uint32_t (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
               "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}

// kGated: gate and up of a feature are in one thread, so that only what is left of them, in bf16, passes
// through shared memory, and leaves in 16 bytes. `live`: how many of the tile's rows exist; `features`: of the
// group's 32, likewise.
inline constexpr int kGatedRows = 128, kGatedRowBytes = 80, kGatedBytes = kGatedRows * kGatedRowBytes;

template <int kRows, typename Sync>
__device__ __forceinline__ void end_gated(const Product& op, const float (&sum)[kRows / 2], int feature0,
                                          int features, int row0, int live, std::uint32_t handed,
                                          const Sync& sync) {
  constexpr int kEights = kGatedRows / 8;
  const int within = static_cast<int>(threadIdx.x) % 128, lane = within % 32, piece = within % 4 * 8;
  const std::uint32_t to = handed + lane * kGatedRowBytes + within / 32 * 16,
                      from = handed + within / 4 * kGatedRowBytes + within % 4 * 16;
  const std::int64_t pitch = op.epilogue.pitch;
  auto* out = static_cast<__nv_bfloat16*>(op.epilogue.y) + (row0 + within / 4) * pitch + feature0 + piece;
  live = min(live, kRows);
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
      store_transposed(to + (j - first) * 8 * kGatedRowBytes, packed);
    }
    sync();
#pragma unroll
    for (int i = 0; i < kGatedRows / 32; ++i)
      if (8 * first + within / 4 + 32 * i < live && piece < features)
        *reinterpret_cast<float4*>(out + (8 * first + 32 * i) * pitch) =
            load_shared(from + 32 * i * kGatedRowBytes);
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
