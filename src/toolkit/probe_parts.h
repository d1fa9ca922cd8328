// The parts of a probe, each on its own so that it can be tested on its own.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "ops/backend.h"
#include "ops/device_probe.h"
#include "quant/formats.h"
#include "toolkit/machine_profile.h"
#include "toolkit/probe.h"
#include "weights/architecture.h"

namespace servoflow::toolkit {

// Median and spread of samples; a sample may be a rate or a time.
Measured measured(std::vector<double> samples);

// What is left of the time a probe may take, and what was left out because of it.
class Budget {
 public:
  explicit Budget(double seconds) : begin_(Clock::now()), seconds_(seconds) {}
  double used() const { return std::chrono::duration<double>(Clock::now() - begin_).count(); }
  double left() const { return seconds_ - used(); }
  double seconds() const { return seconds_; }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point begin_;
  double seconds_;
};

// ---- identity and state of the CPU

struct CacheLevel {
  int level = 0;            // 1: of data
  std::uint64_t bytes = 0;  // of one instance
  int shared_by = 1;        // logical CPUs
};
// From /sys/devices/system/cpu/cpu0/cache under `root`; empty where the system does not tell.
std::vector<CacheLevel> cpu_caches(const std::string& root = "/sys/devices/system");
// {model, caches, cores, threads_per_core, sockets, numa_nodes: [{node, cpus, memory_bytes}], cpu_quota, …}
Json cpu_identity(const std::string& root = "/sys/devices/system");

// Processor time since boot, in seconds summed over all CPUs, and this process's own.
struct CpuTimes {
  double busy = 0, stolen = 0, own = 0, wall = 0;
};
CpuTimes cpu_times();
// {clock_ghz, load_average, temperatures_c: {zone: …}}: the clock as a chain of dependent additions sees it,
// one per cycle; null on processors where nobody knows.
Json cpu_reading();
double clock_ghz();

// ---- bandwidth and latency of the CPU

// Threads 1, 2, 4, … and `most`.
std::vector<int> thread_counts(int most);
// Over working sets from half a first-level cache per thread to memory, for every thread count.
std::vector<BandwidthPoint> cpu_bandwidth(const std::vector<CacheLevel>& caches, int threads,
                                          std::uint64_t memory_bytes, const Budget& budget, double until,
                                          std::vector<std::string>& skipped, double seconds_per_run = 0.006);
std::vector<Latency> pool_latencies(int threads, int runs = 200);

// ---- products

struct ProductSite {
  std::string stage, name;
  int n = 0, k = 0;
  int per_pass = 1;  // how many of them one pass of the stage has: its depth
  std::vector<int>
      rows;  // to measure: vision 2 pictures, prefix with 2 and 3 pictures and 200 tokens, expert
};
std::vector<ProductSite> model_sites(const weights::Architecture& architecture);

// A number format that a device's backend has a product for. `backend`: the precision to open it with.
struct ProductPrecision {
  std::string name, backend;
  double bits = 16;                 // of a stored weight
  quant::LinearFormat format = {};  // quantized, or the backend's own
};
// BF16, the low-bit formats that the backend itself says it computes, FP32.
std::vector<ProductPrecision> product_precisions(const std::string& device);

struct ProductOptions {
  std::string device = "cpu";
  int threads = 0;
  ProductPrecision precision;
  std::uint64_t cache_bytes = 0;   // the last cache: cold weights rotate through three times as much
  std::uint64_t memory_bytes = 0;  // that may be taken
  double expected_gops = 0;        // a guess, so that a product that takes too long is left out; 0: none
  double seconds_each = 0.25;
};
// Every site at every number of rows, cold and (where the weights fit into the cache) warm. What is left out
// for time or memory is named in `skipped`.
Status measure_products(const ProductOptions& options, const std::vector<ProductSite>& sites,
                        const Budget& budget, double until, std::vector<ProductRate>& out,
                        std::vector<std::string>& skipped);

std::vector<ThreadPoint> measure_threads(const weights::Architecture& architecture, int threads,
                                         const Budget& budget, double until,
                                         std::vector<std::string>& left_out);

// ---- verdict

// Thresholds: spread above 5 %, others above 10 % of the cores, clock below 90 % of its own best.
Steadiness judge_steadiness(const ProbedDevice& device, double others, const std::vector<double>& clocks);

// ---- a whole device

Result<ProbedDevice> probe_cpu(const ProbeOptions& options);
Result<ProbedDevice> probe_gpu(const ProbeOptions& options, const std::string& device);

}  // namespace servoflow::toolkit
