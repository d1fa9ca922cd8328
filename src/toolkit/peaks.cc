#include "toolkit/peaks.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#include "core/memory.h"

namespace servoflow::toolkit {
namespace {

using Clock = std::chrono::steady_clock;

// A kernel does `rounds` rounds and returns a value that depends on all of them, so that none can be left
// out.
using Kernel = float (*)(int rounds);

struct Arithmetic {
  Kernel kernel = nullptr;
  double operations_per_round = 0;
  const char* instruction = "";
};

constexpr int kChains = 16;  // enough independent chains for two units of latency 4 to 5

float portable_fma(int rounds) {
  float acc[64];
  for (int i = 0; i < 64; ++i) acc[i] = static_cast<float>(i);
  volatile float seed = 0.999f;
  const float factor = seed;
  for (int r = 0; r < rounds; ++r)
    for (float& x : acc) x = x * factor + 0.001f;
  float sum = 0;
  for (float x : acc) sum += x;
  return sum;
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) float avx2_fma(int rounds) {
  __m256 acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm256_set1_ps(static_cast<float>(i));
  volatile float seed = 0.999f;
  const __m256 factor = _mm256_set1_ps(seed), addend = _mm256_set1_ps(0.001f);
  for (int r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) acc[i] = _mm256_fmadd_ps(acc[i], factor, addend);
  }
  __m256 sum = acc[0];
  for (int i = 1; i < kChains; ++i) sum = _mm256_add_ps(sum, acc[i]);
  return _mm256_cvtss_f32(sum);
}

__attribute__((target("avx512f"))) float avx512_fma(int rounds) {
  __m512 acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_set1_ps(static_cast<float>(i));
  volatile float seed = 0.999f;
  const __m512 factor = _mm512_set1_ps(seed), addend = _mm512_set1_ps(0.001f);
  for (int r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) acc[i] = _mm512_fmadd_ps(acc[i], factor, addend);
  }
  __m512 sum = acc[0];
  for (int i = 1; i < kChains; ++i) sum = _mm512_add_ps(sum, acc[i]);
  return _mm512_cvtss_f32(sum);
}

__attribute__((target("avx512f,avx512bf16"))) float avx512_bf16_dot(int rounds) {
  __m512 acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_set1_ps(static_cast<float>(i));
  volatile float seed = 0.001f;
  const __m512 value = _mm512_set1_ps(seed);
  const __m512bh x = _mm512_cvtne2ps_pbh(value, value);
  for (int r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) acc[i] = _mm512_dpbf16_ps(acc[i], x, x);
  }
  __m512 sum = acc[0];
  for (int i = 1; i < kChains; ++i) sum = _mm512_add_ps(sum, acc[i]);
  return _mm512_cvtss_f32(sum);
}

__attribute__((target("avx512f,avx512vnni"))) float avx512_vnni_dot(int rounds) {
  __m512i acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_set1_epi32(i);
  volatile char seed = 1;
  const __m512i x = _mm512_set1_epi32(seed);
  for (int r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) acc[i] = _mm512_dpbusd_epi32(acc[i], x, x);
  }
  __m512i sum = acc[0];
  for (int i = 1; i < kChains; ++i) sum = _mm512_add_epi32(sum, acc[i]);
  alignas(64) std::int32_t lanes[16];
  _mm512_store_si512(lanes, sum);
  return static_cast<float>(lanes[0]);
}

__attribute__((target("avx2"))) std::uint64_t avx2_read(const std::byte* data, std::size_t bytes) {
  __m256i acc[4] = {};
  for (std::size_t at = 0; at + 128 <= bytes; at += 128)
    for (int i = 0; i < 4; ++i)
      acc[i] = _mm256_xor_si256(acc[i], _mm256_load_si256(reinterpret_cast<const __m256i*>(data + at) + i));
  const __m256i sum = _mm256_xor_si256(_mm256_xor_si256(acc[0], acc[1]), _mm256_xor_si256(acc[2], acc[3]));
  return static_cast<std::uint64_t>(_mm_cvtsi128_si64(_mm256_castsi256_si128(sum)));
}
#endif

std::uint64_t portable_read(const std::byte* data, std::size_t bytes) {
  const auto* words = reinterpret_cast<const std::uint64_t*>(data);
  std::uint64_t acc[8] = {};
  for (std::size_t i = 0; i + 8 <= bytes / 8; i += 8)
    for (std::size_t j = 0; j < 8; ++j) acc[j] ^= words[i + j];
  std::uint64_t sum = 0;
  for (std::uint64_t x : acc) sum ^= x;
  return sum;
}

std::atomic<std::uint64_t> sink{0};  // where results go, so that they count as used

// Seconds from the moment all threads are ready until the last one is done.
double team_seconds(int threads, const std::function<void(int)>& body) {
  std::barrier ready(threads + 1);
  std::vector<std::thread> team;
  for (int t = 0; t < threads; ++t)
    team.emplace_back([&, t] {
      ready.arrive_and_wait();
      body(t);
    });
  const auto begin = Clock::now();
  ready.arrive_and_wait();
  for (std::thread& t : team) t.join();
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

double arithmetic_rate(const Arithmetic& a, int threads, double seconds) {
  if (a.kernel == nullptr) return 0;
  // First find how many rounds a run needs.
  int rounds = 1 << 16;
  for (double took = 0; rounds < (1 << 28); rounds *= 2) {
    took = team_seconds(1, [&](int) { sink += static_cast<std::uint64_t>(a.kernel(rounds)); });
    if (took > seconds / 2) break;
  }
  double best = 0;
  for (int run = 0; run < 3; ++run) {
    const double took =
        team_seconds(threads, [&](int) { sink += static_cast<std::uint64_t>(a.kernel(rounds)); });
    best = std::max(best, a.operations_per_round * rounds * threads / took);
  }
  return best / 1e9;
}

double read_rate(int threads, const HostBlock& block) {
  auto* kernel = portable_read;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) kernel = avx2_read;
#endif
  const std::size_t part = block.bytes() / static_cast<std::size_t>(threads) / 4096 * 4096;
  double best = 0;
  for (int run = 0; run < 3; ++run) {
    const double took = team_seconds(
        threads, [&](int t) { sink += kernel(block.data() + static_cast<std::size_t>(t) * part, part); });
    best = std::max(best, static_cast<double>(part) * threads / took);
  }
  return best / 1e9;
}

Peak arithmetic_peak(const Arithmetic& a, int threads, double seconds) {
  return {arithmetic_rate(a, 1, seconds), arithmetic_rate(a, threads, seconds), a.instruction};
}

Json peak_to_json(const Peak& p) {
  return {{"one_thread", p.one}, {"all_threads", p.all}, {"instruction", p.instruction}};
}

}  // namespace

Peaks measure_peaks(int threads, double seconds) {
  Peaks out;
  out.threads = std::clamp(threads, 1, 1024);
  Arithmetic fp32{portable_fma, 64 * 2, "portable"}, bf16, int8;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    fp32 = {avx2_fma, kChains * 8 * 2, "AVX2 FMA"};
  if (__builtin_cpu_supports("avx512f")) fp32 = {avx512_fma, kChains * 16 * 2, "AVX-512 FMA"};
  if (__builtin_cpu_supports("avx512bf16")) bf16 = {avx512_bf16_dot, kChains * 32 * 2, "VDPBF16PS"};
  if (__builtin_cpu_supports("avx512vnni")) int8 = {avx512_vnni_dot, kChains * 64 * 2, "VPDPBUSD"};
#endif
  out.fp32 = arithmetic_peak(fp32, out.threads, seconds);
  out.bf16 = arithmetic_peak(bf16, out.threads, seconds);
  out.int8 = arithmetic_peak(int8, out.threads, seconds);
  HostBlock block(std::size_t{256} << 20);
  if (block.data() != nullptr) {
    std::fill_n(block.data(), block.bytes(), std::byte{1});  // untouched pages would all be the one zero page
    out.read = {read_rate(1, block), read_rate(out.threads, block), "streaming read of 256 MiB"};
  }
  return out;
}

Json peaks_to_json(const Peaks& p) {
  return {{"threads", p.threads},
          {"fp32_gflops", peak_to_json(p.fp32)},
          {"bf16_gflops", peak_to_json(p.bf16)},
          {"int8_gops", peak_to_json(p.int8)},
          {"read_gbs", peak_to_json(p.read)}};
}

}  // namespace servoflow::toolkit
