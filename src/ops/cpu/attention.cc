// K/V cache in panels, and attention as two panel products per block of queries with a float32 softmax
// between them.
//
// All query heads of one K/V head are consecutive rows of one matrix, so that multi-query attention (one K/V
// head) runs as one tall product. A block of 56 query rows keeps its scores, weights and output in the
// thread's scratch.
#include <algorithm>
#include <cstring>

#include "core/bf16.h"
#include "core/zones.h"
#include "ops/cpu/cpu_backend.h"

namespace servoflow::ops::cpu {
namespace {

constexpr int kQueryRows = 56;

std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

// One key's head_dim elements into its column of the K panels. In bf16 two dimensions share a word, so both
// move at once.
void store_key(std::byte* part, const CacheLayout& layout, int key, int dim, const std::byte* from,
               DType dtype) {
  if (dtype == DType::kF32) {
    float* out = reinterpret_cast<float*>(part) + layout.k_index(key, 0);
    for (int j = 0; j < dim; ++j) std::memcpy(out + static_cast<std::ptrdiff_t>(j) * kPanel, from + 4 * j, 4);
    return;
  }
  std::byte* out = part + 2 * layout.k_index(key, 0);
  for (int j = 0; j + 1 < dim; j += 2, out += 4 * kPanel) std::memcpy(out, from + 2 * j, 4);
  if (dim % 2 != 0) std::memcpy(out, from + 2 * (dim - 1), 2);
}

// One key's value into its row of every V panel.
void store_value(std::byte* part, const CacheLayout& layout, int key, int dim, const std::byte* from,
                 DType dtype) {
  for (int first = 0; first < dim; first += kPanel) {
    const int count = std::min(kPanel, dim - first);
    if (dtype == DType::kF32) {
      std::memcpy(part + 4 * layout.v_index(key, first), from + 4 * first,
                  4 * static_cast<std::size_t>(count));
    } else {
      std::byte* out = part + 2 * layout.v_index(key, first);
      for (int j = 0; j < count; ++j) std::memcpy(out + 4 * j, from + 2 * (first + j), 2);
    }
  }
}

}  // namespace

CacheLayout::CacheLayout(const KvCache& c)
    : element(static_cast<std::int64_t>(dtype_size(c.dtype))), pairs_(c.dtype == DType::kBF16) {
  depth_dim = pairs_ ? round_up(c.head_dim, 2) : c.head_dim;
  depth_keys = pairs_ ? round_up(c.keys, 2) : c.keys;
  k_panel = depth_dim * kPanel;
  v_panel = depth_keys * kPanel;
  k_part = round_up(c.keys, kPanel) / kPanel * k_panel;
  v_part = round_up(c.head_dim, kPanel) / kPanel * v_panel;
  head = round_up(k_part + v_part, 64);
}

std::byte* CacheLayout::k(const KvCache& c, int layer, int slot, int h) const {
  return static_cast<std::byte*>(c.data) +
         ((static_cast<std::int64_t>(layer) * c.slots + slot) * c.kv_heads + h) * head * element;
}
std::byte* CacheLayout::v(const KvCache& c, int layer, int slot, int h) const {
  return k(c, layer, slot, h) + k_part * element;
}

std::int64_t CacheLayout::k_index(int key, int dim) const {
  const std::int64_t base = key / kPanel * k_panel;
  return pairs_ ? base + (static_cast<std::int64_t>(dim / 2) * kPanel + key % kPanel) * 2 + dim % 2
                : base + static_cast<std::int64_t>(dim) * kPanel + key % kPanel;
}
std::int64_t CacheLayout::v_index(int key, int dim) const {
  const std::int64_t base = dim / kPanel * v_panel;
  return pairs_ ? base + (static_cast<std::int64_t>(key / 2) * kPanel + dim % kPanel) * 2 + key % 2
                : base + static_cast<std::int64_t>(key) * kPanel + dim % kPanel;
}

std::uint64_t CpuBackend::cache_bytes(const KvCache& c) const {
  const CacheLayout layout(c);
  return static_cast<std::uint64_t>(c.layers) * static_cast<std::uint64_t>(c.slots * c.kv_heads) *
         static_cast<std::uint64_t>(layout.head * layout.element);
}

void CpuBackend::read_cache(const KvCache& c, int layer, int slot, int rows, std::span<float> k,
                            std::span<float> v) {
  const CacheLayout layout(c);
  const auto get = [&](const std::byte* part, std::int64_t index) {
    return c.dtype == DType::kF32 ? reinterpret_cast<const float*>(part)[index]
                                  : to_float(reinterpret_cast<const bf16*>(part)[index]);
  };
  std::size_t out = 0;
  for (int key = 0; key < rows; ++key)
    for (int h = 0; h < c.kv_heads; ++h)
      for (int d = 0; d < c.head_dim; ++d, ++out) {
        k[out] = get(layout.k(c, layer, slot, h), layout.k_index(key, d));
        v[out] = get(layout.v(c, layer, slot, h), layout.v_index(key, d));
      }
}

// Queries: per segment [kv_head][row][head of the group][head_dim], so that a K/V head's queries are one
// matrix.
void CpuBackend::do_split_qkv(const SplitQkv& op) {
  const zones::Zone zone("rope");
  const KvCache& c = *op.cache;
  const CacheLayout layout(c);
  const int d = c.head_dim, group = op.heads / c.kv_heads;
  const DType dtype = c.dtype;
  const std::int64_t size = layout.element;
  if (!need_scratch(static_cast<std::size_t>(d) * sizeof(float))) return;
  constexpr int kRowsPerTask = 8;
  for (int s = 0; s < valid(op.segments.count); ++s) {
    const Segment segment = op.segments.device[s];
    std::byte* q =
        static_cast<std::byte*>(op.q) + static_cast<std::int64_t>(segment.row_begin) * op.heads * d * size;
    pool_.parallel_for((segment.rows + kRowsPerTask - 1) / kRowsPerTask, [&](int task, int thread) {
      std::byte* rotated = scratch(thread);
      for (int i = task * kRowsPerTask; i < std::min(segment.rows, (task + 1) * kRowsPerTask); ++i) {
        const float* in = static_cast<const float*>(op.qkv.data) + (segment.row_begin + i) * op.qkv.pitch;
        const int position = segment.past + i;
        const float* cos =
            op.rope != nullptr ? op.rope->cos + static_cast<std::int64_t>(position) * op.rope->half : nullptr;
        const float* sin =
            op.rope != nullptr ? op.rope->sin + static_cast<std::int64_t>(position) * op.rope->half : nullptr;
        for (int h = 0; h < op.heads; ++h, in += d)
          rotate_head(
              in, d, cos, sin,
              q + ((static_cast<std::int64_t>(h / group) * segment.rows + i) * group + h % group) * d * size,
              dtype);
        for (int h = 0; h < c.kv_heads; ++h, in += d) {
          rotate_head(in, d, cos, sin, rotated, dtype);
          std::byte* part = layout.k(c, op.layer, segment.slot, h);
          store_key(part, layout, position, d, rotated, dtype);
        }
        for (int h = 0; h < c.kv_heads; ++h, in += d) {
          rotate_head(in, d, nullptr, nullptr, rotated, dtype);
          std::byte* part = layout.v(c, op.layer, segment.slot, h);
          store_value(part, layout, position, d, rotated, dtype);
        }
      }
    });
    // The partner of an odd last key must be finite: its weight is zero, but 0 · NaN is not.
    const int keys = segment.past + segment.rows;
    if (keys % 2 != 0 && keys < c.keys && dtype == DType::kBF16)
      for (int h = 0; h < c.kv_heads; ++h)
        for (int j = 0; j < d; ++j)
          reinterpret_cast<bf16*>(layout.v(c, op.layer, segment.slot, h))[layout.v_index(keys, j)] = {0};
  }
}

void CpuBackend::do_attention(const Attention& op) {
  const KvCache& c = *op.cache;
  const CacheLayout layout(c);
  const int d = c.head_dim, group = op.heads / c.kv_heads;
  const std::int64_t size = layout.element;
  const std::int64_t score_pitch = round_up(op.segments.max_keys, kPanel) + 16;
  const std::int64_t weight_pitch = score_pitch + 16;
  const std::int64_t out_pitch = round_up(d, kPanel) + 16;
  const bool half = c.dtype == DType::kBF16;
  const std::size_t score_bytes = static_cast<std::size_t>(kQueryRows * score_pitch) * 4;
  const std::size_t weight_bytes = half ? static_cast<std::size_t>(kQueryRows * weight_pitch) * 2 : 0;
  if (!need_scratch(score_bytes + weight_bytes + static_cast<std::size_t>(kQueryRows * out_pitch) * 4 + 256))
    return;
  const PanelProduct product = half ? bf16_dot_ : panel_f32;

  for (int s = 0; s < valid(op.segments.count); ++s) {
    const Segment segment = op.segments.device[s];
    const int keys = segment.past + segment.rows, queries = segment.rows * group;
    const zones::Zone zone(op.zone, 4.0 * op.heads * segment.rows * keys * d);
    // As many blocks as a multiple of the threads, equally tall: none of them waits for a last odd one.
    const int rounds = (queries + kQueryRows * pool_.threads() - 1) / (kQueryRows * pool_.threads());
    const int block = (queries + rounds * pool_.threads() - 1) / (rounds * pool_.threads());
    const int blocks = (queries + block - 1) / block;
    const std::byte* q = static_cast<const std::byte*>(op.q) +
                         static_cast<std::int64_t>(segment.row_begin) * op.heads * d * size;
    pool_.parallel_for(c.kv_heads * blocks, [&](int task, int thread) {
      const int h = task / blocks, first = task % blocks * block, count = std::min(queries - first, block);
      float* scores = reinterpret_cast<float*>(scratch(thread));
      void* weights = half ? static_cast<void*>(scratch(thread) + score_bytes) : static_cast<void*>(scores);
      float* out = reinterpret_cast<float*>(scratch(thread) + score_bytes + weight_bytes);
      float inverse[kQueryRows];
      const std::byte* rows = q + (static_cast<std::int64_t>(h) * queries + first) * d * size;
      const std::byte* k = layout.k(c, op.layer, segment.slot, h);
      for (int key = 0; key < keys; key += kPanel)
        product(rows, d, count, k + key / kPanel * layout.k_panel * size, d, scores + key, score_pitch,
                false);
      softmax_rows(scores, score_pitch, count, keys, op.scale, weights, half ? weight_pitch : score_pitch,
                   c.dtype, inverse);
      const std::byte* v = layout.v(c, op.layer, segment.slot, h);
      for (int dim = 0; dim < d; dim += kPanel)
        product(weights, half ? weight_pitch : score_pitch, count, v + dim / kPanel * layout.v_panel * size,
                keys, out + dim, out_pitch, false);
      const std::size_t out_size = dtype_size(op.out.dtype);
      for (int i = 0; i < count; ++i) {
        const int row = segment.row_begin + (first + i) / group, head = h * group + (first + i) % group;
        store_scaled(out + i * out_pitch, d, inverse[i],
                     static_cast<std::byte*>(op.out.data) +
                         static_cast<std::size_t>(row * op.out.pitch + head * d) * out_size,
                     op.out.dtype);
      }
    });
  }
}

}  // namespace servoflow::ops::cpu
