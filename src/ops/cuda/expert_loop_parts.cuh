// What the three roles of the loop's kernel share: the plan of its shared memory, who owns which weights, the
// ring of weights, counters and bounded waits.
#pragma once

#include "ops/cuda/expert_edge.cuh"
#include "ops/cuda/expert_loop.cuh"
#include "ops/cuda/hopper.cuh"
#include "ops/cuda/wgmma_shapes.cuh"

// Where the copy of the kernel that tests run (loop_trouble.cu) waits for no reason, and whether it counts.
#ifndef SF_LOOP_POINT
#define SF_LOOP_POINT(point)
#define SF_LOOP_COUNTS(at) true
#endif

namespace servoflow::ops::cuda::loop {

// Two warpgroups compute. Of the third, one warp fetches weights, keys and values, one the rows of a task.
inline constexpr int kCompute = 256, kThreads = kCompute + 128;
inline constexpr int kMostWeights = 80, kMostSlots = 7;  // weight rows of a block; slots of the ring
inline constexpr int kQkvChunks = 4, kOutChunks = 2, kGatedChunks = 8,
                     kDownChunks = 4;  // of a block's weights
inline constexpr int kChunkKeys = kLoopChunkKeys;
inline constexpr int kBoxBytes =
    kChunkKeys * 128;  // 64 columns of a chunk's keys, pieces of 16 bytes swizzled

// Shared memory. The rows of a task lie at 0, in the order of loop_at().
inline constexpr int kRowsBytes = kLoopRows * kExpertWidth * 2, kGroupBytes = 8 * 256 * 2,
                     kPartBytes = kLoopRows / 8 * kGroupBytes;
inline constexpr int kRing = kRowsBytes;
inline constexpr int kSlotBytes = 64 * 128 * 2, kLargeSlotBytes = kMostWeights * 128 * 2;
inline constexpr int kRingBytes = kMostSlots * kSlotBytes;
inline constexpr int kBarriers = kRing + kRingBytes;
inline constexpr int kInverse = kBarriers + 256;  // 1 / rms of each row
inline constexpr int kSegments = kInverse + 64 * 4;
inline constexpr int kSharedBytes = kSegments + kLoopRequests * sizeof(Segment);
// Tasks that do not need all of it keep other things there. The end of a product: what one warpgroup hands to
// the other, at 0. Attention: the weights of the keys at 0, [group of 8 rows][kLoopKeys / 8][8][8]; queries
// as a product's rows; the suffix's keys and values; small things. And what other blocks of the cluster send.
// Where queries, keys and values lie there is never anything but bf16 numbers: what is multiplied by nothing
// must still be a number. (Behind the last of the suffix's keys anything may lie: its scores and values are
// masked.)
inline constexpr int kHandedAt = 0, kWeightsAt = 0, kWeightGroup = kLoopKeys * 16;
inline constexpr int kQueriesAt = 20480, kQueryGroup = kExpertHeadDim * 16;  // bytes of eight rows
inline constexpr int kSuffixAt = kQueriesAt + kLoopRows / 8 * kQueryGroup;
inline constexpr int kSuffixKeys = kLoopSuffixKeys,
                     kKeyPitch = kExpertHeadDim * 2;  // of one rank: rows of keys, then of values, in boxes
// A row's largest score, as an integer of the same order; what that of the suffix leaves of the weights so
// far; the suffix's weights, [group of 8 rows][8][8]; totals of each warp, later factors of each rank,
// [8][64].
inline constexpr int kMaximaAt = kSuffixAt + 2 * kSuffixKeys * kKeyPitch, kShrinkAt = kMaximaAt + 256,
                     kSuffixWeightsAt = kShrinkAt + 256, kTotalsAt = kSuffixWeightsAt + 1024;
// Of every rank 32 columns of its sums: [pair of groups][64][4] pairs, then the odd group's [64][2]; then,
// for each row, largest score and total.
inline constexpr float kLeast = -1e30f;  // below any score
inline constexpr int kReceived = 65536, kSumBytes = 3 * 64 * 16 + 64 * 8, kRowTotals = kLoopRows * 8;
inline constexpr int kReceivedTotals = kReceived + kLoopRanks * kSumBytes;
// Of the last part of a task's rows, what attention puts nothing into.
inline constexpr int kRowsLeft = kRowsBytes - 4 * kBoxBytes;
static_assert(kRowsLeft >= 3 * kPartBytes && kRowsLeft >= kReceivedTotals + kLoopRanks * kRowTotals &&
              4 * kBoxBytes <= kQueriesAt);
static_assert(kSharedBytes <= 227 * 1024 && kTotalsAt + kLoopRanks * 64 * 4 <= kReceived);
static_assert((kLoopRows / 8 + 1) * kWeightGroup <= kQueriesAt && 5 * 8 * 128 * 4 <= kQueriesAt);
static_assert(kReceived + kLoopRanks * 8 * 80 * 4 <= kRowsBytes &&
              kReceivedTotals + kLoopRanks * kRowTotals <= kRowsBytes);

// Barriers in shared memory.
struct Barriers {
  std::uint32_t base;
  __device__ std::uint32_t full(int slot) const { return base + 8 * slot; }
  __device__ std::uint32_t empty(int slot) const { return base + 8 * (kMostSlots + slot); }
  __device__ std::uint32_t rows(int part) const { return base + 8 * (2 * kMostSlots + part); }  // of four
  __device__ std::uint32_t inverse() const { return base + 8 * (2 * kMostSlots + 4); }
  __device__ std::uint32_t done() const {
    return base + 8 * (2 * kMostSlots + 5);
  }  // a task's rows are free again
  __device__ std::uint32_t received() const { return base + 8 * (2 * kMostSlots + 6); }
  __device__ std::uint32_t may_send() const {
    return base + 8 * (2 * kMostSlots + 7);
  }  // the whole cluster is there
  __device__ std::uint32_t queries() const { return base + 8 * (2 * kMostSlots + 8); }
  __device__ std::uint32_t down_seen() const {
    return base + 8 * (2 * kMostSlots + 10);
  }                                                                                  // its rows are there
  __device__ std::uint32_t told() const { return base + 8 * (2 * kMostSlots + 9); }  // every rank's totals
};

// Weights are dealt in groups of 16 packed rows. The first clusters have a head each: its queries, of which a
// block makes two groups, and its attention. The blocks behind them make keys and values, a group each.
inline constexpr int kHeadClusters = kExpertHeads, kKeyGroups = 2 * kExpertHeadDim / 16;
__device__ __forceinline__ bool has_head(int block) { return block < kHeadClusters * kLoopRanks; }
__device__ __forceinline__ int key_group(int block) { return block - kHeadClusters * kLoopRanks; }
__device__ __forceinline__ bool has_qkv(int block) {
  return has_head(block) || key_group(block) < kKeyGroups;
}
__device__ __forceinline__ int qkv_group(int block) {
  return has_head(block) ? 2 * block : kHeadClusters * kExpertHeadDim / 16 + key_group(block);
}
// Blocks of the last clusters have five groups where the others have four: of 64 of columns, of 512 of gate
// and up.
inline constexpr int kSmallClusters = 11, kSmallBlocks = kSmallClusters * kLoopRanks;
__host__ __device__ __forceinline__ int gated_groups(int block) { return block < kSmallBlocks ? 4 : 5; }
__host__ __device__ __forceinline__ int gated_group(int block) {
  return 4 * block + max(0, block - kSmallBlocks);
}
__device__ __forceinline__ int column_groups(int cluster) {
  return cluster < kSmallClusters ? 4 : 5;
}  // of 64
__device__ __forceinline__ int column_group(int cluster) {
  return 4 * cluster + max(0, cluster - kSmallClusters);
}
// The ranks whose slice of 512 hidden features this block's lie in, and how many blocks a slice has.
__host__ __device__ __forceinline__ int first_slice(int block) { return gated_group(block) / 64; }
__host__ __device__ __forceinline__ int last_slice(int block) {
  return (gated_group(block) + gated_groups(block) - 1) / 64;
}

// Both sides walk through the same chunks. A slot holds 128 of the depth of a block's weights, or 32 keys.
struct Ring {
  int slots, bytes;
  int slot = 0;
  std::uint32_t parity = 0;
  explicit __device__ __forceinline__ Ring(int block)
      : slots(block < kSmallBlocks ? kMostSlots : 5),
        bytes(block < kSmallBlocks ? kSlotBytes : kLargeSlotBytes) {}
  __device__ __forceinline__ std::uint32_t at() const {
    return kRing + static_cast<std::uint32_t>(slot * bytes);
  }
  __device__ __forceinline__ void advance(int chunks) {
    slot += chunks;
    while (slot >= slots) {
      slot -= slots;
      parity ^= 1;
    }
  }
  __device__ __forceinline__ Ring ahead(int chunks) const {
    Ring r = *this;
    r.advance(chunks);
    return r;
  }
};
static_assert(kChunkKeys * kExpertHeadDim * 2 <= kSlotBytes && 5 * kLargeSlotBytes <= kRingBytes);
static_assert(kSuffixAt % 1024 == 0 && kRing % 1024 == 0 && kSlotBytes % 1024 == 0 &&
              kHeadClusters <= kSmallClusters);  // of the swizzle

__device__ __forceinline__ unsigned* counter(const ExpertLoop& op, int request, int which) {
  return op.counters + (request * kLoopCounters + which) * 32;
}
__device__ __forceinline__ void count_one(unsigned* at) {
  SF_LOOP_POINT(0);
  if (SF_LOOP_COUNTS(at)) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(at) : "memory");
}
// Of all that wait in vain one thread says what there is to know and stops the kernel.
__device__ __forceinline__ void give_up(const ExpertLoop& op, const unsigned* at, unsigned seen,
                                        unsigned wanted) {
  if (atomicExch(op.counters + (kLoopRequests * kLoopCounters + 1) * 32, 1u) != 0) return;
  op.stall->block = blockIdx.x;
  op.stall->counter = static_cast<unsigned>(at - op.counters) / 32;
  op.stall->seen = seen;
  op.stall->wanted = wanted;
#pragma unroll 1
  for (int i = 0; i < kLoopRequests * kLoopCounters; ++i) op.stall->counts[i] = __ldcg(op.counters + i * 32);
  __threadfence_system();
  // Not a trap: for one, the compiler gives up reallocating registers. Nothing lies at address 0.
  asm volatile("st.global.u32 [%0], %1;" ::"l"(0ull), "r"(seen) : "memory");
}
// Waits until a counter has reached `target`, two seconds at most.
__device__ __forceinline__ void wait_for_count(const ExpertLoop& op, const unsigned* at, unsigned target) {
  unsigned now;
  long long begin = 0;
  for (int i = 0;; ++i) {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(at) : "memory");
    if (static_cast<int>(now - target) >= 0) {
      SF_LOOP_POINT(1);
      return;
    }
    if (i % 1024 == 1023) {
      long long time;
      asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
      if (begin == 0) begin = time;
      if (time - begin > 2000000000ll) give_up(op, at, now, target);
    }
  }
}

// What a request brings, as every role works it out for itself.
struct Request {
  Segment s;
  int groups;                            // of eight rows: each has its owner among the ranks
  int prefix_keys, suffix_keys, chunks;  // of a rank
  explicit __device__ __forceinline__ Request(const Segment& segment) : s(segment) {
    groups = (s.rows + 7) / 8;
    prefix_keys = share_of_rank(s.past);
    suffix_keys = share_of_rank(s.rows);
    chunks = (prefix_keys + kChunkKeys - 1) / kChunkKeys;
  }
  // Keys of the prefix that are a rank's.
  __device__ __forceinline__ int keys_of(int rank) const {
    return max(0, min(prefix_keys, s.past - rank * prefix_keys));
  }
};

// Bytes from global to shared memory, with a hint how long L2 should keep them.
__device__ __forceinline__ void bulk_load(std::uint32_t to, const void* from, int bytes,
                                          std::uint32_t barrier) {
  SF_LOOP_POINT(2);
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void bulk_load(std::uint32_t to, const void* from, int bytes,
                                          std::uint32_t barrier, std::uint64_t policy) {
  SF_LOOP_POINT(3);
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
      "[%3], "
      "%4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}
// Global memory that other processors wrote with ordinary stores, about to be read by the copy engine.
__device__ __forceinline__ void fence_async_global() { asm volatile("fence.proxy.async;" ::: "memory"); }
// Now, and not when it is used.
__device__ __forceinline__ void take(float2& v) { asm volatile("" : "+f"(v.x), "+f"(v.y)); }
__device__ __forceinline__ void take(float4& v) {
  asm volatile("" : "+f"(v.x), "+f"(v.y), "+f"(v.z), "+f"(v.w));
}
// What was sent by other blocks of the cluster and counted by this barrier is visible afterwards.
__device__ __forceinline__ void barrier_wait_cluster(std::uint32_t barrier, std::uint32_t parity) {
  std::uint32_t done;
  do {
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, "
        "1, 0, p;}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (done == 0);
  SF_LOOP_POINT(4);
}
__device__ __forceinline__ void compute_sync() { asm volatile("bar.sync 1, 256;" ::: "memory"); }
__device__ __forceinline__ std::uint32_t in_rank(std::uint32_t address, int rank) {
  std::uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}
__device__ __forceinline__ void send_quad(std::uint32_t to, std::uint32_t barrier, std::uint32_t a,
                                          std::uint32_t b, std::uint32_t c, std::uint32_t d) {
  SF_LOOP_POINT(5);
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%2, %3, %4, %5}, [%1];" ::"r"(to),
      "r"(barrier), "r"(a), "r"(b), "r"(c), "r"(d)
      : "memory");
}
__device__ __forceinline__ void send_pair(std::uint32_t to, std::uint32_t barrier, float a, float b) {
  SF_LOOP_POINT(6);
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%2, %3}, [%1];" ::"r"(to),
               "r"(barrier), "f"(a), "f"(b)
               : "memory");
}
// A matrix in core matrices of 8 rows by 16 bytes, 128 bytes from one to the next along the depth and `group`
// from eight rows to the next.
__device__ __forceinline__ std::uint64_t core_descriptor(std::uint32_t shared, std::uint32_t group) {
  return descriptor(shared, 128, static_cast<int>(group), 0);
}

}  // namespace servoflow::ops::cuda::loop
