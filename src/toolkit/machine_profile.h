// What `servoflow probe` found out about a machine, as a file: versioned JSON that `--device auto`,
// `--precision auto` and the planner read.
//
// A profile belongs to one machine and one build. Its key names the CPU, its instruction sets, the cores this
// process may use, every GPU probed with its driver, and the build; where any of that differs, the profile is
// refused and the error says what was there and what is here now.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/json.h"
#include "servoflow/status.h"

namespace servoflow::toolkit {

// A median of several measurements with how far they lie apart: (p75 - p25) / median.
struct Measured {
  double median = 0, spread = 0;
  int samples = 0;
};

// Streaming through a working set. Rates are 1e9 bytes per second that the program reads and writes; a copy
// counts both. What a cache fetches on its own account (a line before it is written) is not counted.
struct BandwidthPoint {
  std::uint64_t bytes = 0;  // of the whole working set, all workers together
  int workers = 0;          // threads of a CPU, processors (SMs) of a GPU
  std::string level;        // the smallest cache that holds it: "L1" | "L2" | "L3" | "memory"
  Measured read, copy, write;
};

// y = x · Wᵀ at the sizes of one linear layer of pi0.5.
struct ProductRate {
  std::string stage, site;  // "prefix", "gate_up"
  int m = 0, n = 0, k = 0;
  std::string precision;  // "fp32", "bf16", or the name of a quantized format
  bool cold = false;      // weights rotated, so that each product reads them from memory
  std::string by;         // what computed: a backend's name, or a library with its version
  std::uint64_t weight_bytes = 0;
  Measured us;  // of one product
  // 1e9 operations per second, a multiply-add counts two; 1e9 bytes of weights per second. 0 for no time at
  // all.
  double gops() const { return us.median > kLeastUs ? 2e-3 * m * n * k / us.median : 0; }
  double weight_gbs() const {
    return us.median > kLeastUs ? static_cast<double>(weight_bytes) / us.median * 1e-3 : 0;
  }
  static constexpr double kLeastUs = 1e-6;
};

struct Latency {
  std::string name;  // "pool_wakeup", "launch", "graph_900", …
  std::string about;
  Measured us;
};

// The same two products with fewer threads.
struct ThreadPoint {
  int threads = 0;
  Measured expert_us, vision_us;
};

// Why figures of this run may not be what the machine can do.
struct Steadiness {
  bool noisy = false, throttled = false;
  double spread = 0;      // the median of all measurements' spreads
  double others = 0;      // cores that other processes and the hypervisor used meanwhile, of those usable
  double clock_drop = 0;  // the lowest clock seen under load against the highest
  std::vector<std::string> reasons;  // in words, empty if all is well
};

struct ProbedDevice {
  std::string device;  // "cpu", "cuda:0": what --device takes
  std::string name;    // "NVIDIA H200"
  Json identity;       // caches, nodes, … or multiprocessors, capability, …
  Json state;          // {before, during, after}: clocks, power, temperatures, load
  std::uint64_t memory_bytes = 0, available_bytes = 0;
  std::vector<std::string> features;    // instruction sets, or what the GPU's tensor cores multiply
  std::vector<std::string> precisions;  // that this build has kernels for on it
  std::vector<BandwidthPoint> bandwidth;
  std::vector<ProductRate> products;
  std::vector<Latency> latencies;
  std::vector<ThreadPoint> threads;  // CPU only
  Json peaks;                        // CPU only: instruction peaks (toolkit/peaks.h)
  Steadiness steadiness;
  std::vector<std::string> skipped;  // what was not measured, and why
};

// What `auto` becomes.
struct Choice {
  std::string device = "cpu", precision = "bf16";
  int threads = 0;  // 0: one per usable core
  std::string why;  // the rules that fired, with their figures
};

inline constexpr int kMachineProfileVersion = 1;

struct MachineProfile {
  std::string made;    // UTC, "2026-01-31T12:00:00Z"
  double seconds = 0;  // that the probe took
  Json key;            // see machine_key
  std::vector<ProbedDevice> devices;
  Choice choice;
  Json decisions;  // the rules that fired, device by device (toolkit/decision.h)
};

// {cpu, flags, cores, gpus: [{device, name, driver}], build: {version, revision, compiler, flags, type}} of
// this machine as it is now, with the GPUs that `devices` names; one that is not here is an error.
Result<Json> machine_key(const std::vector<std::string>& devices);

Json profile_to_json(const MachineProfile& profile);
// Strict: unknown keys, other versions, and numbers that are no measurements are errors, all in one. `where`
// starts every message.
Result<MachineProfile> profile_from_json(const Json& json, const std::string& where);
Result<MachineProfile> read_profile(const std::string& path);
// Makes the folder if need be; the file is the old one or the new one, never half of it.
Status write_profile(const std::string& path, const MachineProfile& profile);
// Ok if the profile is of a machine with key `now`; else an error that names each difference.
Status check_fresh(const MachineProfile& profile, const Json& now, const std::string& where);

// $XDG_CACHE_HOME/servoflow/machine.json, or ~/.cache/servoflow/machine.json; empty where neither is set.
std::string default_profile_path();

// The profile that `auto` reads: `path` if given (it must be there and fresh), "none" for none, else the
// default one where there is one. Empty: there is none.
Result<std::optional<MachineProfile>> profile_for_auto(const std::string& path);

}  // namespace servoflow::toolkit
