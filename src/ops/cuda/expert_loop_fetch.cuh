// The two warps of the loop that fetch: one the weights, keys and values of all tasks to come, as far ahead
// as the ring has room; one the rows of the next task as soon as whoever makes them has counted.
#pragma once

#include "ops/cuda/expert_loop_parts.cuh"

namespace servoflow::ops::cuda::loop {

struct Fetcher {
  const ExpertLoop& op;
  const Segment* segments;  // in shared memory
  Barriers barriers;
  std::uint32_t base;  // of shared memory
  int requests, block, cluster, rank, lane;
  Ring ring;

  __device__ __forceinline__ Request request(int i) const { return Request(segments[i]); }

  // ---- weights, keys and values
  struct Policies {
    std::uint64_t once, often;
  };
  // kDepth columns from `depth0` of `tiles` tiles of eight weight rows, from tile `tile0` of [rows, width].
  template <int kDepth>
  __device__ __forceinline__ void fetch_weights(const __nv_bfloat16* weight, int tile0, int tiles, int width,
                                                int depth0, std::uint64_t policy, int ahead = 0) {
    const __nv_bfloat16* from = weight + static_cast<std::int64_t>(tile0 + lane) * width * 8 + depth0 * 8;
#ifdef SF_PREFETCH
    if (ahead > 0 && lane < tiles)
      asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(ahead * kDepth * 16)
                   : "memory");
#endif
    barrier_wait(barriers.empty(ring.slot), ring.parity ^ 1);
    if (lane == 0) barrier_expect(barriers.full(ring.slot), static_cast<std::uint32_t>(tiles * kDepth * 16));
    __syncwarp();
    if (lane < tiles)
      bulk_load(base + kRing + ring.slot * kSlotBytes + lane * kDepth * 16, from, kDepth * 16,
                barriers.full(ring.slot), policy);
    ring.advance(1);
  }
  // 32 of this rank's keys, or their values; what belongs to the suffix is left out.
  __device__ __forceinline__ void fetch_keys(const void* side, const Request& r, int chunk,
                                             std::uint64_t policy) {
    barrier_wait(barriers.empty(ring.slot), ring.parity ^ 1);
    const int first = rank * r.prefix_keys + chunk * kChunkKeys;
    const int count = max(0, min(min(kChunkKeys, r.prefix_keys - chunk * kChunkKeys), r.s.past - first));
    if (lane == 0) {
      if (count > 0) {
        barrier_expect(barriers.full(ring.slot), static_cast<std::uint32_t>(count * kExpertHeadDim * 2));
      } else {
        barrier_arrive(barriers.full(ring.slot));
      }
    }
    __syncwarp();
    if (lane < count)
      bulk_load(base + kRing + ring.slot * kSlotBytes + lane * kKeyPitch,
                static_cast<const __nv_bfloat16*>(side) + op.qkv.cache_row(r.s.slot, 0, first + lane),
                kExpertHeadDim * 2, barriers.full(ring.slot), policy);
    ring.advance(1);
  }

  __device__ __forceinline__ void weights() {
    Policies policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy.once));
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy.often));
    const int columns = 2 * column_group(cluster), column_tiles = 2 * column_groups(cluster);
    const int gated = 2 * gated_group(block), gated_tiles = 2 * gated_groups(block);
    bool ready = false;
    for (int step = 0; step < op.steps; ++step)
      for (int layer = 0; layer < op.depth; ++layer) {
        const ExpertLoop::Layer& l = op.layers[layer];
        if (has_qkv(block))
          for (int i = 0; i < requests; ++i)
            for (int c = 0; c < 4; ++c)
              fetch_weights<256>(l.qkv, 2 * qkv_group(block), 4, kExpertWidth, 256 * c, policy.once);
        if (!ready) {  // keys and values come from the kernels before this one, weights do not
          wait_for_inputs();
          fence_async_global();
          ready = true;
        }
        for (int i = 0; i < requests; ++i) {
          const Request r = request(i);
          if (cluster >= r.tiles) continue;
          for (int side = 0; side < 2; ++side)
            for (int c = 0; c < r.chunks; ++c)
              fetch_keys(static_cast<const char*>(side == 0 ? op.qkv.k : op.qkv.v) + layer * op.layer_bytes,
                         r, c, policy.often);
        }
        for (int i = 0; i < requests; ++i)
          for (int c = 0; c < 2; ++c)
            fetch_weights<128>(l.out, columns, column_tiles, kExpertHeads * kExpertHeadDim,
                               256 * rank + 128 * c, policy.once);
        for (int i = 0; i < requests; ++i)
          for (int c = 0; c < 8; ++c)
            fetch_weights<128>(l.gate_up, gated, gated_tiles, kExpertWidth, 128 * c, policy.once,
                               c == 5 ? 3 : 0);
        for (int i = 0; i < requests; ++i)
          for (int c = 0; c < 4; ++c)
            fetch_weights<128>(l.down, columns, column_tiles, kExpertMlp, 512 * rank + 128 * c, policy.once);
      }
  }

  // ---- rows
  std::uint32_t done_parity = 0;
  __device__ __forceinline__ void wait_done() {
    barrier_wait(barriers.done(), done_parity);
    done_parity ^= 1;
  }
  __device__ __forceinline__ void wait_count(int request, int which, unsigned target) const {
    if (lane == 0) wait_for_count(op, counter(op, request, which), target);
    __syncwarp();
    fence_async_global();
  }
  // kParts parts of kDepth columns each from column `first` of a matrix in tiles of this width.
  template <int kParts, int kDepth>
  __device__ __forceinline__ void fetch_rows(const __nv_bfloat16* from, int width, int first,
                                             int groups) const {
    const int part = lane / groups, group = lane % groups;
    if (part >= kParts) return;
    if (group == 0) barrier_expect(barriers.rows(part), static_cast<std::uint32_t>(groups * kDepth * 16));
    bulk_load(base + (group * kParts + part) * kDepth * 16,
              from + static_cast<std::int64_t>(group) * width * 8 + (first + part * kDepth) * 8, kDepth * 16,
              barriers.rows(part));
  }
  __device__ __forceinline__ void inverses(const Request& r, float* to) const {
    for (int row = lane; row < r.s.rows; row += 32) {
      const float4* parts =
          reinterpret_cast<const float4*>(op.edge.squares + (r.s.row_begin + row) * kStatParts);
      float4 total = make_float4(0, 0, 0, 0);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float4 part = __ldcg(parts + i);
        total.x += part.x;
        total.y += part.y;
        total.z += part.z;
        total.w += part.w;
      }
      to[row] = 1.0f / sqrtf((total.x + total.y + (total.z + total.w)) / static_cast<float>(kExpertWidth) +
                             kExpertEps);
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(barriers.inverse());
  }

  __device__ __forceinline__ void rows(float* inverse) {
    wait_for_inputs();
    int blocks_of_slice = 0;
    for (int b = lane; b < kLoopBlocks; b += 32)
      blocks_of_slice += first_slice(b) <= rank && rank <= last_slice(b);
    blocks_of_slice = __reduce_add_sync(~0u, blocks_of_slice);
    for (int step = 0; step < op.steps; ++step)
      for (int layer = 0; layer < op.depth; ++layer) {
        const unsigned turn = static_cast<unsigned>(step * op.depth + layer);
        const auto from_columns = [&](int i, bool after_edge, unsigned turns) {
          const Request r = request(i);
          if (after_edge) {  // of every request: a block's own edges work where its rows will come
            for (int k = 0; k < requests; ++k)
              wait_count(k, kEdges, static_cast<unsigned>(segments[k].rows * (step + 1)));
          } else {
            wait_count(i, kColumns, static_cast<unsigned>(kLoopClusters * r.groups) * turns);
          }
          fetch_rows<4, 256>(op.edge.scaled + i * kLoopRows * kExpertWidth, kExpertWidth, 0, r.groups);
          inverses(r, inverse);
        };
        if (has_qkv(block))
          for (int i = 0; i < requests; ++i) {
            from_columns(i, layer == 0, 2 * turn);
            ring.advance(4);
            wait_done();
          }
        for (int i = 0; i < requests; ++i)
          if (const Request r = request(i); cluster < r.tiles) {
            fetch_queries(r, i, layer, turn);
            wait_done();
          }
        for (int i = 0; i < requests; ++i) {
          const Request r = request(i);
          wait_count(i, kAttended, static_cast<unsigned>(r.tiles * kLoopRanks) * (turn + 1));
          fetch_rows<1, 256>(op.attended + i * kLoopRows * kExpertHeads * kExpertHeadDim,
                             kExpertHeads * kExpertHeadDim, 256 * rank, r.groups);
          ring.advance(2);
          wait_done();
        }
        for (int i = 0; i < requests; ++i) {
          from_columns(i, false, 2 * turn + 1);
          ring.advance(8);
          wait_done();
        }
        for (int i = 0; i < requests; ++i) {
          const Request r = request(i);
          wait_count(i, kHidden + rank, static_cast<unsigned>(blocks_of_slice) * (turn + 1));
          fetch_rows<2, 256>(op.hidden + i * kLoopRows * kExpertMlp, kExpertMlp, 512 * rank, r.groups);
          ring.advance(4);
          wait_done();
        }
      }
  }

  // Queries of this cluster's tile, and this rank's share of the suffix's keys and values behind the
  // prefix's.
  __device__ __forceinline__ void fetch_queries(const Request& r, int request, int layer, unsigned turn) {
    wait_count(request, kQueries, kQkvBlocks * (turn + 1));
    const int row0 = cluster * kTile, count = min(kTile, r.s.rows * kExpertHeads - row0);
    if (lane == 0) barrier_expect(barriers.rows(0), static_cast<std::uint32_t>(count * kExpertHeadDim * 2));
    __syncwarp();
    if (lane < count)
      bulk_load(base + lane * kKeyPitch,
                op.q + (static_cast<std::int64_t>(request) * kLoopRows * kExpertHeads + row0 + lane) *
                           kExpertHeadDim,
                kExpertHeadDim * 2, barriers.rows(0));
    const int first = rank * r.suffix_keys, own = max(0, min(r.suffix_keys, r.s.rows - first));
    if (lane == 0) {
      if (own > 0) {
        barrier_expect(barriers.rows(1), static_cast<std::uint32_t>(2 * own * kExpertHeadDim * 2));
      } else {
        barrier_arrive(barriers.rows(1));
      }
    }
    __syncwarp();
    const int side = lane / 16, key = lane % 16;
    if (key < own)
      bulk_load(base + kSuffixAt + lane * kKeyPitch,
                reinterpret_cast<const __nv_bfloat16*>(
                    static_cast<const char*>(side == 0 ? op.qkv.k : op.qkv.v) + layer * op.layer_bytes) +
                    op.qkv.cache_row(r.s.slot, 0, r.s.past + first + key),
                kExpertHeadDim * 2, barriers.rows(1));
    ring.advance(2 * r.chunks);
  }
};

}  // namespace servoflow::ops::cuda::loop
