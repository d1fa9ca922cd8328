// Memory and the thread pool of the CPU.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <cstring>
#include <thread>

#include "core/memory.h"
#include "core/thread_pool.h"
#include "toolkit/probe_parts.h"

namespace servoflow::toolkit {
namespace {

using Clock = std::chrono::steady_clock;
constexpr int kSamples = 7;

// One pass over `bytes` bytes, a multiple of 512. `to` is null where nothing is written.
struct Streams {
  std::uint64_t (*read)(const std::byte* from, std::size_t bytes) = nullptr;
  void (*copy)(std::byte* to, const std::byte* from, std::size_t bytes) = nullptr;
  void (*write)(std::byte* to, std::size_t bytes) = nullptr;
};

// Plain stores: a cache reads a line before it is written, and that is what programs pay.
#if defined(__x86_64__)
__attribute__((target("avx512f"))) std::uint64_t read_512(const std::byte* from, std::size_t bytes) {
  __m512i acc[4] = {};
  for (std::size_t at = 0; at < bytes; at += 256)
    for (int i = 0; i < 4; ++i) acc[i] = _mm512_xor_si512(acc[i], _mm512_load_si512(from + at + 64 * i));
  const __m512i sum = _mm512_xor_si512(_mm512_xor_si512(acc[0], acc[1]), _mm512_xor_si512(acc[2], acc[3]));
  alignas(64) std::uint64_t words[8];
  _mm512_store_si512(words, sum);
  return words[0];
}
__attribute__((target("avx512f"))) void copy_512(std::byte* to, const std::byte* from, std::size_t bytes) {
  for (std::size_t at = 0; at < bytes; at += 256)
    for (int i = 0; i < 4; ++i) _mm512_store_si512(to + at + 64 * i, _mm512_load_si512(from + at + 64 * i));
}
__attribute__((target("avx512f"))) void write_512(std::byte* to, std::size_t bytes) {
  const __m512i ones = _mm512_set1_epi32(1);
  for (std::size_t at = 0; at < bytes; at += 256)
    for (int i = 0; i < 4; ++i) _mm512_store_si512(to + at + 64 * i, ones);
}

__attribute__((target("avx2"))) std::uint64_t read_256(const std::byte* from, std::size_t bytes) {
  __m256i acc[4] = {};
  for (std::size_t at = 0; at < bytes; at += 128)
    for (int i = 0; i < 4; ++i)
      acc[i] = _mm256_xor_si256(acc[i], _mm256_load_si256(reinterpret_cast<const __m256i*>(from + at) + i));
  const __m256i sum = _mm256_xor_si256(_mm256_xor_si256(acc[0], acc[1]), _mm256_xor_si256(acc[2], acc[3]));
  return static_cast<std::uint64_t>(_mm_cvtsi128_si64(_mm256_castsi256_si128(sum)));
}
__attribute__((target("avx2"))) void copy_256(std::byte* to, const std::byte* from, std::size_t bytes) {
  for (std::size_t at = 0; at < bytes; at += 128)
    for (int i = 0; i < 4; ++i)
      _mm256_store_si256(reinterpret_cast<__m256i*>(to + at) + i,
                         _mm256_load_si256(reinterpret_cast<const __m256i*>(from + at) + i));
}
__attribute__((target("avx2"))) void write_256(std::byte* to, std::size_t bytes) {
  const __m256i ones = _mm256_set1_epi32(1);
  for (std::size_t at = 0; at < bytes; at += 128)
    for (int i = 0; i < 4; ++i) _mm256_store_si256(reinterpret_cast<__m256i*>(to + at) + i, ones);
}
#endif

std::uint64_t portable_read(const std::byte* from, std::size_t bytes) {
  std::uint64_t acc[8] = {};
  for (std::size_t at = 0; at < bytes; at += 64) {
    std::uint64_t words[8];
    std::memcpy(words, from + at, 64);
    for (int i = 0; i < 8; ++i) acc[i] ^= words[i];
  }
  std::uint64_t sum = 0;
  for (const std::uint64_t x : acc) sum ^= x;
  return sum;
}
void portable_copy(std::byte* to, const std::byte* from, std::size_t bytes) { std::memcpy(to, from, bytes); }
void portable_write(std::byte* to, std::size_t bytes) { std::memset(to, 1, bytes); }

Streams streams() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return {read_512, copy_512, write_512};
  if (__builtin_cpu_supports("avx2")) return {read_256, copy_256, write_256};
#endif
  return {portable_read, portable_copy, portable_write};
}

std::atomic<std::uint64_t> sink{0};  // where sums go, so that they count as used

enum Kind { kRead, kCopy, kWrite, kKinds };

// Rates of `threads` threads that each go through `part` bytes of their own, touched first by themselves.
struct Rates {
  std::vector<double> gbs[kKinds];
  bool out_of_memory = false;
};

Rates stream_rates(int threads, std::size_t part, double seconds) {
  Rates out;
  const Streams s = streams();
  const auto count = static_cast<std::size_t>(threads);
  std::vector<Clock::time_point> begins(count), ends(count);
  std::atomic<bool> failed{false};
  std::barrier step(threads);
  int rounds = 1;
  const auto work = [&](std::size_t t) {
    HostBlock block(part);
    if (block.data() == nullptr) failed = true;
    if (block.data() != nullptr) std::fill_n(block.data(), part, std::byte{1});
    step.arrive_and_wait();
    if (failed) return;
    std::byte *data = block.data(), *half = data + part / 2;
    std::uint64_t sum = 0;
    for (int kind = 0; kind < kKinds; ++kind) {
      for (int sample = -2; sample < kSamples;
           ++sample) {  // two that find out how many rounds a sample needs
        step.arrive_and_wait();
        begins[t] = Clock::now();
        for (int r = 0; r < rounds; ++r) {
          if (kind == kRead) sum += s.read(data, part);
          if (kind == kCopy) s.copy(half, data, part / 2);
          if (kind == kWrite) s.write(data, part);
          asm volatile("" ::: "memory");
        }
        ends[t] = Clock::now();
        step.arrive_and_wait();
        if (t == 0) {
          const double took = std::chrono::duration<double>(*std::max_element(ends.begin(), ends.end()) -
                                                            *std::min_element(begins.begin(), begins.end()))
                                  .count();
          const double each = std::max(took / rounds, 1e-9);
          // A copy reads one half and writes the other: part bytes in all, as the others.
          if (sample >= 0) out.gbs[kind].push_back(static_cast<double>(part) * threads / each * 1e-9);
          if (sample < 0) rounds = static_cast<int>(std::clamp(seconds / each, 1.0, 1e6));
          if (sample == kSamples - 1) rounds = 1;
        }
      }
      step.arrive_and_wait();
    }
    sink += sum;
  };
  std::vector<std::thread> team;
  for (std::size_t t = 0; t < count; ++t) team.emplace_back(work, t);
  for (std::thread& t : team) t.join();
  out.out_of_memory = failed;
  return out;
}

// The smallest cache that holds what each thread, or all that share it, go through.
std::string level_of(const std::vector<CacheLevel>& caches, std::size_t part, int threads) {
  for (const CacheLevel& c : caches) {
    const auto sharing = static_cast<std::uint64_t>(std::min(threads, c.shared_by));
    if (part * sharing <= c.bytes * 3 / 4) return "L" + std::to_string(c.level);
  }
  return "memory";
}

}  // namespace

std::vector<int> thread_counts(int most) {
  std::vector<int> out;
  for (int t = 1; t < most; t *= 2) out.push_back(t);
  out.push_back(std::max(1, most));
  return out;
}

std::vector<BandwidthPoint> cpu_bandwidth(const std::vector<CacheLevel>& caches, int threads,
                                          std::uint64_t memory_bytes, const Budget& budget, double until,
                                          std::vector<std::string>& skipped, double seconds_per_run) {
  std::uint64_t last = 0;
  for (const CacheLevel& c : caches)
    last = std::max(last, c.bytes * static_cast<std::uint64_t>((threads + c.shared_by - 1) / c.shared_by));
  // Far beyond the last cache, but a quarter of the free memory at most.
  const std::uint64_t memory =
      std::min(std::max<std::uint64_t>(4 * last, std::uint64_t{256} << 20), memory_bytes / 4);
  std::vector<BandwidthPoint> out;
  for (const int t : thread_counts(threads)) {
    std::vector<std::uint64_t> parts;
    for (std::uint64_t part = 16 << 10; part <= 32 << 20; part *= 4)
      if (part * static_cast<std::uint64_t>(t) < memory) parts.push_back(part);
    parts.push_back(memory / static_cast<std::uint64_t>(t) / 4096 * 4096);
    for (const std::uint64_t part : parts) {
      BandwidthPoint point{
          .bytes = part * static_cast<std::uint64_t>(t), .workers = t, .level = level_of(caches, part, t)};
      const std::string name =
          "bandwidth of " + std::to_string(point.bytes) + " bytes with " + std::to_string(t) + " threads";
      if (budget.used() > until) {
        skipped.push_back(name + ": no time left");
        continue;
      }
      Rates rates = stream_rates(t, part, seconds_per_run);
      if (rates.out_of_memory) {
        skipped.push_back(name + ": no memory");
        continue;
      }
      point.read = measured(std::move(rates.gbs[kRead]));
      point.copy = measured(std::move(rates.gbs[kCopy]));
      point.write = measured(std::move(rates.gbs[kWrite]));
      out.push_back(std::move(point));
    }
  }
  return out;
}

// From the call until every thread of the pool is at work. Each task waits for all others to have begun, so
// that no thread can do two.
std::vector<Latency> pool_latencies(int threads, int runs) {
  ThreadPool pool(threads);
  std::vector<double> spinning, sleeping;
  const auto once = [&] {
    std::atomic<int> begun{0};
    std::atomic<std::int64_t> last{0};
    const Clock::time_point begin = Clock::now();
    pool.parallel_for(pool.threads(), [&](int, int) {
      if (begun.fetch_add(1) + 1 == pool.threads()) last = (Clock::now() - begin).count();
      while (begun.load() < pool.threads()) std::this_thread::yield();
    });
    return std::chrono::duration<double, std::micro>(Clock::duration(last.load())).count();
  };
  for (int i = 0; i < 20; ++i) once();
  for (int i = 0; i < runs; ++i) spinning.push_back(once());
  for (int i = 0; i < std::max(1, runs / 4); ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(3));  // workers stop spinning and sleep
    sleeping.push_back(once());
  }
  const std::string many = std::to_string(pool.threads()) + " threads at work";
  return {
      {"pool_wakeup", "until " + many + ", right after the last task", measured(std::move(spinning))},
      {"pool_wakeup_asleep", "until " + many + ", after 3 ms without any", measured(std::move(sleeping))}};
}

}  // namespace servoflow::toolkit
