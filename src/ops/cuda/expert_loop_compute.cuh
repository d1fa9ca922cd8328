// The two warpgroups of the loop that compute. Rows are the instruction's 64, weights its width; a warpgroup
// takes every other chunk of the depth and the two add up in shared memory.
#pragma once

#include "ops/cuda/expert_loop_parts.cuh"

namespace servoflow::ops::cuda::loop {

struct Computer {
  const ExpertLoop& op;
  const Segment* segments;  // in shared memory
  std::uint8_t* shared;
  Barriers barriers;
  std::uint32_t base;
  int requests, block, cluster, rank, thread;
  Ring ring;
  std::uint32_t rows_parity = 0;  // a bit for each part
  std::uint32_t inverse_parity = 0, received_parity = 0, send_parity = 0, queries_parity = 0, told_parity = 0;
  int warp, lane, warpgroup, row,
      quad;  // row: of 64, the thread's first; quad: its columns are 2 quad and the next

  __device__ __forceinline__ Computer(const ExpertLoop& loop, const Segment* s, std::uint8_t* memory,
                                      Barriers b, std::uint32_t address, int count, int this_block,
                                      int this_thread)
      : op(loop),
        segments(s),
        shared(memory),
        barriers(b),
        base(address),
        requests(count),
        block(this_block),
        cluster(this_block / kLoopRanks),
        rank(this_block % kLoopRanks),
        thread(this_thread),
        ring(this_block),
        warp(this_thread / 32),
        lane(this_thread % 32),
        warpgroup(this_thread / 128),
        row(warp % 4 * 16 + lane / 4),
        quad(lane % 4) {}

  // What the compiler could work out before the loops would cost it every register there is: it is to forget.
  __device__ __forceinline__ void forget() {
    asm volatile(""
                 : "+r"(thread), "+r"(warp), "+r"(lane), "+r"(warpgroup), "+r"(row), "+r"(quad), "+r"(base),
                   "+r"(block), "+r"(cluster), "+r"(rank));
  }
  __device__ __forceinline__ Request request(int i) const { return Request(segments[i]); }
  __device__ __forceinline__ const float* modulation(int step, int site) const {  // scale, shift and gate
    return op.modulation + step * op.modulation_pitch + static_cast<std::int64_t>(site) * 3 * kExpertWidth;
  }
  __device__ __forceinline__ const float* shift(int step, int layer) const {
    return op.shift + (static_cast<std::int64_t>(step) * op.depth + layer) * (kExpertQkv + 2 * kExpertMlp);
  }
  __device__ __forceinline__ void wait_rows(int part) const {
    barrier_wait(barriers.rows(part), rows_parity >> part & 1);
  }
  // A chunk has eight arrivals: one of each warp that used it, or two of each of the four.
  __device__ __forceinline__ void give_back(int slot, int arrivals) const {
    if (lane < arrivals) barrier_arrive(barriers.empty(slot));
  }
  // A count waits behind the copies that are under way, so that the last chunk goes back after it. (To hold
  // more of them makes counting faster still, and the next task wait for its weights: slower in all.)
  int held = -1, held_arrivals = 0;
  __device__ __forceinline__ void give_back_held() {
    __syncwarp();
    if (held >= 0) give_back(held, held_arrivals);
    held = -1;
  }
  // The end of a task: what it wrote is counted, and its part of shared memory is free.
  __device__ __forceinline__ void finish(unsigned* first, unsigned* second = nullptr) {
    fence_async();
    compute_sync();
    if (thread == 32) barrier_arrive(barriers.done());
    if (thread == 0 && first != nullptr) count_one(first);
    if (thread == 64 && second != nullptr) count_one(second);
    give_back_held();
  }

  // sum += rows · weightsᵀ over this warpgroup's part of the depth: every other chunk, or half of each
  // (kHalves), which is slower where chunks wait for each other and faster where there are many. `piece`:
  // from 128 columns of a chunk's weights to the next, in 16 bytes. Loops stay loops: code that does not fit
  // the instruction cache costs more than they do.
  template <int kN, int kDepth, bool kHalves>
  __device__ __forceinline__ void multiply(float (&sum)[kN / 2], int chunks, std::uint64_t piece = 0) {
    constexpr int kStride = kHalves ? 1 : 2, kPart = kHalves ? kDepth / 2 : kDepth;
    const std::uint32_t offset = kHalves ? static_cast<std::uint32_t>(warpgroup * kPart * 16) : 0;
    Ring at = kHalves ? ring : ring.ahead(warpgroup);
    held_arrivals = kStride;
#pragma unroll 1
    for (int c = 0; c < chunks / kStride; ++c) {
      const int chunk = kHalves ? c : 2 * c + warpgroup;
      wait_rows(chunk * kDepth / 256);
      barrier_wait(barriers.full(at.slot), at.parity);
      const std::uint64_t a = core_descriptor(
          base + static_cast<std::uint32_t>(chunk * kDepth / 256 * kPartBytes + chunk * kDepth % 256 * 16) +
              offset,
          kGroupBytes);
      const std::uint64_t b = core_descriptor(base + at.at() + offset, 128 * 16);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kPart / 16; ++k) wgmma<kN>(sum, a + 16 * k, b + k / 8 * piece + 16 * (k % 8));
      wgmma_commit();
      if (c > 0) {
        wgmma_wait<1>();
        give_back(held, kStride);
      }
      held = at.slot;
      at.advance(kStride);
    }
    wgmma_wait<0>();
    ring.advance(chunks);
  }

  // For all the weight rows that a block may have, of which some have fewer.
  template <bool kHalves>
  __device__ __forceinline__ void multiply_most(float (&sum)[kMostWeights / 2], int chunks) {
    if (block < kSmallBlocks) {
      multiply<64, 128, kHalves>(reinterpret_cast<float(&)[32]>(sum), chunks);
    } else {
      multiply<kMostWeights, 128, kHalves>(sum, chunks);
    }
  }

  // The warpgroups exchange what they have: the first ends the first half of the groups of 16 weight rows,
  // the other the rest. Of a group a thread has, for rows `row` and `row` + 8, first and second feature of
  // two pairs.
  template <int kN>
  struct Ended {
    static constexpr int kGroups = kN / 16, kFirst = (kGroups + 1) / 2;
    float pair[kFirst][2][4];  // [group][row][first 0, second 0, first 1, second 1]
    int group0;
  };
  template <int kN, typename Between>
  __device__ __forceinline__ void add_up(const float (&sum)[kN / 2], Ended<kN>& out, const Between& between) {
    constexpr int kGroups = Ended<kN>::kGroups, kFirst = Ended<kN>::kFirst;
    auto* handed = reinterpret_cast<float4*>(shared + kHandedAt);
    const int t = thread % 128;
    out.group0 = warpgroup == 0 ? 0 : kFirst;
    compute_sync();  // nobody reads the rows any more
    between();
    const auto tile = [&](int i) {
      return make_float4(sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]);
    };
    if (warpgroup == 0) {
#pragma unroll
      for (int i = 2 * kFirst; i < 2 * kGroups; ++i) handed[i * 128 + t] = tile(i);
    } else {
#pragma unroll
      for (int i = 0; i < 2 * kFirst; ++i) handed[i * 128 + t] = tile(i);
    }
    compute_sync();
#pragma unroll
    for (int i = 0; i < kFirst; ++i) {
      const int theirs =
          kFirst + i < kGroups ? kFirst + i : kGroups - 1;  // the second's last may be one less
      const float4 first = warpgroup == 0 ? tile(2 * i) : tile(2 * theirs);
      const float4 second = warpgroup == 0 ? tile(2 * i + 1) : tile(2 * theirs + 1);
      const float4 a = handed[2 * (out.group0 + i) * 128 + t],
                   b = handed[(2 * (out.group0 + i) + 1) * 128 + t];
      out.pair[i][0][0] = first.x + a.x;
      out.pair[i][0][1] = second.x + b.x;
      out.pair[i][0][2] = first.y + a.y;
      out.pair[i][0][3] = second.y + b.y;
      out.pair[i][1][0] = first.z + a.z;
      out.pair[i][1][1] = second.z + b.z;
      out.pair[i][1][2] = first.w + a.w;
      out.pair[i][1][3] = second.w + b.w;
    }
  }
  __device__ __forceinline__ void wait_inverse(float (&inverse)[2]) {
    barrier_wait(barriers.inverse(), inverse_parity);
    inverse_parity ^= 1;
    const float* all = reinterpret_cast<const float*>(shared + kInverse);
    inverse[0] = all[row];
    inverse[1] = all[row + 8];
  }

  // ---- q, k and v of 16 packed rows per warpgroup, rotated: four neighbouring columns, of rows `row` and
  // `row` + 8. `between`: what is to be done once the task's rows are no longer read.
  template <typename Between>
  __device__ __forceinline__ void qkv(const Request& r, int step, int layer, uint2 (&out)[2],
                                      const Between& between) {
    forget();
    // The second warpgroup of a block with one group ends it, too, and nobody takes it.
    const int group = qkv_group(block) + (has_head(block) ? warpgroup : 0), head = group / 16,
              i0 = group % 16 * 8 + 2 * quad;
    const bool rotates = head <= kExpertHeads;
    float4 shifts;  // first 0, second 0, first 1, second 1
    {
      const float* s = shift(step, layer) + head * kExpertHeadDim;
      if (rotates) {
        const float2 a = __ldg(reinterpret_cast<const float2*>(s + i0)),
                     b = __ldg(reinterpret_cast<const float2*>(s + kExpertHeadDim / 2 + i0));
        shifts = make_float4(a.x, b.x, a.y, b.y);
      } else {
        shifts = __ldg(reinterpret_cast<const float4*>(s + 2 * i0));
      }
    }
    float2 cosine[2], sine[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      cosine[e] = make_float2(1, 1);
      sine[e] = make_float2(0, 0);
      if (rotates && row + 8 * e < r.s.rows) {
        const std::int64_t at = static_cast<std::int64_t>(r.s.past + row + 8 * e) * (kExpertHeadDim / 2) + i0;
        cosine[e] = __ldg(reinterpret_cast<const float2*>(op.qkv.cos + at));
        sine[e] = __ldg(reinterpret_cast<const float2*>(op.qkv.sin + at));
      }
    }
    take(shifts);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      take(cosine[e]);
      take(sine[e]);
    }
    float sum[16] = {};
    multiply<32, 256, false>(sum, kQkvChunks, has_head(block) ? 4 * 128 : 2 * 128);
    rows_parity ^= 15;
    if (has_head(block)) give_back_held();  // for keys and values
    Ended<32> ended;
    add_up<32>(sum, ended, between);
    float inverse[2];
    wait_inverse(inverse);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float(&v)[4] = ended.pair[0][e];
      const float a0 = v[0] * inverse[e] + shifts.x, b0 = v[1] * inverse[e] + shifts.y;
      const float a1 = v[2] * inverse[e] + shifts.z, b1 = v[3] * inverse[e] + shifts.w;
      const float2 p = turned(a0, b0, make_float2(cosine[e].x, sine[e].x));
      const float2 q = turned(a1, b1, make_float2(cosine[e].y, sine[e].y));
      out[e] = make_uint2(pack_bf16(p.x, p.y), pack_bf16(q.x, q.y));
    }
  }
  __device__ __forceinline__ void keys_and_values(const Request& r, int request, int step, int layer) {
    uint2 out[2];
    qkv(r, step, layer, out, [] {});
    const int group = key_group(block), column = group % (kKeyGroups / 2) * 16 + 4 * quad;
    if (warpgroup == 0) {
      auto* to =
          reinterpret_cast<__nv_bfloat16*>(static_cast<char*>(group < kKeyGroups / 2 ? op.qkv.k : op.qkv.v) +
                                           layer * op.layer_bytes) +
          op.qkv.cache_row(r.s.slot, 0, r.s.past) + column;
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (row + 8 * e < r.s.rows) *reinterpret_cast<uint2*>(to + (row + 8 * e) * kExpertHeadDim) = out[e];
    }
    finish(counter(op, request, kKeys + group % kLoopRanks));
  }
  // Queries go to every block of the cluster, as the rows of a product. Behind them this block's rows are
  // free for the suffix's keys and values, and for what the cluster sends.
  __device__ __forceinline__ void queries(const Request& r, int step, int layer) {
    uint2 out[2];
    qkv(r, step, layer, out, [&] {
      announce(kLoopRanks * 64 * (16 * pairs_of_groups(r) + (r.groups == 7 ? 8 : 0)));
      if (thread == 0) {
        barrier_expect(barriers.told(), static_cast<std::uint32_t>(kLoopRanks * 64 * r.groups));
        barrier_expect(barriers.queries(), static_cast<std::uint32_t>(r.s.rows * kExpertHeadDim * 2));
      }
      if (thread / 64 == 1) reinterpret_cast<int*>(shared + kMaximaAt)[thread % 64] = ordered(kLeast);
      fence_async();
      if (thread == 32) barrier_arrive(barriers.done());
    });
    // Two threads that have halves of the same eight columns exchange: one then has them of `row`, one of
    // `row` + 8.
    const bool odd = quad % 2 == 1;
    const uint2 mine = odd ? out[1] : out[0];
    uint2 other = odd ? out[0] : out[1];
    other.x = __shfl_xor_sync(~0u, other.x, 1);
    other.y = __shfl_xor_sync(~0u, other.y, 1);
    const int token = row + (odd ? 8 : 0);
    wait_until_all_may_send();
    if (token < r.s.rows) {
      const std::uint32_t place = kQueriesAt + token / 8 * kQueryGroup + token % 8 * 16 +
                                  ((2 * rank + warpgroup) * 2 + quad / 2) * 128;
#pragma unroll
      for (int i = 0; i < kLoopRanks; ++i) {
        const std::uint32_t remote = in_rank(base, (rank + i) % kLoopRanks);
        send_quad(remote + place, remote + (barriers.queries() - base), odd ? other.x : mine.x,
                  odd ? other.y : mine.y, odd ? mine.x : other.x, odd ? mine.y : other.y);
      }
    }
  }
  // Groups of eight rows that are sent two by two; the seventh goes alone.
  static __device__ __forceinline__ int pairs_of_groups(const Request& r) { return min(r.groups + 1, 7) / 2; }
  // Integers in the order of the numbers, and back.
  static __device__ __forceinline__ int ordered(float v) {
    const int i = __float_as_int(v);
    return i >= 0 ? i : i ^ 0x7FFFFFFF;
  }
  static __device__ __forceinline__ float number(int i) {
    return __int_as_float(i >= 0 ? i : i ^ 0x7FFFFFFF);
  }

  // ---- gate and up
  __device__ __forceinline__ void gate_up(const Request& r, int request, int step, int layer) {
    forget();
    constexpr int kN = kMostWeights;
    constexpr int kFirst = Ended<kN>::kFirst;
    const int group0 = gated_group(block) + warpgroup * kFirst;
    const float* s = shift(step, layer) + kExpertQkv + 8 * group0 + 2 * quad;
    float2 gate_shift[kFirst] = {}, up_shift[kFirst] = {};
#pragma unroll
    for (int i = 0; i < kFirst; ++i)
      if (warpgroup * kFirst + i < gated_groups(block)) {
        gate_shift[i] = __ldg(reinterpret_cast<const float2*>(s + 8 * i));
        up_shift[i] = __ldg(reinterpret_cast<const float2*>(s + kExpertMlp + 8 * i));
      }
#pragma unroll
    for (int i = 0; i < kFirst; ++i) {
      take(gate_shift[i]);
      take(up_shift[i]);
    }
    float sum[kN / 2] = {};
    multiply_most<true>(sum, kGatedChunks);
    rows_parity ^= 15;
    Ended<kN> ended;
    add_up<kN>(sum, ended, [] {});
    float inverse[2];
    wait_inverse(inverse);
    __nv_bfloat16* hidden = op.hidden + static_cast<std::int64_t>(request) * kLoopRows * kExpertMlp;
#pragma unroll
    for (int i = 0; i < kFirst; ++i)
      if (ended.group0 + i < gated_groups(block))
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int token = row + 8 * e;
          const float(&v)[4] = ended.pair[i][e];
          const float a = gelu(v[0] * inverse[e] + gate_shift[i].x) * (v[1] * inverse[e] + up_shift[i].x);
          const float b = gelu(v[2] * inverse[e] + gate_shift[i].y) * (v[3] * inverse[e] + up_shift[i].y);
          if (token < r.s.rows)
            *reinterpret_cast<std::uint32_t*>(
                hidden + loop_at(token, 8 * (gated_group(block) + ended.group0 + i) + 2 * quad)) =
                pack_bf16(a, b);
        }
    const int first = first_slice(block), last = last_slice(block);
    finish(counter(op, request, kHidden + first),
           last != first ? counter(op, request, kHidden + last) : nullptr);
  }

  // The cluster meets before its blocks send to each other: from here on this block's place for it is free.
  __device__ __forceinline__ void announce(int bytes) const {
    if (thread < kLoopRanks) barrier_arrive_at(barriers.may_send(), static_cast<std::uint32_t>(thread));
    if (thread == 0 && bytes > 0) barrier_expect(barriers.received(), static_cast<std::uint32_t>(bytes));
  }
  __device__ __forceinline__ void wait_until_all_may_send() {
    barrier_wait(barriers.may_send(), send_parity);
    send_parity ^= 1;
  }

  // ---- out and down: residual += gate * sum, and what the next norm needs. Rank r of the cluster ends rows
  // 8 r … 8 r + 7 of the cluster's columns, a warp each.
  __device__ __forceinline__ void into_rows(int chunks, const Request& r, int request, const float* gate,
                                            const float* next_scale) {
    forget();
    constexpr int kN = kMostWeights;
    const int groups = column_groups(cluster);
    const bool owns = rank < r.groups;
    announce(owns ? kLoopRanks * 8 * groups * 64 : 0);
    const int column = 16 * column_group(cluster) + 4 * lane;
    const bool ends = owns && lane < 4 * groups && 8 * rank + warp < r.s.rows;
    float4 factor = {}, scale = {};
    if (ends) {
      factor = __ldg(reinterpret_cast<const float4*>(gate + column));
      if (next_scale != nullptr) scale = __ldg(reinterpret_cast<const float4*>(next_scale + column));
    }
    take(factor);
    take(scale);
    float sum[kN / 2] = {};
    multiply_most<false>(sum, chunks);
    rows_parity ^= chunks == kOutChunks ? 1 : 3;
    const int token = 8 * rank + warp;
    float* residual = op.edge.residual + (r.s.row_begin + token) * op.edge.residual_pitch + column;
    float4 x = {};
    if (ends)
      x = __ldcg(reinterpret_cast<const float4*>(residual));  // on its way while the sums are added up
    Ended<kN> ended;
    add_up<kN>(sum, ended, [] {});
    wait_until_all_may_send();
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int to = 2 * (warp % 4) + e;  // the owner of these rows
      if (to < r.groups) {
        const std::uint32_t remote = in_rank(base, to);
        const std::uint32_t place = remote + kReceived + (rank * 8 + lane / 4) * 20 * 16 + quad * 16;
#pragma unroll
        for (int i = 0; i < Ended<kN>::kFirst; ++i)
          if (ended.group0 + i < groups) {
            const float(&v)[4] = ended.pair[i][e];
            send_quad(place + (ended.group0 + i) * 64, remote + (barriers.received() - base),
                      __float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                      __float_as_uint(v[3]));
          }
      }
    }
    if (owns) {
      barrier_wait_cluster(barriers.received(), received_parity);
      received_parity ^= 1;
      float square = 0;
      if (ends) {
        const float4* from = reinterpret_cast<const float4*>(shared + kReceived) + warp * 20 + lane;
        float4 total = from[0];
#pragma unroll
        for (int i = 1; i < kLoopRanks; ++i) {
          const float4 part = from[i * 8 * 20];
          total.x += part.x;
          total.y += part.y;
          total.z += part.z;
          total.w += part.w;
        }
        x.x += total.x * factor.x;
        x.y += total.y * factor.y;
        x.z += total.z * factor.z;
        x.w += total.w * factor.w;
        *reinterpret_cast<float4*>(residual) = x;
        square = x.x * x.x + x.y * x.y + (x.z * x.z + x.w * x.w);
        if (next_scale != nullptr)
          *reinterpret_cast<uint2*>(
              op.edge.scaled + static_cast<std::int64_t>(request) * kLoopRows * kExpertWidth +
              loop_at(token, column)) = make_uint2(pack_bf16(x.x * (1.0f + scale.x), x.y * (1.0f + scale.y)),
                                                   pack_bf16(x.z * (1.0f + scale.z), x.w * (1.0f + scale.w)));
      }
      square = warp_sum(square);
      if (lane == 0 && token < r.s.rows)
        op.edge.squares[(r.s.row_begin + token) * kStatParts + cluster] = square;
    }
    finish(owns ? counter(op, request, kColumns + rank) : nullptr);
  }

  // ---- softmax(q kᵀ scale) v of the cluster's head over this rank's keys; the ranks' results meet, each
  // ends 32 columns
  __device__ __forceinline__ void attention(const Request& r, int request);

  // ---- between steps: a row per block
  __device__ __forceinline__ void edge(int step) {
    forget();
    ExpertEdge e = op.edge;
    const int done = step - op.first;
    e.finish = done > 0;
    e.begin = done < op.steps;
    if (e.finish) e.final_scale = modulation(step - 1, 2 * op.depth);
    if (e.begin) e.next_scale = modulation(step, 0);
    auto& memory = *reinterpret_cast<EdgeMemory*>(shared);
    int before = 0;
    for (int i = 0; i < requests; ++i) {
      const Segment s = segments[i];
      const int first = (block - before % kLoopBlocks + kLoopBlocks) % kLoopBlocks;
      if (first < s.rows && e.finish) {
        if (thread < (s.rows + 7) / 8)
          wait_for_count(op, counter(op, i, kColumns + thread),
                         static_cast<unsigned>(kLoopClusters * 2 * op.depth * done));
        compute_sync();
      }
      for (int token = first; token < s.rows; token += kLoopBlocks) {
        edge_row(
            e, s.row_begin + token,
            [at = i * kLoopRows * kExpertWidth, token](int k) { return at + loop_at(token, k); }, thread,
            memory, [] { compute_sync(); });
        fence_async();
        compute_sync();
        if (thread == 0) count_one(counter(op, i, kEdges));
      }
      before += s.rows;
    }
  }

  __device__ __forceinline__ void run() {
    wait_for_inputs();
#pragma unroll 1
    for (int step = op.first;; ++step) {
      edge(step);
      if (step == op.first + op.steps) break;
#pragma unroll 1
      for (int layer = 0; layer < op.depth; ++layer) {
        if (has_head(block)) {
#pragma unroll 1
          for (int i = 0; i < requests; ++i) {
            queries(request(i), step, layer);
            attention(request(i), i);
          }
        } else if (has_qkv(block)) {
#pragma unroll 1
          for (int i = 0; i < requests; ++i) keys_and_values(request(i), i, step, layer);
        }
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
          const int site = 2 * layer + half;
          const float* gate = modulation(step, site) + 2 * kExpertWidth;
          const float* next = site + 1 < 2 * op.depth ? modulation(step, site + 1) : nullptr;
          if (half == 1)
#pragma unroll 1
            for (int i = 0; i < requests; ++i) gate_up(request(i), i, step, layer);
#pragma unroll 1
          for (int i = 0; i < requests; ++i)
            into_rows(half == 0 ? kOutChunks : kDownChunks, request(i), i, gate, next);
        }
      }
    }
  }
};

}  // namespace servoflow::ops::cuda::loop
