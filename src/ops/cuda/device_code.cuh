// Small device functions that the kernels share: arithmetic, programmatic launch, copies, tensor-core
// products.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "ops/ops.h"

namespace servoflow::ops::cuda {

// ---- programmatic dependent launch: every kernel waits for its predecessor's results before it reads any,
// and lets its successor start its own set-up early. Before sm_90 both are nothing.
__device__ __forceinline__ void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void release_successor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ int valid(const Count& count) {
  return count.device != nullptr ? min(*count.device, count.capacity) : count.capacity;
}

__device__ __forceinline__ std::uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&v);
}
__device__ __forceinline__ float low_of(std::uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_of(std::uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ __forceinline__ float4 plus(const float4& a, const float4& b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// One element of a matrix of either dtype.
__device__ __forceinline__ float load_element(const void* data, bool is_f32, std::int64_t at) {
  return is_f32 ? static_cast<const float*>(data)[at]
                : __bfloat162float(static_cast<const __nv_bfloat16*>(data)[at]);
}
__device__ __forceinline__ void store_element(void* data, bool is_f32, std::int64_t at, float v) {
  if (is_f32) {
    static_cast<float*>(data)[at] = v;
  } else {
    static_cast<__nv_bfloat16*>(data)[at] = __float2bfloat16(v);
  }
}

constexpr float kLog2E = 1.4426950408889634f;  // the binary logarithm of e

// gelu with the tanh approximation of the paper: 0.5 x (1 + tanh u) = x / (1 + exp(-2 u)), the exponential as
// a power of two, on the two quick instructions whose errors lie far below bf16's.
__device__ __forceinline__ float gelu(float x) {
  constexpr float kScale = -2 * 0.7978845608028654f * kLog2E;
  float power, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * fmaf(kScale * 0.044715f, x * x, kScale)));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + power));
  return x * inverse;
}
__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }
__device__ __forceinline__ float activate(Activation activation, float x) {
  if (activation == Activation::kGeluTanh) return gelu(x);
  if (activation == Activation::kSilu) return silu(x);
  return x;
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  return v;
}

// The segment that holds row `row` of `count` segments; false if none does.
__device__ __forceinline__ bool find_segment(const Segment* segments, int count, int row, Segment& out) {
  for (int i = 0; i < count; ++i) {
    out = segments[i];
    if (row >= out.row_begin && row < out.row_begin + out.rows) return true;
  }
  return false;
}

// ---- asynchronous copies to shared memory, 16 bytes each; the bytes beyond `valid_bytes` become zero
__device__ __forceinline__ std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void copy_async(std::uint32_t shared, const void* global, int valid_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid_bytes)
               : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- tensor-core product of a 16x16 by a 16x8 tile, bf16 in, float32 sums; fragments as PTX lays them out
__device__ __forceinline__ void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                    std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The same for a depth of eight.
__device__ __forceinline__ void mma_of_eight(float (&d)[4], std::uint32_t a0, std::uint32_t a1,
                                             std::uint32_t b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(b));
}
__device__ __forceinline__ void load_matrix(std::uint32_t (&r)[4], std::uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}
__device__ __forceinline__ void load_matrix_transposed(std::uint32_t (&r)[4], std::uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}

}  // namespace servoflow::ops::cuda
