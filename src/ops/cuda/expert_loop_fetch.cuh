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
  Ring ring, behind;
  int under_way = 0;

  __device__ __forceinline__ Request request(int i) const { return Request(segments[i]); }

  // ---- weights, keys and values
  // Two chunks are under way at a time: more of them stand in the way of the rows that tasks wait for, and of
  // the counts, without coming any sooner. Returns when the next chunk's slot is free and it may start.
  __device__ __forceinline__ void wait_for_room() {
    barrier_wait(barriers.empty(ring.slot), ring.parity ^ 1);
    if (under_way < 2) {
      ++under_way;
      return;
    }
    barrier_wait(barriers.full(behind.slot), behind.parity);
    behind.advance(1);
  }
  // `chunks` chunks of `pieces` times 128 columns from column `depth0`, of `tiles` tiles of eight weight rows
  // from tile `tile0` of `all`.
  __device__ __forceinline__ void fetch_weights(const __nv_bfloat16* weight, int tile0, int tiles, int all,
                                                int depth0, int pieces, int chunks, std::uint64_t policy) {
    const __nv_bfloat16* from = weight + (static_cast<std::int64_t>(depth0 / 128) * all + tile0) * 1024;
    const int bytes = tiles * 2048;
#pragma unroll 1
    for (int c = 0; c < chunks; ++c) {
      const std::uint32_t full = barriers.full(ring.slot);
      wait_for_room();
      if (lane == 0) {
        barrier_expect(full, static_cast<std::uint32_t>(pieces * bytes));
#pragma unroll 1
        for (int p = 0; p < pieces; ++p)
          bulk_load(base + ring.at() + p * bytes, from + static_cast<std::int64_t>(p) * all * 1024, bytes,
                    full, policy);
      }
      __syncwarp();
      from += static_cast<std::int64_t>(pieces) * all * 1024;
      ring.advance(1);
    }
  }
  // The ring has no room for all of gate and up's weights while it waits for their rows: the rest comes as
  // far as L2.
  __device__ __forceinline__ void bring_nearer(const __nv_bfloat16* gate_up) const {
    if (lane >= ring.slots && lane < kGatedChunks) {
      const __nv_bfloat16* from =
          gate_up + (static_cast<std::int64_t>(lane) * (2 * kExpertMlp / 8) + 2 * gated_group(block)) * 1024;
      asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from),
                   "r"(2 * gated_groups(block) * 2048)
                   : "memory");
    }
    __syncwarp();
  }
  // 32 of this rank's keys (side 0) or their values, and whatever lies behind the last of them.
  __device__ __forceinline__ void fetch_keys(const Request& r, int layer, int side, int chunk) {
    const std::uint32_t full = barriers.full(ring.slot);
    wait_for_room();
    if (lane == 0) {
      const int row = static_cast<int>((2 * layer + side) * op.side_rows) + r.s.slot * op.qkv.keys +
                      rank * r.prefix_keys + chunk * kChunkKeys;
      barrier_expect(full, 4 * kBoxBytes);
      tensor_load_rows(base + ring.at(), &op.keys, row, full);
    }
    __syncwarp();
    ring.advance(1);
  }

  __device__ __forceinline__ void weights() {
    std::uint64_t once;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
    const int columns = 2 * column_group(cluster), column_tiles = 2 * column_groups(cluster);
    constexpr int kAttended = kExpertHeads * kExpertHeadDim;
    bool ready = false;
#pragma unroll 1
    for (int turn = 0; turn < op.steps * op.depth; ++turn) {
      const ExpertLoop::Layer& l = op.layers[turn % op.depth];
      // Not while blocks wait for each other's hidden rows: they would wait for these weights, too.
      if (has_qkv(block) && turn > 0)
        barrier_wait(barriers.down_seen(), static_cast<std::uint32_t>(turn - 1) % 2);
      if (has_qkv(block))
#pragma unroll 1
        for (int i = 0; i < requests; ++i) {
          fetch_weights(l.qkv, 2 * qkv_group(block), has_head(block) ? 4 : 2, kExpertQkv / 8, 0, 2,
                        kQkvChunks, once);
          if (!has_head(block)) continue;
          if (!ready) {  // keys and values come from the kernels before this one
            wait_for_inputs();
            fence_async_global();
            ready = true;
          }
          const Request r = request(i);
#pragma unroll 1
          for (int c = 0; c < 2 * r.chunks; ++c)
            fetch_keys(r, turn % op.depth, c < r.chunks ? 0 : 1, c < r.chunks ? c : c - r.chunks);
        }
#pragma unroll 1
      for (int task = 0; task < 3; ++task) {  // out, gate and up, down
        const bool gated = task == 1;
        const int width = task == 0 ? kAttended : kExpertMlp;
        if (gated) bring_nearer(l.gate_up);
#pragma unroll 1
        for (int i = 0; i < requests; ++i)
          fetch_weights(
              task == 0 ? l.out
              : gated   ? l.gate_up
                        : l.down,
              gated ? 2 * gated_group(block) : columns, gated ? 2 * gated_groups(block) : column_tiles,
              gated ? 2 * kExpertMlp / 8 : kExpertWidth / 8, gated ? 0 : width / kLoopRanks * rank, 1,
              task == 0 ? kOutChunks
              : gated   ? kGatedChunks
                        : kDownChunks,
              once);
      }
    }
  }

  // ---- rows
  std::uint32_t done_parity = 0;
  __device__ __forceinline__ void wait_done() {
    barrier_wait(barriers.done(), done_parity);
    done_parity ^= 1;
  }
  // The first `counters` lanes wait for a counter each.
  __device__ __forceinline__ void wait_counts(int request, int which, int counters, unsigned target) const {
    if (lane < counters) wait_for_count(op, counter(op, request, which + lane), target);
    __syncwarp();
    fence_async_global();
  }
  // `parts` parts of 256 columns each.
  __device__ __forceinline__ void fetch_rows(const __nv_bfloat16* from, int parts, int groups) const {
    if (lane >= parts) return;
    const int bytes = groups * kGroupBytes;
    barrier_expect(barriers.rows(lane), static_cast<std::uint32_t>(bytes));
    bulk_load(base + lane * kPartBytes, from + lane * (kPartBytes / 2), bytes, barriers.rows(lane));
  }
  __device__ __forceinline__ void inverses(const Request& r, float* to) const {
#pragma unroll 1
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
      to[row] =
          rsqrtf((total.x + total.y + (total.z + total.w)) / static_cast<float>(kExpertWidth) + kExpertEps);
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
    constexpr int kOut = 1, kGateUp = 2, kDown = 3, kTasks = 4;
#pragma unroll 1
    for (int turn = 0; turn < op.steps * op.depth; ++turn) {
      const int step = turn / op.depth, layer = turn % op.depth;
#pragma unroll 1
      for (int task = 0; task < kTasks; ++task)
#pragma unroll 1
        for (int i = 0; i < requests; ++i) {
          const Request r = request(i);
          if (task == 0 && !has_qkv(block)) continue;
          int which = kColumns, counters = r.groups;
          unsigned target = static_cast<unsigned>(kLoopClusters * (2 * turn + (task == kGateUp)));
          if (task == kOut) {
            which = kAttended + rank;
            counters = 1;
            target = static_cast<unsigned>(kLoopRanks * (turn + 1));
          } else if (task == kDown) {
            which = kHidden + rank;
            counters = 1;
            target = static_cast<unsigned>(blocks_of_slice * (turn + 1));
          }
          if (task == 0 &&
              layer == 0) {  // of every request: a block's own edges work where its rows will come
#pragma unroll 1
            for (int k = 0; k < requests; ++k)
              wait_counts(k, kEdges, 1, static_cast<unsigned>(segments[k].rows * (step + 1)));
          } else {
            wait_counts(i, which, counters, target);
          }
          if (task == kDown && i == 0 && lane == 0) barrier_arrive(barriers.down_seen());
          const __nv_bfloat16* from = op.edge.scaled + i * kLoopRows * kExpertWidth;
          int first = 0, parts = 4;
          if (task == kOut) {
            from = op.attended + i * kLoopRows * kExpertHeads * kExpertHeadDim;
            first = rank;
            parts = 1;
          } else if (task == kDown) {
            from = op.hidden + i * kLoopRows * kExpertMlp;
            first = 2 * rank;
            parts = 2;
          }
          fetch_rows(from + first * (kPartBytes / 2), parts, r.groups);
          if (parts == 4) inverses(r, inverse);
          wait_done();
          if (task == 0 && has_head(block)) {
            wait_counts(i, kKeys, kLoopRanks, static_cast<unsigned>(kKeyGroups / kLoopRanks * (turn + 1)));
            fetch_suffix(r, layer);
            wait_done();
          }
        }
    }
  }

  // This rank's share of the suffix's keys and values, and whatever lies behind it.
  __device__ __forceinline__ void fetch_suffix(const Request& r, int layer) const {
    constexpr int kSide = kSuffixKeys * kKeyPitch;
    if (lane == 0) barrier_expect(barriers.rows(0), 2 * kSide);
    __syncwarp();
    if (lane < 2)
      tensor_load_rows(base + kSuffixAt + lane * kSide, &op.few_keys,
                       static_cast<int>((2 * layer + lane) * op.side_rows) + r.s.slot * op.qkv.keys +
                           r.s.past + rank * r.suffix_keys,
                       barriers.rows(0));
  }
};

}  // namespace servoflow::ops::cuda::loop
