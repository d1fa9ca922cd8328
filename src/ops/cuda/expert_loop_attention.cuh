// The attention of the loop: a head per cluster, an eighth of the keys per block. Of the prefix's keys a warp has every
// other sixteen for 16 rows, then half the columns of their values; behind them come the suffix's keys, which other
// clusters make meanwhile, a few for each block.
#pragma once

#include "ops/cuda/expert_loop_compute.cuh"

namespace servoflow::ops::cuda::loop {

__device__ __forceinline__ void Computer::attention(const Request& r, int request) {
  constexpr int kMostChunks = kLoopKeys / kChunkKeys;
  forget();
  const int slab = warp % 4 * 16, half = warp / 4;
  const bool present = slab < r.s.rows;
  // Two warps share a slab of rows.
  const auto slab_sync = [&] { asm volatile("bar.sync %0, 64;" ::"r"(2 + warp % 4) : "memory"); };

  barrier_wait_cluster(barriers.queries(), queries_parity);
  queries_parity ^= 1;
  SF_STAMP(1, 1);
  std::uint32_t q[16][4];
#pragma unroll
  for (int c = 0; c < 16; ++c)
    load_matrix(q[c], base + kQueriesAt +
                          static_cast<std::uint32_t>((slab / 8 + lane / 8 % 2) * kGroupBytes +
                                                     (2 * c + lane / 16) * 128 + lane % 8 * 16));
  const auto score = [&](std::uint32_t first, float(&out)[4]) {  // eight keys, one a row
    first += static_cast<std::uint32_t>(lane % 8 * kKeyPitch + lane / 8 * 16);
    float parts[4][4] = {};
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      std::uint32_t b[4];
      load_matrix(b, first + c * 64);
      mma(parts[c % 2 * 2], q[2 * c], b[0], b[1]);
      mma(parts[c % 2 * 2 + 1], q[2 * c + 1], b[2], b[3]);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) out[e] = parts[0][e] + parts[1][e] + (parts[2][e] + parts[3][e]);
  };
  float p[2 * kMostChunks][4];
  Ring keys = ring;
#pragma unroll
  for (int chunk = 0; chunk < kMostChunks; ++chunk) {
    if (chunk >= r.chunks) break;
    barrier_wait(barriers.full(keys.slot), keys.parity);
    if (present)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        score(base + keys.at() + static_cast<std::uint32_t>((16 * half + 8 * i) * kKeyPitch), p[2 * chunk + i]);
    __syncwarp();
    give_back(keys.slot, 1);
    keys.advance(1);
  }
  SF_STAMP(1, 2);

  // Keys that are not there weigh nothing.
  const float factor = op.scale * kLog2E;
  float most[2] = {-1e30f, -1e30f}, total[2] = {};
  const auto weigh = [&](float(&scores)[4], int key0, int count, float(&largest)[2]) {
    // of these eight keys, `count` from key0 are there
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      scores[e] = key0 + 2 * quad + e % 2 < count ? scores[e] * factor : -INFINITY;
      largest[e / 2] = fmaxf(largest[e / 2], scores[e]);
    }
  };
  const auto over_quad = [](float v) {  // the largest of four neighbouring threads
    v = fmaxf(v, __shfl_xor_sync(~0u, v, 1));
    return fmaxf(v, __shfl_xor_sync(~0u, v, 2));
  };
  const auto sum_of_quad = [](float v) {
    v += __shfl_xor_sync(~0u, v, 1);
    return v + __shfl_xor_sync(~0u, v, 2);
  };
  const int prefix_count = min(r.prefix_keys, r.s.past - rank * r.prefix_keys);
  float o[16][4] = {};
  float* maxima = reinterpret_cast<float*>(shared + kMaximaAt);
  if (present) {
#pragma unroll
    for (int chunk = 0; chunk < kMostChunks; ++chunk)
      if (chunk < r.chunks)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          weigh(p[2 * chunk + i], chunk * kChunkKeys + 16 * half + 8 * i, prefix_count, most);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      most[e] = over_quad(most[e]);
      if (quad == 0) maxima[(slab + lane / 4 + 8 * e) * 2 + half] = most[e];
    }
    slab_sync();
    auto* weights = reinterpret_cast<__nv_bfloat16*>(shared + kWeightsAt);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int at = slab + lane / 4 + 8 * e;
      const float2 m = *reinterpret_cast<const float2*>(maxima + at * 2);
      most[e] = fmaxf(m.x, m.y);
#pragma unroll
      for (int chunk = 0; chunk < kMostChunks; ++chunk)
        if (chunk < r.chunks)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float(&scores)[4] = p[2 * chunk + i];
            const float w0 = exp2f(scores[2 * e] - most[e]), w1 = exp2f(scores[2 * e + 1] - most[e]);
            total[e] += w0 + w1;
            *reinterpret_cast<std::uint32_t*>(weights + at * kWeightPitch + chunk * kChunkKeys + 16 * half + 8 * i +
                                              2 * quad) = pack_bf16(w0, w1);
          }
      total[e] = sum_of_quad(total[e]);
      if (quad == 0) maxima[kTile * 2 + at * 2 + half] = total[e];
    }
    slab_sync();
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float2 t = *reinterpret_cast<const float2*>(maxima + kTile * 2 + (slab + lane / 4 + 8 * e) * 2);
      total[e] = t.x + t.y;
    }
  }
  Ring at = ring.ahead(r.chunks);
#pragma unroll 1
  for (int chunk = 0; chunk < r.chunks; ++chunk, at.advance(1)) {
    barrier_wait(barriers.full(at.slot), at.parity);
    if (present)
#pragma unroll
      for (int k = 0; k < 2; ++k) {  // sixteen keys
        std::uint32_t a[4];
        load_matrix(a, base + kWeightsAt +
                           static_cast<std::uint32_t>(((slab + lane % 16) * kWeightPitch + chunk * kChunkKeys +
                                                       16 * k + lane / 16 * 8) *
                                                      2));
        const std::uint32_t values =
            base + at.at() +
            static_cast<std::uint32_t>((16 * k + lane % 16) * kKeyPitch + (half * 128 + lane / 16 * 8) * 2);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          std::uint32_t b[4];
          load_matrix_transposed(b, values + j * 32);
          mma(o[2 * j], a, b[0], b[1]);
          mma(o[2 * j + 1], a, b[2], b[3]);
        }
      }
    __syncwarp();
    give_back(at.slot, 1);
  }
  ring = at;
  SF_STAMP(1, 3);

  // The suffix's keys. Both warps of a slab weigh them for themselves.
  wait_rows(0);
  rows_parity ^= 1;
  SF_STAMP(1, 4);
  if (present) {
    float s[4], largest[2] = {most[0], most[1]};
    score(base + kSuffixAt, s);
    weigh(s, 0, min(r.suffix_keys, r.s.rows - rank * r.suffix_keys), largest);
    float shrink[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      largest[e] = over_quad(largest[e]);
      shrink[e] = exp2f(most[e] - largest[e]);
      most[e] = largest[e];
      s[2 * e] = exp2f(s[2 * e] - most[e]);
      s[2 * e + 1] = exp2f(s[2 * e + 1] - most[e]);
      total[e] = total[e] * shrink[e] + sum_of_quad(s[2 * e] + s[2 * e + 1]);
    }
    const std::uint32_t a0 = pack_bf16(s[0], s[1]), a1 = pack_bf16(s[2], s[3]);
    const std::uint32_t values =
        base + kSuffixAt +
        static_cast<std::uint32_t>((kSuffixKeys + lane % 8) * kKeyPitch + (half * 128 + lane / 8 * 8) * 2);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      std::uint32_t b[4];
      load_matrix_transposed(b, values + j * 64);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float(&d)[4] = o[4 * j + i];
#pragma unroll
        for (int e = 0; e < 4; ++e) d[e] *= shrink[e / 2];
        mma_of_eight(d, a0, a1, b[i]);
      }
    }
    // 32 columns for each rank: [row][quad][4] pairs.
#pragma unroll
    for (int d = 0; d < 4; ++d) {
      const std::uint32_t remote = in_rank(base, 4 * half + d);
#pragma unroll
      for (int e = 0; e < 2; ++e)
        send_quad(remote + kReceived + (rank * kTile + slab + lane / 4 + 8 * e) * 64 + quad * 16,
                  remote + (barriers.received() - base), pack_bf16(o[4 * d][2 * e], o[4 * d][2 * e + 1]),
                  pack_bf16(o[4 * d + 1][2 * e], o[4 * d + 1][2 * e + 1]),
                  pack_bf16(o[4 * d + 2][2 * e], o[4 * d + 2][2 * e + 1]),
                  pack_bf16(o[4 * d + 3][2 * e], o[4 * d + 3][2 * e + 1]));
    }
    // Half of the ranks hear the largest and the total from either warp.
    const std::uint32_t remote = in_rank(base, 4 * half + quad);
#pragma unroll
    for (int e = 0; e < 2; ++e)
      send_pair(remote + kReceivedTotals + (rank * kTile + slab + lane / 4 + 8 * e) * 8,
                remote + (barriers.received() - base), most[e], total[e]);
  }
  barrier_wait_cluster(barriers.received(), received_parity);
  received_parity ^= 1;
#pragma unroll 1
  for (int token = thread / 8; token < r.s.rows; token += 32) {
    const int piece = thread % 8;
    float m[kLoopRanks], largest = -1e30f, whole = 0, sum[4] = {};
#pragma unroll
    for (int i = 0; i < kLoopRanks; ++i) {
      m[i] = reinterpret_cast<const float2*>(shared + kReceivedTotals)[i * kTile + token].x;
      largest = fmaxf(largest, m[i]);
    }
#pragma unroll
    for (int i = 0; i < kLoopRanks; ++i) {
      const float w = exp2f(m[i] - largest);
      whole += w * reinterpret_cast<const float2*>(shared + kReceivedTotals)[i * kTile + token].y;
      const uint2 part = reinterpret_cast<const uint2*>(shared + kReceived)[(i * kTile + token) * 8 + piece];
      sum[0] += w * low_of(part.x);
      sum[1] += w * high_of(part.x);
      sum[2] += w * low_of(part.y);
      sum[3] += w * high_of(part.y);
    }
    const float inverse = 1.0f / whole;
    __nv_bfloat16* to =
        op.attended + static_cast<std::int64_t>(request) * kLoopRows * kExpertHeads * kExpertHeadDim +
        tiled_at(token, cluster * kExpertHeadDim + rank * 32 + piece % 2 * 16 + piece / 2 * 2,
                 kExpertHeads * kExpertHeadDim);
    *reinterpret_cast<std::uint32_t*>(to) = pack_bf16(sum[0] * inverse, sum[1] * inverse);
    *reinterpret_cast<std::uint32_t*>(to + 64) = pack_bf16(sum[2] * inverse, sum[3] * inverse);
  }
  finish(counter(op, request, kAttended + cluster));
}

}  // namespace servoflow::ops::cuda::loop
