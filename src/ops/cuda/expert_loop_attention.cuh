// The attention of the loop: 32 (row, head) pairs per cluster, an eighth of the keys per block. A warp has 16
// pairs and every fourth group of eight keys, then 16 pairs and a quarter of the columns.
#pragma once

#include "ops/cuda/expert_loop_compute.cuh"

namespace servoflow::ops::cuda::loop {

__device__ __forceinline__ void Computer::attention(const Request& r, int request) {
  constexpr int kMostChunks = kLoopKeys / kChunkKeys;
  forget();
  announce(kLoopRanks * kTile * (64 + 8));
  const int slab = warp % 2 * 16, quarter = warp / 2;
  const int row0 = cluster * kTile, rows = r.s.rows * kExpertHeads;

  wait_rows(0);
  std::uint32_t q[16][4];
#pragma unroll
  for (int c = 0; c < 16; ++c)
    load_matrix(q[c], base + static_cast<std::uint32_t>((slab + lane % 16) * kKeyPitch +
                                                        (16 * c + lane / 16 * 8) * 2));
  float p[kMostChunks + 1][4];                                   // the last: the suffix's eight keys
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
  Ring keys = ring;
#pragma unroll
  for (int chunk = 0; chunk < kMostChunks; ++chunk) {
    if (chunk >= r.chunks) break;
    barrier_wait(barriers.full(keys.slot), keys.parity);
    score(base + keys.at() + static_cast<std::uint32_t>(8 * quarter * kKeyPitch), p[chunk]);
    __syncwarp();
    give_back(keys.slot, 1);
    keys.advance(1);
  }
  wait_rows(1);
  if (quarter == 0) score(base + kSuffixAt, p[kMostChunks]);

  // Keys that are not there weigh nothing.
  const float factor = op.scale * kLog2E;
  float most[2] = {-1e30f, -1e30f}, total[2] = {};
  const auto weigh = [&](float(&scores)[4], int key0,
                         int count) {  // of these eight keys, `count` from key0 are there
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      scores[e] = key0 + 2 * quad + e % 2 < count ? scores[e] * factor : -INFINITY;
      most[e / 2] = fmaxf(most[e / 2], scores[e]);
    }
  };
  const int prefix_count = min(r.prefix_keys, r.s.past - rank * r.prefix_keys);
#pragma unroll
  for (int chunk = 0; chunk < kMostChunks; ++chunk)
    if (chunk < r.chunks) weigh(p[chunk], chunk * kChunkKeys + 8 * quarter, prefix_count);
  if (quarter == 0) weigh(p[kMostChunks], 0, min(r.suffix_keys, r.s.rows - rank * r.suffix_keys));
  float* maxima = reinterpret_cast<float*>(shared + kMaximaAt);  // [32][4], then the totals [32][4]
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    most[e] = fmaxf(most[e], __shfl_xor_sync(~0u, most[e], 1));
    most[e] = fmaxf(most[e], __shfl_xor_sync(~0u, most[e], 2));
    if (quad == 0) maxima[(slab + lane / 4 + 8 * e) * 4 + quarter] = most[e];
  }
  compute_sync();
  auto* weights = reinterpret_cast<__nv_bfloat16*>(shared + kWeightsAt);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int at = slab + lane / 4 + 8 * e;
    const float4 m = *reinterpret_cast<const float4*>(maxima + at * 4);
    most[e] = fmaxf(fmaxf(m.x, m.y), fmaxf(m.z, m.w));
    const auto put = [&](const float(&scores)[4], int key0) {
      const float w0 = exp2f(scores[2 * e] - most[e]), w1 = exp2f(scores[2 * e + 1] - most[e]);
      total[e] += w0 + w1;
      *reinterpret_cast<std::uint32_t*>(weights + at * kWeightPitch + key0 + 2 * quad) = pack_bf16(w0, w1);
    };
#pragma unroll
    for (int chunk = 0; chunk < kMostChunks; ++chunk)
      if (chunk < r.chunks) put(p[chunk], chunk * kChunkKeys + 8 * quarter);
    if (quarter == 0) put(p[kMostChunks], kLoopKeys);
    if (quarter == 1)  // eight more that are none
      *reinterpret_cast<std::uint32_t*>(weights + at * kWeightPitch + kLoopKeys + 8 + 2 * quad) = 0;
    total[e] += __shfl_xor_sync(~0u, total[e], 1);
    total[e] += __shfl_xor_sync(~0u, total[e], 2);
    if (quad == 0) maxima[kTile * 4 + at * 4 + quarter] = total[e];
  }
  compute_sync();
  float o[8][4] = {};
  const auto add_values = [&](int key0, std::uint32_t values) {  // of sixteen keys
    std::uint32_t a[4];
    load_matrix(
        a, base + kWeightsAt +
               static_cast<std::uint32_t>(((slab + lane % 16) * kWeightPitch + key0 + lane / 16 * 8) * 2));
    values += static_cast<std::uint32_t>(lane % 16 * kKeyPitch + (quarter * 64 + lane / 16 * 8) * 2);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      std::uint32_t b[4];
      load_matrix_transposed(b, values + j * 32);
      mma(o[2 * j], a, b[0], b[1]);
      mma(o[2 * j + 1], a, b[2], b[3]);
    }
  };
  add_values(kLoopKeys, base + kSuffixAt + 16 * kKeyPitch);
  Ring at = ring.ahead(r.chunks);
#pragma unroll 1
  for (int chunk = 0; chunk < r.chunks; ++chunk, at.advance(1)) {
    barrier_wait(barriers.full(at.slot), at.parity);
#pragma unroll
    for (int k = 0; k < 2; ++k) add_values(chunk * kChunkKeys + 16 * k, base + at.at() + 16 * k * kKeyPitch);
    __syncwarp();
    give_back(at.slot, 1);
  }
  ring = at;
  rows_parity ^= 3;
  wait_until_all_may_send();
  const int tile_row = thread / 8, piece = thread % 8;
  {
    const float4 m = *reinterpret_cast<const float4*>(maxima + tile_row * 4);
    const float4 t = *reinterpret_cast<const float4*>(maxima + kTile * 4 + tile_row * 4);
    const std::uint32_t remote = in_rank(base, piece);
    send_pair(remote + kReceivedTotals + (rank * kTile + tile_row) * 8, remote + (barriers.received() - base),
              fmaxf(fmaxf(m.x, m.y), fmaxf(m.z, m.w)), t.x + t.y + (t.z + t.w));
  }

#pragma unroll
  for (int d = 0; d < 2; ++d) {  // 32 columns for each rank: [row][quad][4] pairs
    const std::uint32_t remote = in_rank(base, 2 * quarter + d);
#pragma unroll
    for (int e = 0; e < 2; ++e)
      send_quad(remote + kReceived + (rank * kTile + slab + lane / 4 + 8 * e) * 64 + quad * 16,
                remote + (barriers.received() - base), pack_bf16(o[4 * d][2 * e], o[4 * d][2 * e + 1]),
                pack_bf16(o[4 * d + 1][2 * e], o[4 * d + 1][2 * e + 1]),
                pack_bf16(o[4 * d + 2][2 * e], o[4 * d + 2][2 * e + 1]),
                pack_bf16(o[4 * d + 3][2 * e], o[4 * d + 3][2 * e + 1]));
  }
  barrier_wait_cluster(barriers.received(), received_parity);
  received_parity ^= 1;
  float m[kLoopRanks], largest = -1e30f, whole = 0;
#pragma unroll
  for (int i = 0; i < kLoopRanks; ++i) {
    m[i] = reinterpret_cast<const float2*>(shared + kReceivedTotals)[i * kTile + tile_row].x;
    largest = fmaxf(largest, m[i]);
  }
  float sum[4] = {};
#pragma unroll
  for (int i = 0; i < kLoopRanks; ++i) {
    const float w = exp2f(m[i] - largest);
    whole += w * reinterpret_cast<const float2*>(shared + kReceivedTotals)[i * kTile + tile_row].y;
    const uint2 part = reinterpret_cast<const uint2*>(shared + kReceived)[(i * kTile + tile_row) * 8 + piece];
    sum[0] += w * low_of(part.x);
    sum[1] += w * high_of(part.x);
    sum[2] += w * low_of(part.y);
    sum[3] += w * high_of(part.y);
  }
  if (row0 + tile_row < rows) {
    const float inverse = 1.0f / whole;
    const int token = (row0 + tile_row) / kExpertHeads, head = (row0 + tile_row) % kExpertHeads;
    __nv_bfloat16* to = op.attended +
                        static_cast<std::int64_t>(request) * kLoopRows * kExpertHeads * kExpertHeadDim +
                        tiled_at(token, head * kExpertHeadDim + rank * 32 + piece % 2 * 16 + piece / 2 * 2,
                                 kExpertHeads * kExpertHeadDim);
    *reinterpret_cast<std::uint32_t*>(to) = pack_bf16(sum[0] * inverse, sum[1] * inverse);
    *reinterpret_cast<std::uint32_t*>(to + 64) = pack_bf16(sum[2] * inverse, sum[3] * inverse);
  }
  finish(counter(op, request, kAttended + rank));
}

}  // namespace servoflow::ops::cuda::loop
