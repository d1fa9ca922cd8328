// Operations that work row by row, or element by element.
#include <cuda_fp16.h>

#include <algorithm>

#include "ops/cuda/kernels.h"

namespace servoflow::ops::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void patch_rows_kernel(PatchRows op) {
  wait_for_inputs();
  release_successor();
  const int grid = op.image / op.patch, tokens = grid * grid, area = op.patch * op.patch;
  const int row = static_cast<int>(blockIdx.x);
  if (row >= valid(op.pictures) * tokens) return;
  const int picture = row / tokens, token = row % tokens, top = token / grid * op.patch,
            left = token % grid * op.patch;
  const float* in = op.pixels + static_cast<std::int64_t>(picture) * op.image * op.image * 3;
  const std::int64_t out = row * op.out.pitch;
  for (int c = static_cast<int>(threadIdx.x); c < 3 * area; c += kThreads) {
    const int channel = c / area, y = c % area / op.patch, x = c % op.patch;
    const float v = in[(static_cast<std::int64_t>(top + y) * op.image + left + x) * 3 + channel];
    if (op.out.dtype == DType::kF32) {
      static_cast<float*>(op.out.data)[out + c] = v;
      continue;
    }
    __nv_bfloat16* parts = static_cast<__nv_bfloat16*>(op.out.data) + out + c;
    const __nv_bfloat16 first = __float2bfloat16(v);
    parts[0] = first;
    parts[3 * area] = __float2bfloat16(__fsub_rn(v, __bfloat162float(first)));
    if (op.out.cols == 9 * area) parts[6 * area] = first;
  }
}

__global__ void scale_rows_kernel(ScaleRows op) {
  wait_for_inputs();
  release_successor();
  const int row = static_cast<int>(blockIdx.x);
  if (row >= valid(op.rows)) return;
  const std::int64_t from = static_cast<std::int64_t>(op.ids != nullptr ? op.ids[row] : row) * op.x.pitch;
  float* y = static_cast<float*>(op.y.data) +
             static_cast<std::int64_t>(op.row_map != nullptr ? op.row_map[row] : row) * op.y.pitch;
  const bool f32 = op.x.dtype == DType::kF32;
  for (int c = static_cast<int>(threadIdx.x); c < op.x.cols; c += kThreads)
    y[c] = load_element(op.x.data, f32, from + c) * op.scale;
}

__global__ void round_rows_kernel(Matrix x, Matrix y, Count rows) {
  wait_for_inputs();
  release_successor();
  const int row = static_cast<int>(blockIdx.x);
  if (row >= valid(rows)) return;
  const float* from = static_cast<const float*>(x.data) + row * x.pitch;
  auto* to = static_cast<__nv_bfloat16*>(y.data) + row * y.pitch;
  for (int c = static_cast<int>(threadIdx.x); c < x.cols; c += kThreads) to[c] = __float2bfloat16(from[c]);
}

// The sum over all threads, in an order fixed by kThreads alone.
__device__ float block_sum(float v) {
  __shared__ float sums[kThreads / 32];
  v = warp_sum(v);
  __syncthreads();
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
  __syncthreads();
  float total = 0;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) total += sums[i];
  return total;
}

// What a norm subtracts from a row and multiplies it by.
struct RowNorm {
  float mean, inverse;
  const float *scale, *shift;
};

__device__ __forceinline__ RowNorm norm_of(const NextNorm& n, int row, int width) {
  RowNorm r{0, 0, n.weight, n.bias};
  if (n.kind == NextNorm::kModulated) {
    r.scale =
        n.modulation.scale +
        (n.modulation.row_offset != nullptr ? n.modulation.row_offset[row] * n.modulation.step_pitch : 0);
    r.shift = r.scale + width;
  }
  return r;
}
__device__ __forceinline__ float normed(const NextNorm& n, const RowNorm& r, float v, float scale,
                                        float shift) {
  v = (v - r.mean) * r.inverse;
  if (n.kind == NextNorm::kLayer) return v * scale + shift;
  v *= 1.0f + scale;
  return n.kind == NextNorm::kModulated ? v + shift : v;
}

// Any width, any epilogue.
__global__ void __launch_bounds__(kThreads) finish_rows_kernel(FinishRows op) {
  extern __shared__ float row_values[];
  wait_for_inputs();
  release_successor();
  const int row = static_cast<int>(blockIdx.x), width = op.x.cols;
  if (row >= valid(op.rows)) return;
  float* x = static_cast<float*>(op.x.data) + row * op.x.pitch;
  const int first = static_cast<int>(threadIdx.x);
  float sum = 0, squares = 0;
  for (int c = first; c < width; c += kThreads) {
    float v;
    if (op.splits > 0) {
      const float* partial = op.partials + static_cast<std::int64_t>(row) * width + c;
      v = partial[0];
      for (int i = 1; i < op.splits; ++i) v += partial[i * op.split_pitch];
      v = op.epilogue.finish(row, c, v);
      if (op.epilogue.accumulate) v += x[c];
      x[c] = v;
    } else {
      v = x[c];
    }
    row_values[c] = v;
    sum += v;
    squares += v * v;
  }
  const NextNorm& n = op.norm;
  if (n.kind == NextNorm::kNone) return;
  RowNorm r = norm_of(n, row, width);
  const float count = static_cast<float>(width);
  if (n.kind == NextNorm::kLayer) {
    r.mean = block_sum(sum) / count;
    squares = 0;
    for (int c = first; c < width; c += kThreads) {
      const float d = row_values[c] - r.mean;
      squares += d * d;
    }
  }
  r.inverse = 1.0f / sqrtf(block_sum(squares) / count + n.eps);
  const bool f32 = n.y.dtype == DType::kF32;
  for (int c = first; c < width; c += kThreads)
    store_element(n.y.data, f32, row * n.y.pitch + c,
                  normed(n, r, row_values[c], r.scale[c], r.shift != nullptr ? r.shift[c] : 0.0f));
}

// Widths that are a multiple of 4 and at most 2048, in four columns at a time, everything asked for at once.
constexpr int kQuads = 2, kMostSplits = 4;

__device__ __forceinline__ float4 quad(const float* p) { return *reinterpret_cast<const float4*>(p); }

__device__ __forceinline__ void finish_quads(const FinishRows& op, int row) {
  const int width = op.x.cols;
  float* x = static_cast<float*>(op.x.data) + row * op.x.pitch;
  const NextNorm& n = op.norm;
  const DeviceEpilogue& e = op.epilogue;
  RowNorm r = norm_of(n, row, width);
  const float* gate =
      e.gate != nullptr ? e.gate + (e.gate_row != nullptr ? e.gate_row[row] : 0) * e.gate_pitch : nullptr;
  float v[kQuads][4] = {};
  float4 scale[kQuads] = {}, shift[kQuads] = {};
  float sum = 0, squares = 0;
#pragma unroll
  for (int u = 0; u < kQuads; ++u) {
    const int c = 4 * (static_cast<int>(threadIdx.x) + u * kThreads);
    if (c >= width) continue;
    float4 part[kMostSplits] = {}, bias = {}, factor = make_float4(1, 1, 1, 1);
    float4 old = quad(x + c);
#pragma unroll
    for (int i = 0; i < kMostSplits; ++i)
      if (i < op.splits)
        part[i] = quad(op.partials + i * op.split_pitch + static_cast<std::int64_t>(row) * width + c);
    if (op.splits > 0) {
      if (e.bias != nullptr) bias = quad(e.bias + c);
      if (gate != nullptr) factor = quad(gate + c);
    }
    if (r.scale != nullptr) scale[u] = quad(r.scale + c);
    if (r.shift != nullptr) shift[u] = quad(r.shift + c);
    if (op.splits > 0) {
      float4 total = part[0];
#pragma unroll
      for (int i = 1; i < kMostSplits; ++i)
        if (i < op.splits) {
          total.x += part[i].x;
          total.y += part[i].y;
          total.z += part[i].z;
          total.w += part[i].w;
        }
      old.x += (total.x + bias.x) * factor.x;
      old.y += (total.y + bias.y) * factor.y;
      old.z += (total.z + bias.z) * factor.z;
      old.w += (total.w + bias.w) * factor.w;
      *reinterpret_cast<float4*>(x + c) = old;
    }
    v[u][0] = old.x;
    v[u][1] = old.y;
    v[u][2] = old.z;
    v[u][3] = old.w;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum += v[u][i];
      squares += v[u][i] * v[u][i];
    }
  }
  if (n.kind == NextNorm::kNone) return;
  const float count = static_cast<float>(width);
  if (n.kind == NextNorm::kLayer) {
    r.mean = block_sum(sum) / count;
    squares = 0;
#pragma unroll
    for (int u = 0; u < kQuads; ++u)
      if (4 * (static_cast<int>(threadIdx.x) + u * kThreads) < width)
#pragma unroll
        for (int i = 0; i < 4; ++i) squares += (v[u][i] - r.mean) * (v[u][i] - r.mean);
  }
  r.inverse = 1.0f / sqrtf(block_sum(squares) / count + n.eps);
#pragma unroll
  for (int u = 0; u < kQuads; ++u) {
    const int c = 4 * (static_cast<int>(threadIdx.x) + u * kThreads);
    if (c >= width) continue;
    const float4 out = make_float4(
        normed(n, r, v[u][0], scale[u].x, shift[u].x), normed(n, r, v[u][1], scale[u].y, shift[u].y),
        normed(n, r, v[u][2], scale[u].z, shift[u].z), normed(n, r, v[u][3], scale[u].w, shift[u].w));
    const std::int64_t at = row * n.y.pitch + c;
    if (n.y.dtype == DType::kF32) {
      *reinterpret_cast<float4*>(static_cast<float*>(n.y.data) + at) = out;
    } else {
      *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(n.y.data) + at) =
          make_uint2(pack_bf16(out.x, out.y), pack_bf16(out.z, out.w));
    }
  }
}
__global__ void __launch_bounds__(kThreads) finish_quads_kernel(FinishRows op) {
  wait_for_inputs();
  release_successor();
  for (int row = static_cast<int>(blockIdx.x), rows = valid(op.rows); row < rows;
       row += static_cast<int>(gridDim.x))
    finish_quads(op, row);
}

// Rows begin at multiples of 16 bytes, and the epilogue is one that finish_quads_kernel knows.
bool in_quads(const FinishRows& op) {
  const DeviceEpilogue& e = op.epilogue;
  const bool plain = op.splits == 0 || (op.splits <= kMostSplits && e.accumulate && e.row_map == nullptr &&
                                        e.row_bias == nullptr && e.activation == Activation::kNone);
  return plain && op.x.cols % 4 == 0 && op.x.cols <= 4 * kQuads * kThreads && op.x.pitch % 4 == 0 &&
         (op.norm.kind == NextNorm::kNone || op.norm.y.pitch % 4 == 0);
}

__global__ void split_qkv_kernel(Matrix qkv, DeviceQkv out, Count rows) {
  wait_for_inputs();
  release_successor();
  const int row = static_cast<int>(blockIdx.x);
  if (row >= valid(rows)) return;
  Segment s;
  if (!find_segment(out.segments, valid(out.segment_count), row, s)) return;
  const float* x = static_cast<const float*>(qkv.data) + row * qkv.pitch;
  const int d = out.head_dim, rotated = (out.heads + out.kv_heads) * d;
  if (d % 2 == 0) {
    for (int p = static_cast<int>(threadIdx.x); p < qkv.cols / 2; p += kThreads) {
      int first = 2 * p, second = first + 1;
      if (first < rotated) {
        const int half = d / 2, head = p / half;
        first = head * d + p - head * half;
        second = first + half;
      }
      out.put(s, row, first, second, x[first], x[second]);
    }
    return;
  }
  // An odd head size has no pairs: everything stays where it is.
  for (int c = static_cast<int>(threadIdx.x); c < qkv.cols; c += kThreads) {
    const int head = c / d, i = c - head * d, position = s.past + row - s.row_begin;
    const float v = x[c];
    if (head < out.heads) {
      store_element(out.q, out.f32, static_cast<std::int64_t>(row) * out.heads * d + c, v);
    } else if (head < out.heads + out.kv_heads) {
      store_element(out.k, out.f32, out.cache_row(s.slot, head - out.heads, position) + i, v);
    } else {
      store_element(out.v, out.f32, out.cache_row(s.slot, head - out.heads - out.kv_heads, position) + i, v);
    }
  }
}

__global__ void time_embedding_kernel(TimeEmbedding op) {
  wait_for_inputs();
  release_successor();
  constexpr double kTwoPi = 6.283185307179586476925286766559;
  const int half = op.width / 2, row = static_cast<int>(blockIdx.x);
  float* out = static_cast<float*>(op.out.data) + row * op.out.pitch;
  for (int i = static_cast<int>(threadIdx.x); i < half; i += kThreads) {
    const double fraction = half > 1 ? static_cast<double>(i) / (half - 1) : 0.0;
    const double period = op.min_period * pow(op.max_period / op.min_period, fraction);
    const double angle = kTwoPi / period * static_cast<double>(op.times[row]);
    out[i] = static_cast<float>(sin(angle));
    out[half + i] = static_cast<float>(cos(angle));
  }
}

__global__ void euler_step_kernel(EulerStep op) {
  wait_for_inputs();
  release_successor();
  const int row = static_cast<int>(blockIdx.x);
  if (row >= valid(op.rows)) return;
  float* x = static_cast<float*>(op.x.data) + row * op.x.pitch;
  const float* v = static_cast<const float*>(op.v.data) + row * op.v.pitch;
  for (int c = static_cast<int>(threadIdx.x); c < op.x.cols; c += kThreads) x[c] += op.dt * v[c];
}

template <typename From>
__device__ float widen(From v);
template <>
__device__ float widen(float v) {
  return v;
}
template <>
__device__ float widen(double v) {
  return static_cast<float>(v);
}
template <>
__device__ float widen(__nv_bfloat16 v) {
  return __bfloat162float(v);
}
template <>
__device__ float widen(__half v) {
  return __half2float(v);
}

template <typename From>
__global__ void pack_rows_kernel(const From* from, int first, WeightLayout w, void* to, int* bad) {
  const int row = static_cast<int>(blockIdx.x), feature = first + row;
  int place = feature;
  if (w.order == RowOrder::kGated) {
    const int half = w.n / 2, pair = feature % half;
    place = pair / 8 * 16 + pair % 8 + (feature < half ? 0 : 8);
  } else if (w.order == RowOrder::kRotated && feature < w.rotated) {
    const int half = w.head_dim / 2, head = feature / w.head_dim, i = feature % w.head_dim;
    const int pair = head * half + i % half;
    place = pair / 8 * 16 + pair % 8 + (i < half ? 0 : 8);
  } else {
    const int pair = feature / 2;
    place = pair / 8 * 16 + pair % 8 + (feature % 2 == 0 ? 0 : 8);
  }
  bool finite = true;
  for (int c = static_cast<int>(threadIdx.x); c < w.k; c += kThreads) {
    const float v = widen(from[static_cast<std::int64_t>(row) * w.k + c]);
    const std::int64_t at = w.at(place, c);
    store_element(to, w.f32, at, v);
    finite = finite && isfinite(load_element(to, w.f32, at));
  }
  if (!finite) *bad = 1;
}

}  // namespace

cudaError_t kernels_run_here() {
  cudaFuncAttributes attributes;
  const cudaError_t e = cudaFuncGetAttributes(&attributes, euler_step_kernel);
  cudaGetLastError();
  return e;
}

cudaError_t patch_rows(const Stream& s, const PatchRows& op) {
  const int tokens = (op.image / op.patch) * (op.image / op.patch);
  return launch(s, dim3(static_cast<unsigned>(op.pictures.capacity * tokens)), kThreads, 0, patch_rows_kernel,
                op);
}

cudaError_t scale_rows(const Stream& s, const ScaleRows& op) {
  return launch(s, dim3(static_cast<unsigned>(op.rows.capacity)), kThreads, 0, scale_rows_kernel, op);
}

cudaError_t round_rows(const Stream& s, const Matrix& x, const Matrix& y, Count rows) {
  return launch(s, dim3(static_cast<unsigned>(rows.capacity)), kThreads, 0, round_rows_kernel, x, y, rows);
}

cudaError_t finish_rows(const Stream& s, const FinishRows& op) {
  if (in_quads(op)) {
    const int expected = op.rows.likely > 0 ? std::min(op.rows.likely, op.rows.capacity) : op.rows.capacity;
    return launch(s, dim3(static_cast<unsigned>(expected)), kThreads, 0, finish_quads_kernel, op);
  }
  const std::size_t shared = static_cast<std::size_t>(op.x.cols) * sizeof(float);
  if (shared > 40000) {
    const cudaError_t e = cudaFuncSetAttribute(
        finish_rows_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (e != cudaSuccess) return e;
  }
  return launch(s, dim3(static_cast<unsigned>(op.rows.capacity)), kThreads, shared, finish_rows_kernel, op);
}

cudaError_t split_qkv(const Stream& s, const Matrix& qkv, const DeviceQkv& out, Count rows) {
  return launch(s, dim3(static_cast<unsigned>(rows.capacity)), kThreads, 0, split_qkv_kernel, qkv, out, rows);
}

cudaError_t time_embedding(const Stream& s, const TimeEmbedding& op) {
  return launch(s, dim3(static_cast<unsigned>(op.steps)), kThreads, 0, time_embedding_kernel, op);
}

cudaError_t euler_step(const Stream& s, const EulerStep& op) {
  return launch(s, dim3(static_cast<unsigned>(op.rows.capacity)), kThreads, 0, euler_step_kernel, op);
}

cudaError_t pack_rows(cudaStream_t stream, const void* from, DType dtype, int rows, int first,
                      const WeightLayout& w, void* to, int* bad) {
  const dim3 grid(static_cast<unsigned>(rows));
  if (dtype == DType::kBF16) {
    pack_rows_kernel<<<grid, kThreads, 0, stream>>>(static_cast<const __nv_bfloat16*>(from), first, w, to,
                                                    bad);
  } else if (dtype == DType::kF16) {
    pack_rows_kernel<<<grid, kThreads, 0, stream>>>(static_cast<const __half*>(from), first, w, to, bad);
  } else if (dtype == DType::kF64) {
    pack_rows_kernel<<<grid, kThreads, 0, stream>>>(static_cast<const double*>(from), first, w, to, bad);
  } else {
    pack_rows_kernel<<<grid, kThreads, 0, stream>>>(static_cast<const float*>(from), first, w, to, bad);
  }
  return cudaGetLastError();
}

}  // namespace servoflow::ops::cuda
