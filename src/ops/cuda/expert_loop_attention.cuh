// The attention of the loop: a head per cluster, an eighth of the keys per block. Keys are the instruction's
// rows and the queries its width; then columns of the values are, and rows of queries again the width. A warp
// has sixteen of the prefix's keys, then 16 columns of either half of its warpgroup's. Behind the prefix come
// the suffix's keys, which other clusters make meanwhile, a few for each block.
#pragma once

#include "ops/cuda/attention_wgmma.cuh"
#include "ops/cuda/expert_loop_compute.cuh"

namespace servoflow::ops::cuda::loop {

// A thread has 14 values, of rows 8 j + 2 (lane % 4) and the next for j = 0 … 6, and its warp 8 of each, by
// lane / 4. Joined, the thread has two: of rows 8 (lane / 4) + 2 (lane % 4) and the next.
template <int kHalf, typename Join>
__device__ __forceinline__ void halve(float (&v)[16], int lane, const Join& join) {
  const bool upper = (lane & 2 * kHalf) != 0;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float give = upper ? v[i] : v[i + kHalf], keep = upper ? v[i + kHalf] : v[i];
    v[i] = join(keep, __shfl_xor_sync(~0u, give, 2 * kHalf));
  }
}
template <typename Join>
__device__ __forceinline__ float2 over_keys(const float (&values)[14], float nothing, int lane,
                                            const Join& join) {
  float v[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) v[i] = i < 14 ? values[i] : nothing;
  halve<8>(v, lane, join);
  halve<4>(v, lane, join);
  halve<2>(v, lane, join);
  return make_float2(v[0], v[1]);
}

__device__ __forceinline__ void Computer::attention(const Request& r, int request) {
  forget();
  const int eighth = lane / 4;
  const auto most_of = [](float a, float b) { return fmaxf(a, b); };
  const auto sum_of = [](float a, float b) { return a + b; };
  int* maxima = reinterpret_cast<int*>(shared + kMaximaAt);
  float* shrink = reinterpret_cast<float*>(shared + kShrinkAt);
  float* totals = reinterpret_cast<float*>(shared + kTotalsAt);
  const float factor = op.scale * kLog2E;

  // ---- the prefix's values, which are taken while the scores are made: 16 columns of two halves, by 32 keys
  const int count = r.keys_of(rank);
  constexpr int kAtOnce = 3;  // chunks; a fourth comes behind them
  std::uint32_t values[kAtOnce][2][2][4];
  const auto take_values = [&](int c, std::uint32_t(&v)[2][2][4]) {
    const Ring at = ring.ahead(r.chunks + c);
    const std::uint32_t from =
        base + at.at() +
        static_cast<std::uint32_t>(2 * warpgroup * kBoxBytes + (lane / 16 * 8 + lane % 8) * 128 +
                                   ((2 * (warp % 4) + lane / 8 % 2) ^ lane % 8) * 16);
    barrier_wait(barriers.full(at.slot), at.parity);
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int t = 0; t < 2; ++t)
        load_matrix_transposed(v[k][t], from + static_cast<std::uint32_t>(16 * k * 128 + t * kBoxBytes));
    __syncwarp();
    give_back(at.slot, 1);
    // What is multiplied by nothing must be a number, and behind the prefix's last key nobody knows what
    // lies.
    if ((c + 1) * kChunkKeys > count)
#pragma unroll
      for (int k = 0; k < 2; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int left = count - (c * kChunkKeys + 16 * k + i / 2 * 8 + 2 * quad);
          const std::uint32_t there = left >= 2 ? 0xffffffffu : left == 1 ? 0xffffu : 0u;
          v[k][0][i] &= there;
          v[k][1][i] &= there;
        }
  };

  // ---- scores of the prefix's keys
  const int chunk = warp / 2, key0 = chunk * kChunkKeys + warp % 2 * 16;
  const bool present = chunk < r.chunks;
  float s[28];
  {
    // A warp without keys multiplies what is left of the rows that its warpgroup has waited for: nobody
    // writes there now.
    std::uint32_t k[16][4];
    const Ring keys = ring.ahead(present ? chunk : 0);
    if (present) barrier_wait(barriers.full(keys.slot), keys.parity);
    const std::uint32_t from = base +
                               (present          ? keys.at()
                                : warpgroup == 0 ? kWeightsAt
                                                 : kRowsLeft) +
                               static_cast<std::uint32_t>((warp % 2 * 16 + lane % 16) * 128);
    std::uint32_t piece[4];
#pragma unroll
    for (int c = 0; c < 4; ++c)
      piece[c] = from + static_cast<std::uint32_t>(((2 * c + lane / 16) ^ lane % 8) * 16);
#pragma unroll
    for (int c = 0; c < 16; ++c) load_matrix(k[c], piece[c % 4] + c / 4 * kBoxBytes);
    __syncwarp();
    if (present) give_back(keys.slot, 4);
    barrier_wait_cluster(barriers.queries(), queries_parity);
    queries_parity ^= 1;
    fence_async();
    const std::uint64_t q = core_descriptor(base + kQueriesAt, kQueryGroup);
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < 16; ++c) {
      if (c == 0) {
        wgmma_of_registers_first(s, k[c], q);
      } else {
        wgmma_of_registers(s, k[c], q + 16 * c);
      }
    }
    wgmma_commit();
#pragma unroll
    for (int c = 0; c < kAtOnce; ++c) {
      if (c < r.chunks) {
        take_values(c, values[c]);
      } else {
#pragma unroll
        for (int i = 0; i < 16; ++i) values[c][i / 8][i / 4 % 2][i % 4] = 0;
      }
    }
    wgmma_wait<0>();
    settled(s);
  }
  // Keys that are not there weigh nothing.
  float v[14];
  if (key0 + 16 > count)
#pragma unroll
    for (int i = 0; i < 28; ++i) s[i] = key0 + eighth + i % 4 / 2 * 8 < count ? s[i] : -INFINITY;
#pragma unroll
  for (int i = 0; i < 14; ++i) v[i] = fmaxf(s[i / 2 * 4 + i % 2], s[i / 2 * 4 + 2 + i % 2]);
  const float2 most = over_keys(v, kLeast, lane, most_of);
  if (eighth < 7) {
    atomicMax(maxima + 8 * eighth + 2 * quad, ordered(most.x));
    atomicMax(maxima + 8 * eighth + 2 * quad + 1, ordered(most.y));
  }
  compute_sync();
#pragma unroll
  for (int j = 0; j < 7; ++j) {
    const int2 m = *reinterpret_cast<const int2*>(maxima + 8 * j + 2 * quad);
    const float m0 = -number(m.x) * factor, m1 = -number(m.y) * factor;
    s[4 * j] = exp2_fast(fmaf(s[4 * j], factor, m0));
    s[4 * j + 1] = exp2_fast(fmaf(s[4 * j + 1], factor, m1));
    s[4 * j + 2] = exp2_fast(fmaf(s[4 * j + 2], factor, m0));
    s[4 * j + 3] = exp2_fast(fmaf(s[4 * j + 3], factor, m1));
    v[2 * j] = s[4 * j] + s[4 * j + 2];
    v[2 * j + 1] = s[4 * j + 1] + s[4 * j + 3];
  }
  if (present || chunk < kAtOnce) {
    // [row][8 keys], a matrix of eight by eight from every fragment.
    const std::uint32_t to = base + kWeightsAt +
                             static_cast<std::uint32_t>(lane / 16 * kWeightGroup +
                                                        (2 * warp + lane / 8 % 2) * 128 + lane % 8 * 16);
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const int next = j < 6 ? j + 1 : j;  // an eighth group is room only
      store_matrix_transposed(to + static_cast<std::uint32_t>(j * kWeightGroup),
                              pack_bf16(s[4 * j], s[4 * j + 1]), pack_bf16(s[4 * j + 2], s[4 * j + 3]),
                              pack_bf16(s[4 * next], s[4 * next + 1]),
                              pack_bf16(s[4 * next + 2], s[4 * next + 3]));
    }
  }
  *reinterpret_cast<float2*>(totals + warp * 64 + 8 * eighth + 2 * quad) = over_keys(v, 0.0f, lane, sum_of);
  fence_async();
  compute_sync();

  // ---- times the prefix's values
  float o[2][28] = {};
  const std::uint64_t weights = core_descriptor(base + kWeightsAt, kWeightGroup);
  const auto multiply_values = [&](int c, const std::uint32_t(&v)[2][2][4]) {
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int t = 0; t < 2; ++t) wgmma_of_registers(o[t], v[k][t], weights + 4 * 8 * c + 16 * k);
  };
  wgmma_fence();
#pragma unroll
  for (int c = 0; c < kAtOnce; ++c) multiply_values(c, values[c]);
  wgmma_commit();
  wgmma_wait<0>();
  if (r.chunks > kAtOnce) {
    take_values(kAtOnce, values[0]);
    wgmma_fence();
    multiply_values(kAtOnce, values[0]);
    wgmma_commit();
    wgmma_wait<0>();
  }
  settled(o[0]);
  settled(o[1]);
  ring.advance(2 * r.chunks);

  // ---- the suffix's keys, of eight rows by each warp but the last
  wait_rows(0);
  rows_parity ^= 1;
  if (warp < r.groups) {
    float parts[4][4] = {};
    const std::uint32_t keys = base + kSuffixAt + static_cast<std::uint32_t>(lane % 8 * 128);
    const std::uint32_t queries =
        base + kQueriesAt + static_cast<std::uint32_t>(warp * kQueryGroup + lane / 8 * 128 + lane % 8 * 16);
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      std::uint32_t k[4], q[4];
      load_matrix(k, keys + static_cast<std::uint32_t>(c / 2 * kSuffixKeys * 128 +
                                                       ((c % 2 * 4 + lane / 8) ^ lane % 8) * 16));
      load_matrix(q, queries + c * 512);
      const std::uint32_t first[4] = {k[0], 0, k[1], 0}, second[4] = {k[2], 0, k[3], 0};
      mma(parts[c % 2 * 2], first, q[0], q[1]);
      mma(parts[c % 2 * 2 + 1], second, q[2], q[3]);
    }
    const int here = min(r.suffix_keys, r.s.rows - rank * r.suffix_keys);
    const int2 before = *reinterpret_cast<const int2*>(maxima + 8 * warp + 2 * quad);
    float weight[2], largest[2], left[2], total[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float score = eighth < here ? parts[0][e] + parts[1][e] + (parts[2][e] + parts[3][e]) : -INFINITY;
      const float old = number(e == 0 ? before.x : before.y);
      float m = score;
#pragma unroll
      for (int step = 4; step < 32; step *= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, step));
      largest[e] = fmaxf(old, m);
      const float shift = -largest[e] * factor;
      left[e] = exp2_fast(fmaf(old, factor, shift));
      weight[e] = exp2_fast(fmaf(score, factor, shift));
      float sum = weight[e];
#pragma unroll
      for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
      total[e] = sum;
    }
    float2 prefix = make_float2(0, 0);
#pragma unroll
    for (int w = 0; w < 8; ++w) {
      const float2 part = *reinterpret_cast<const float2*>(totals + w * 64 + 8 * warp + 2 * quad);
      prefix.x += part.x;
      prefix.y += part.y;
    }
    total[0] += prefix.x * left[0];
    total[1] += prefix.y * left[1];
    store_matrix_transposed(base + kSuffixWeightsAt + static_cast<std::uint32_t>(warp * 128 + lane % 8 * 16),
                            pack_bf16(weight[0], weight[1]));
    if (eighth == 0) *reinterpret_cast<float2*>(shrink + 8 * warp + 2 * quad) = make_float2(left[0], left[1]);
    const std::uint32_t remote = in_rank(base, eighth);
    send_quad(remote + kReceivedTotals + rank * kRowTotals + (8 * warp + 2 * quad) * 8,
              remote + (barriers.told() - base), __float_as_uint(largest[0]), __float_as_uint(total[0]),
              __float_as_uint(largest[1]), __float_as_uint(total[1]));
  }
  compute_sync();
#pragma unroll
  for (int j = 0; j < 7; ++j) {
    const float2 left = *reinterpret_cast<const float2*>(shrink + 8 * j + 2 * quad);
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      o[t][4 * j] *= left.x;
      o[t][4 * j + 1] *= left.y;
      o[t][4 * j + 2] *= left.x;
      o[t][4 * j + 3] *= left.y;
    }
  }
  {
    std::uint32_t a[4];
    load_matrix_transposed(
        a, base + kSuffixAt +
               static_cast<std::uint32_t>(kSuffixKeys * (kKeyPitch + (2 * warpgroup + lane / 16) * 128) +
                                          lane % 8 * 128 + ((warp % 4 * 2 + lane / 8 % 2) ^ lane % 8) * 16));
    const int left = min(r.suffix_keys, r.s.rows - rank * r.suffix_keys) - 2 * quad;
    const std::uint32_t there = left >= 2 ? 0xffffffffu : left == 1 ? 0xffffu : 0u;
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] &= there;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      std::uint32_t b[4];
      load_matrix(
          b, base + kSuffixWeightsAt + static_cast<std::uint32_t>((4 * i + lane / 8) * 128 + lane % 8 * 16));
#pragma unroll
      for (int j = 4 * i; j < 4 * i + 4 && j < 7; ++j)
#pragma unroll
        for (int t = 0; t < 2; ++t)
          mma_of_eight(reinterpret_cast<float(&)[4]>(o[t][4 * j]), a[2 * t], a[2 * t + 1], b[j - 4 * i]);
    }
  }

  // ---- the ranks' sums meet: 32 columns of all rows at each
  const int pairs = pairs_of_groups(r);
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const std::uint32_t remote = in_rank(base, 4 * warpgroup + 2 * t + warp % 4 / 2);
    const std::uint32_t barrier = remote + (barriers.received() - base), slot = warp % 2 * 32 + lane;
    const std::uint32_t to = remote + kReceived + rank * kSumBytes + slot * 16;
    const auto pair_of = [&](int i) { return pack_bf16(o[t][2 * i], o[t][2 * i + 1]); };
#pragma unroll
    for (int p = 0; p < 3; ++p)
      if (p < pairs)
        send_quad(to + p * 1024, barrier, pair_of(4 * p), pair_of(4 * p + 1), pair_of(4 * p + 2),
                  pair_of(4 * p + 3));
    if (r.groups == 7)
      send_pair(remote + kReceived + rank * kSumBytes + 3 * 1024 + slot * 8, barrier,
                __uint_as_float(pair_of(12)), __uint_as_float(pair_of(13)));
  }
  // What each rank's sums count for is worked out while they are under way.
  barrier_wait_cluster(barriers.told(), told_parity);
  told_parity ^= 1;
  if (thread < 8 * r.groups) {
    float2 of[kLoopRanks];
    float largest = kLeast, whole = 0;
#pragma unroll
    for (int i = 0; i < kLoopRanks; ++i) {
      of[i] = *reinterpret_cast<const float2*>(shared + kReceivedTotals + i * kRowTotals + thread * 8);
      largest = fmaxf(largest, of[i].x);
    }
#pragma unroll
    for (int i = 0; i < kLoopRanks; ++i) {
      of[i].x = exp2_fast((of[i].x - largest) * factor);
      whole += of[i].x * of[i].y;
    }
    const float inverse = 1.0f / whole;
#pragma unroll
    for (int i = 0; i < kLoopRanks; ++i) totals[i * 64 + thread] = of[i].x * inverse;
  }
  compute_sync();
  barrier_wait_cluster(barriers.received(), received_parity);
  received_parity ^= 1;
  const int part = thread / 64, slot = thread % 64;
  if (part < pairs || (part == 3 && r.groups == 7)) {
    float sum[4][2] = {};  // [group][column, 8 columns on][row]
#pragma unroll
    for (int i = 0; i < kLoopRanks; ++i) {
      const std::uint8_t* from = shared + kReceived + i * kSumBytes + part * 1024;
      uint4 words = make_uint4(0, 0, 0, 0);
      if (part < 3) {
        words = *reinterpret_cast<const uint4*>(from + slot * 16);
      } else {
        const uint2 odd = *reinterpret_cast<const uint2*>(from + slot * 8);
        words.x = odd.x;
        words.y = odd.y;
      }
      const float2 first = *reinterpret_cast<const float2*>(totals + i * 64 + 16 * part + 2 * quad);
      const float2 second =
          *reinterpret_cast<const float2*>(totals + i * 64 + (16 * part + 8) % 64 + 2 * quad);
      const std::uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float2 f = k < 2 ? first : second;
        sum[k][0] += f.x * low_of(word[k]);
        sum[k][1] += f.y * high_of(word[k]);
      }
    }
    // Of two neighbouring columns one thread takes the first row, the other the second.
    const bool odd = eighth % 2 == 1;
    __nv_bfloat16* to =
        op.attended + static_cast<std::int64_t>(request) * kLoopRows * kExpertHeads * kExpertHeadDim;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float other = __shfl_xor_sync(~0u, odd ? sum[k][0] : sum[k][1], 4);
      const int token = 16 * part + k / 2 * 8 + 2 * quad + (odd ? 1 : 0);
      const int column = cluster * kExpertHeadDim + rank * 32 + slot / 32 * 16 + k % 2 * 8 + (eighth & ~1);
      if (token < r.s.rows)
        *reinterpret_cast<std::uint32_t*>(to + loop_at(token, column)) =
            odd ? pack_bf16(other, sum[k][1]) : pack_bf16(sum[k][0], other);
    }
  }
  finish(counter(op, request, kAttended + cluster));
}

}  // namespace servoflow::ops::cuda::loop
