// The end of one step and the beginning of the next for one row, in float32: the last norm, the action
// projections and the Euler step.
#pragma once

#include "ops/cuda/expert.cuh"

namespace servoflow::ops::cuda {

inline constexpr int kEdgeThreads = 256, kEdgeWarps = kEdgeThreads / 32;

struct EdgeMemory {
  float normed[kExpertWidth];
  float actions[kMostActions], parts[kEdgeWarps];
};

// Where a feature's weights begin, in elements.
__device__ __forceinline__ std::int64_t feature_row(const WeightLayout& w, int feature) {
  const int pair = feature / 2;
  return (pair / 8 * 16 + pair % 8 + feature % 2 * 8) * w.pitch;
}
// Four weights from `at`, a multiple of four.
__device__ __forceinline__ float4 four_weights(const WeightLayout& w, const void* weight, std::int64_t at) {
  if (w.f32) return __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(weight) + at));
  const uint2 v = __ldg(reinterpret_cast<const uint2*>(static_cast<const __nv_bfloat16*>(weight) + at));
  return make_float4(low_of(v.x), high_of(v.x), low_of(v.y), high_of(v.y));
}

// All kEdgeThreads threads; `sync` is their barrier. `scaled_at`: where a column of this row lies in `scaled`.
template <typename At, typename Sync>
__device__ __forceinline__ void edge_row(const ExpertEdge& op, int row, const At& scaled_at, int thread,
                                         EdgeMemory& memory, const Sync& sync) {
  const int warp = thread / 32, lane = thread % 32;
  float *normed = memory.normed, *actions = memory.actions, *parts = memory.parts;
  if (thread < kMostActions) actions[thread] = 0;
  sync();
  float* x = op.residual + row * op.residual_pitch;
  if (op.finish) {
    const float sum = warp_sum(__ldcg(op.squares + row * kStatParts + lane));
    const float inverse = 1.0f / sqrtf(sum / static_cast<float>(kExpertWidth) + kExpertEps);
    const int c = 4 * thread;
    const float4 v = __ldcg(reinterpret_cast<const float4*>(x + c));
    const float4 scale = *reinterpret_cast<const float4*>(op.final_scale + c);
    const float4 shift = *reinterpret_cast<const float4*>(op.final_scale + kExpertWidth + c);
    *reinterpret_cast<float4*>(normed + c) =
        make_float4(v.x * inverse * (1.0f + scale.x) + shift.x, v.y * inverse * (1.0f + scale.y) + shift.y,
                    v.z * inverse * (1.0f + scale.z) + shift.z, v.w * inverse * (1.0f + scale.w) + shift.w);
    sync();
    for (int o0 = 2 * warp; o0 < op.actions_dim; o0 += 2 * kEdgeWarps) {  // two outputs at a time
      float4 weights[2][kExpertWidth / 128];
#pragma unroll
      for (int e = 0; e < 2; ++e)
#pragma unroll
        for (int i = 0; i < kExpertWidth / 128; ++i)
          weights[e][i] =
              four_weights(op.out, op.out_weight, feature_row(op.out, o0 + e) + 128 * i + 4 * lane);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int o = o0 + e;
        float dot = 0;
#pragma unroll
        for (int i = 0; i < kExpertWidth / 128; ++i) {
          const float4 b = reinterpret_cast<const float4*>(normed + 128 * i)[lane], a = weights[e][i];
          dot += a.x * b.x + a.y * b.y + (a.z * b.z + a.w * b.w);
        }
        dot = warp_sum(dot);
        if (lane == 0 && o < op.actions_dim) {
          dot += op.out_bias[o];
          op.velocity[row * op.velocity_pitch + o] = dot;
          float* action = op.actions + row * op.actions_pitch + o;
          *action = actions[o] = *action + op.dt * dot;
        }
      }
    }
  } else if (thread < op.actions_dim) {
    actions[thread] = op.actions[row * op.actions_pitch + thread];
  }
  sync();
  if (!op.begin) return;
  // Eight lanes read a feature's weights side by side and add up; what they make meets in shared memory.
  constexpr int kAtOnce = 8;
  const int part = lane % 8;
  for (int c0 = 0; c0 < op.actions_dim; c0 += 32) {
    const int c = c0 + 4 * part;
    const bool there = c < op.actions_dim;  // rows are padded with zeros, and so are the actions
    const float4 a = there ? make_float4(actions[c], actions[c + 1], actions[c + 2], actions[c + 3])
                           : make_float4(0, 0, 0, 0);
    for (int f0 = 128 * warp + lane / 8; f0 < 128 * (warp + 1); f0 += 4 * kAtOnce) {
      float4 w[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        w[i] = there ? four_weights(op.in, op.in_weight, feature_row(op.in, f0 + 4 * i) + c)
                     : make_float4(0, 0, 0, 0);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        float dot = fmaf(w[i].x, a.x, fmaf(w[i].y, a.y, fmaf(w[i].z, a.z, w[i].w * a.w)));
#pragma unroll
        for (int step = 4; step > 0; step /= 2) dot += __shfl_xor_sync(~0u, dot, step);
        if (part == 0) normed[f0 + 4 * i] = c0 == 0 ? dot : normed[f0 + 4 * i] + dot;
      }
    }
  }
  sync();
  float v[4], squares = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = normed[4 * thread + i] + op.in_bias[4 * thread + i];
#pragma unroll
  for (int i = 0; i < 4; ++i) squares += v[i] * v[i];
  const float4 scale = *reinterpret_cast<const float4*>(op.next_scale + 4 * thread);
  *reinterpret_cast<float4*>(x + 4 * thread) = make_float4(v[0], v[1], v[2], v[3]);
  *reinterpret_cast<uint2*>(op.scaled + scaled_at(4 * thread)) =
      make_uint2(pack_bf16(v[0] * (1.0f + scale.x), v[1] * (1.0f + scale.y)),
                 pack_bf16(v[2] * (1.0f + scale.z), v[3] * (1.0f + scale.w)));
  squares = warp_sum(squares);
  if (lane == 0) parts[warp] = squares;
  sync();
  if (thread < kStatParts) op.squares[row * kStatParts + thread] = thread < kEdgeWarps ? parts[thread] : 0.0f;
}

}  // namespace servoflow::ops::cuda
