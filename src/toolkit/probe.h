// Measures the machine: bandwidth, products at the model's own sizes, latencies, and whether to believe any
// of it. Nothing is ever set: no clock, no affinity, no governor.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "toolkit/machine_profile.h"

namespace servoflow::toolkit {

struct ProbeOptions {
  std::vector<std::string> devices;  // "cpu", "cuda:0", …; empty: the CPU and every GPU
  int threads = 0;                   // at most; 0: one per usable core
  double cpu_seconds = 50;           // what does not fit into them is left out by name
  double gpu_seconds = 18;           // of each GPU
  std::string model = "pi05";        // whose layers are measured (weights::named_architecture)
  std::string cublaslt;              // library to measure beside our own products on a GPU; empty: looked for
  std::function<void(double share, const std::string& doing)> progress;  // share in [0, 1]
};

Result<MachineProfile> run_probe(const ProbeOptions& options);

// Tables and the recommendation, for people.
std::string probe_text(const MachineProfile& profile);

}  // namespace servoflow::toolkit
