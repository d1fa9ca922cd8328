// sm_90 building blocks: barriers in shared memory, bulk tensor copies, warpgroup products, clusters of two.
#pragma once

#include "ops/cuda/device_code.cuh"

// Blocks of a cluster, where the code compiled for knows them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define SF_CLUSTER(n)
#else
#define SF_CLUSTER(n) __cluster_dims__(n, 1, 1)
#endif

namespace servoflow::ops::cuda {

__device__ __forceinline__ void barrier_init(std::uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_expect(std::uint32_t barrier, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_wait(std::uint32_t barrier, std::uint32_t parity) {
  std::uint32_t done;
  do {
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  } while (done == 0);
}
// Arrives at the barrier that lies at the same place in block `rank` of the cluster. The arrival orders
// nothing but itself: what it announces is that asynchronous reads are done. (With release semantics for the
// cluster it would wait for every store of the block: measured, half a microsecond.)
__device__ __forceinline__ void barrier_arrive_at(std::uint32_t barrier, std::uint32_t rank) {
  asm volatile(
      "{.reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1; "
      "mbarrier.arrive.shared::cluster.b64 _, [remote];}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

__device__ __forceinline__ std::uint32_t cluster_rank() {
  std::uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
// Makes initialised barriers visible to the cluster, with the arrival that follows.
__device__ __forceinline__ void barriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Stores to the same place in block `rank`'s shared memory, counted there by `barrier` as bytes that came.
__device__ __forceinline__ void send(std::uint32_t to, std::uint32_t barrier, int rank, const float4& v) {
  asm volatile(
      "{.reg .b32 a, b; mapa.shared::cluster.u32 a, %0, %2; mapa.shared::cluster.u32 b, %1, %2; "
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [a], {%3, %4, %5, %6}, [b];}" ::"r"(to),
      "r"(barrier), "r"(rank), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
      : "memory");
}

// A box of the tensor at (column, row) into this block's shared memory …
__device__ __forceinline__ void tensor_load(std::uint32_t shared, const void* map, int column, int row,
                                            std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
      "[%4];" ::"r"(shared),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
// … of whole rows from `row`, where the map is of such (tensor_map_of_rows) …
__device__ __forceinline__ void tensor_load_rows(std::uint32_t shared, const void* map, int row,
                                                 std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %2}], "
      "[%4];" ::"r"(shared),
      "l"(map), "r"(0), "r"(row), "r"(barrier)
      : "memory");
}
// … and into both blocks of a cluster of two, at the same place, with a signal to each block's barrier.
__device__ __forceinline__ void tensor_load_both(std::uint32_t shared, const void* map, int column, int row,
                                                 std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%2, %3}], [%4], %5;" ::"r"(shared),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(static_cast<std::uint16_t>(3))
      : "memory");
}

// Shared memory of this block to the same or another place in block `rank`'s, in one go; what was written
// there must have passed fence_async() and a barrier.
__device__ __forceinline__ void send_bytes(std::uint32_t to, std::uint32_t from, int bytes,
                                           std::uint32_t barrier, int rank) {
  asm volatile(
      "{.reg .b32 a, b; mapa.shared::cluster.u32 a, %0, %4; mapa.shared::cluster.u32 b, %3, %4; "
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [a], [%1], %2, [b];}" ::"r"(to),
      "r"(from), "r"(bytes), "r"(barrier), "r"(rank)
      : "memory");
}
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// What a warpgroup product reads: swizzle 0 (none), 1 (128 bytes a row) or 3 (32 bytes). Offsets in bytes,
// from one core matrix of 8 rows by 16 bytes to the next: `leading` within a row of them, `stride` to the
// next eight rows.
__device__ __forceinline__ std::uint64_t descriptor(std::uint32_t shared, int leading, int stride,
                                                    int swizzle) {
  return static_cast<std::uint64_t>((shared & 0x3FFFF) >> 4) |
         (static_cast<std::uint64_t>(leading >> 4) << 16) | (static_cast<std::uint64_t>(stride >> 4) << 32) |
         (static_cast<std::uint64_t>(swizzle) << 62);
}
// A tile of 128-byte rows, 128-byte swizzle, depth along the row.
__device__ __forceinline__ std::uint64_t tile_descriptor(std::uint32_t shared) {
  return descriptor(shared, 16, 1024, 1);
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// What a product has left in registers is read after this, not before.
template <int kCount>
__device__ __forceinline__ void settled(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

}  // namespace servoflow::ops::cuda
