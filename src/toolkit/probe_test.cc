#include "toolkit/probe.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <set>
#include <thread>

#include "core/thread_pool.h"
#include "toolkit/decision.h"
#include "toolkit/probe_parts.h"

namespace servoflow::toolkit {
namespace {

namespace fs = std::filesystem;

TEST(Probe, MedianAndSpreadOfKnownSamples) {
  const Measured m = measured({5, 1, 3, 2, 4});
  EXPECT_EQ(m.median, 3);
  EXPECT_EQ(m.samples, 5);
  EXPECT_DOUBLE_EQ(m.spread, 2.0 / 3);  // (4 - 2) / 3
  EXPECT_EQ(measured({7}).spread, 0);
  EXPECT_EQ(measured({}).samples, 0);
  EXPECT_EQ(measured({0, 0}).spread, 0);
}

TEST(Probe, NoiseAndThrottlingAreCalledByTheirNames) {
  ProbedDevice d{.device = "cpu"};
  const auto with_spread = [](double s) {
    return BandwidthPoint{1, 1, "L1", {1, s, 7}, {1, s, 7}, {1, s, 7}};
  };
  d.bandwidth = {with_spread(0.02)};
  Steadiness s = judge_steadiness(d, 0.01, {3.7, 3.69, 3.7});
  EXPECT_FALSE(s.noisy || s.throttled);
  EXPECT_TRUE(s.reasons.empty());
  EXPECT_DOUBLE_EQ(s.spread, 0.02);
  s = judge_steadiness(d, 0.3, {3.7, 3.7});
  EXPECT_TRUE(s.noisy);
  EXPECT_NE(s.reasons[0].find("30 %"), std::string::npos) << s.reasons[0];
  s = judge_steadiness(d, 0, {3.7, 2.9, 3.7});
  EXPECT_TRUE(s.throttled);
  EXPECT_FALSE(s.noisy);
  EXPECT_NEAR(s.clock_drop, 0.8 / 3.7, 1e-12);
  s = judge_steadiness(d, 0.5, {3.7, 2.9, 3.7});  // others had the core while the clock was read
  EXPECT_FALSE(s.throttled);
  d.bandwidth = {with_spread(0.02), with_spread(0.2), with_spread(0.2)};
  EXPECT_TRUE(judge_steadiness(d, 0, {}).noisy);
}

TEST(Probe, CachesAreReadFromTheSystem) {
  const fs::path root = fs::temp_directory_path() / ("servoflow_sys_" + std::to_string(::getpid()));
  const auto put = [&](const std::string& path, const std::string& text) {
    fs::create_directories((root / path).parent_path());
    std::ofstream(root / path) << text << "\n";
  };
  const auto cache = [&](int i, const char* level, const char* type, const char* size, const char* shared) {
    const std::string folder = "cpu/cpu0/cache/index" + std::to_string(i) + "/";
    put(folder + "level", level);
    put(folder + "type", type);
    put(folder + "size", size);
    put(folder + "shared_cpu_list", shared);
  };
  cache(0, "1", "Data", "48K", "0,64");
  cache(1, "1", "Instruction", "32K", "0,64");
  cache(2, "2", "Unified", "2048K", "0,64");
  cache(10, "3", "Unified", "105M", "0-31,64-95");
  put("node/node0/cpulist", "0-31");
  put("node/node0/meminfo", "Node 0 MemTotal:       1000 kB");
  put("cpu/cpu0/topology/core_id", "0");
  put("cpu/cpu0/topology/physical_package_id", "0");
  put("cpu/cpu64/topology/core_id", "0");
  put("cpu/cpu64/topology/physical_package_id", "0");
  const std::vector<CacheLevel> caches = cpu_caches(root.string());
  ASSERT_EQ(caches.size(), 3u);
  EXPECT_EQ(caches[0].bytes, 48u << 10);
  EXPECT_EQ(caches[0].shared_by, 2);
  EXPECT_EQ(caches[1].level, 2);
  EXPECT_EQ(caches[2].bytes, 105u << 20);
  EXPECT_EQ(caches[2].shared_by, 64);
  const Json id = cpu_identity(root.string());
  EXPECT_EQ(id["physical_cores"], 1);
  EXPECT_EQ(id["logical_cpus"], 2);
  EXPECT_EQ(id["numa_nodes"][0]["memory_bytes"], 1000 * 1024);
  fs::remove_all(root);
  EXPECT_TRUE(cpu_caches(root.string()).empty());
  EXPECT_TRUE(cpu_identity(root.string())["sockets"].is_null());
}

TEST(Probe, OwnWorkCountsAsOwn) {
  const CpuTimes before = cpu_times();
  volatile double x = 1;
  while (cpu_times().own < before.own + 0.05) x = x * 1.0000001;
  const CpuTimes after = cpu_times();
  EXPECT_GE(after.own - before.own, 0.05);
  EXPECT_GT(after.wall, before.wall);
  EXPECT_GE(after.busy + after.stolen, before.busy + before.stolen);
}

#if defined(__x86_64__) || defined(__aarch64__)
TEST(Probe, TheClockIsOfThisCentury) {
  const double ghz = clock_ghz();
  EXPECT_GT(ghz, 0.05);  // under a sanitizer and beside others
  EXPECT_LT(ghz, 10);
}
#endif

TEST(Probe, BandwidthCoversAllLevelsAndThreadCounts) {
  const std::vector<CacheLevel> caches = {{1, 32 << 10, 1}, {2, 1 << 20, 1}, {3, 8 << 20, 64}};
  std::vector<std::string> skipped;
  const Budget budget(60);
  const auto points = cpu_bandwidth(caches, 2, std::uint64_t{256} << 20, budget, 60, skipped, 0.0002);
  EXPECT_TRUE(skipped.empty());
  std::set<std::string> levels;
  std::set<int> workers;
  for (const BandwidthPoint& p : points) {
    levels.insert(p.level);
    workers.insert(p.workers);
    for (const Measured& m : {p.read, p.copy, p.write}) {
      EXPECT_EQ(m.samples, 7);
      EXPECT_GT(m.median, 0) << p.bytes;
      EXPECT_LT(m.median, 1e5) << p.bytes;  // 1e5 GB/s: nothing was read
    }
  }
  EXPECT_EQ(levels, (std::set<std::string>{"L1", "L2", "L3", "memory"}));
  EXPECT_EQ(workers, (std::set<int>{1, 2}));
  EXPECT_EQ(points.back().bytes, std::uint64_t{64} << 20);  // a quarter of the free memory
  const auto late = cpu_bandwidth(caches, 1, std::uint64_t{256} << 20, budget, 0, skipped);
  EXPECT_TRUE(late.empty());
  ASSERT_FALSE(skipped.empty());
  EXPECT_NE(skipped[0].find("no time left"), std::string::npos);
}

TEST(Probe, ThreadCountsDoubleUpToTheMost) {
  EXPECT_EQ(thread_counts(1), (std::vector<int>{1}));
  EXPECT_EQ(thread_counts(6), (std::vector<int>{1, 2, 4, 6}));
  EXPECT_EQ(thread_counts(8), (std::vector<int>{1, 2, 4, 8}));
}

TEST(Probe, WakingThePoolTakesTime) {
  const auto latencies = pool_latencies(3, 8);
  ASSERT_EQ(latencies.size(), 2u);
  EXPECT_EQ(latencies[0].us.samples, 8);
  EXPECT_GT(latencies[0].us.median, 0);
  EXPECT_EQ(latencies[1].us.samples, 2);
}

TEST(Probe, TheModelsSitesAreItsOwn) {
  const std::vector<ProductSite> sites = model_sites(weights::pi05_architecture());
  const auto site = [&](const std::string& stage, const std::string& name) {
    return *std::find_if(sites.begin(), sites.end(),
                         [&](const ProductSite& s) { return s.stage == stage && s.name == name; });
  };
  EXPECT_EQ(sites.size(), 12u);
  EXPECT_EQ(site("prefix", "gate_up").n, 32768);
  EXPECT_EQ(site("prefix", "gate_up").rows, (std::vector<int>{712, 968}));
  EXPECT_EQ(site("prefix", "gate_up").per_pass, 17);
  EXPECT_EQ(site("prefix", "qkv").per_pass, 18);
  EXPECT_EQ(site("prefix", "down").k, 16384);
  EXPECT_EQ(site("expert", "qkv").n, 2560);
  EXPECT_EQ(site("expert", "out").k, 2048);
  EXPECT_EQ(site("expert", "down").rows, (std::vector<int>{50, 10}));
  EXPECT_EQ(site("vision", "up").n, 4304);
  EXPECT_EQ(site("vision", "qkv").rows, (std::vector<int>{512}));
}

TEST(Probe, ProductsAreMeasuredColdAndWarmAndLeftOutByName) {
  const std::vector<ProductSite> sites = {{"expert", "down", 64, 128, 2, {16, 8}}};
  for (const char* precision : {"bf16", "fp32"}) {
    std::vector<ProductRate> rates;
    std::vector<std::string> skipped;
    ProductOptions o{.threads = 1,
                     .precision = {precision, precision, 16},
                     .cache_bytes = 256 << 10,
                     .memory_bytes = std::uint64_t{4} << 30,
                     .seconds_each = 0.001};
    ASSERT_TRUE(measure_products(o, sites, Budget(60), 60, rates, skipped).ok());
    ASSERT_EQ(rates.size(), 4u);
    EXPECT_TRUE(rates[0].cold);
    EXPECT_FALSE(rates[1].cold);
    EXPECT_EQ(rates[0].m, 16);
    EXPECT_EQ(rates[0].weight_bytes, 64u * 128 * 2);  // checkpoints hold BF16, and so do FP32 backends
    EXPECT_EQ(rates[0].by.rfind("cpu/", 0), 0u);
    for (const ProductRate& r : rates) {
      EXPECT_GE(r.us.samples, 3);
      EXPECT_GT(r.us.median, 0);
    }
    o.memory_bytes = 1;
    ASSERT_TRUE(measure_products(o, sites, Budget(60), 60, rates, skipped).ok());
    o.memory_bytes = std::uint64_t{4} << 30;
    o.expected_gops = 1e-9;
    ASSERT_TRUE(measure_products(o, sites, Budget(60), 60, rates, skipped).ok());
    EXPECT_EQ(rates.size(), 4u);
    ASSERT_EQ(skipped.size(), 4u);
    EXPECT_NE(skipped[0].find("MiB of memory"), std::string::npos) << skipped[0];
    EXPECT_NE(skipped[2].find("expert down 16 x 64 x 128"), std::string::npos) << skipped[2];
  }
}

TEST(Probe, FormatsAreWhatTheBackendSaysItComputes) {
  const std::vector<ProductPrecision> all = product_precisions("cpu");
  EXPECT_EQ(all.front().name, "bf16");
  EXPECT_EQ(all.back().name, "fp32");
  const auto choice = ops::make_backend({.device = "cpu", .precision = "bf16"});
  ASSERT_TRUE(choice.ok());
  for (const ProductPrecision& p : all) {
    if (!p.format.quantized()) continue;
    EXPECT_FALSE(choice->backend->low_bit_kernel(p.format).empty()) << p.name;
    std::vector<ProductRate> rates;
    std::vector<std::string> skipped;
    const ProductOptions o{.threads = 1,
                           .precision = p,
                           .cache_bytes = 1 << 20,
                           .memory_bytes = std::uint64_t{4} << 30,
                           .seconds_each = 0.001};
    const Status status =
        measure_products(o, {{"expert", "down", 64, 256, 2, {16}}}, Budget(60), 60, rates, skipped);
    ASSERT_TRUE(status.ok()) << p.name << ": " << status.message();
    ASSERT_FALSE(rates.empty());
    EXPECT_EQ(rates[0].precision, p.name);
    EXPECT_LT(rates[0].weight_bytes, 64u * 256 * 2) << p.name << " is smaller than BF16";
  }
}

TEST(Probe, AWholeProbeIsAProfile) {
  std::vector<std::string> steps;
  const ProbeOptions options{.devices = {"cpu"},
                             .threads = 2,
                             .cpu_seconds = 2,
                             .model = "tiny",
                             .progress = [&](double, const std::string& doing) { steps.push_back(doing); }};
  const auto profile = run_probe(options);
  ASSERT_TRUE(profile.ok()) << profile.status().message();
  EXPECT_GE(steps.size(), 5u);
  const auto back = profile_from_json(profile_to_json(*profile), "profile");
  ASSERT_TRUE(back.ok()) << back.status().message();
  EXPECT_EQ(profile_to_json(*back), profile_to_json(*profile));
  EXPECT_TRUE(check_fresh(*back, *machine_key({"cpu"}), "profile").ok());
  EXPECT_EQ(profile->choice.device, "cpu");
  const std::string text = probe_text(*profile);
  for (const char* part :
       {"working set", "pool_wakeup", "recommended", "only-device", "auto on this machine"})
    EXPECT_NE(text.find(part), std::string::npos) << part;
}

TEST(Probe, ADeviceThatIsNotHereIsAnErrorAtOnce) {
  EXPECT_FALSE(run_probe({.devices = {"cuda:97"}}).ok());
  EXPECT_FALSE(run_probe({.devices = {"abacus"}}).ok());
}

}  // namespace
}  // namespace servoflow::toolkit
