// Measurements of a GPU that no operation of a backend makes: what its memory, launches, barriers and copies
// cost. One implementation per kind of device; a build without CUDA links the stub in ops/no_cuda.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "servoflow/status.h"

namespace servoflow::ops {

struct GpuIdentity {
  std::string name, bus;
  int capability_major = 0, capability_minor = 0;
  int multiprocessors = 0;
  std::uint64_t l2_bytes = 0, memory_bytes = 0, free_bytes = 0,
                shared_bytes = 0;  // shared: of a multiprocessor
  int memory_bus_bits = 0;
  int driver = 0, runtime = 0;  // CUDA versions as 1000 major + 10 minor
  bool integrated = false, ecc = false;
};

enum class Traffic : std::uint8_t { kRead, kCopy, kWrite };

// What a product of a library takes and gives. FP8 is E4M3 with one scale per tensor, BF16 out; INT8 gives
// INT32.
enum class ProductKind : std::uint8_t { kBf16, kFp8, kInt8 };

// Times are samples in microseconds by the device's clock unless it says wall.
class DeviceProbe {
 public:
  virtual ~DeviceProbe() = default;
  virtual GpuIdentity identity() const = 0;

  // Streams through `bytes` of memory with `processors` multiprocessors' worth of blocks, past the
  // first-level caches; a copy reads one half and writes the other. Each sample is the time of one pass over
  // all of it.
  virtual Result<std::vector<double>> stream(Traffic traffic, std::uint64_t bytes, int processors,
                                             int samples) = 0;
  // An empty kernel, from the call to its end being known: wall.
  virtual Result<std::vector<double>> launch(int samples) = 0;
  // One of many empty kernels in a row on a stream.
  virtual Result<std::vector<double>> launch_in_a_row(int samples) = 0;
  // A recorded graph of `kernels` empty kernels, from the call to its end: wall. `early_start`: each may
  // start while its predecessor ends (programmatic dependent launch); an error where the device does not know
  // that.
  virtual Result<std::vector<double>> graph(int kernels, bool early_start, int samples) = 0;
  // One barrier among one block per multiprocessor of a kernel that stays.
  virtual Result<std::vector<double>> grid_barrier(int samples) = 0;
  // One copy between host and device, call to end: wall.
  virtual Result<std::vector<double>> transfer(bool to_device, bool pinned, std::uint64_t bytes,
                                               int samples) = 0;

  // A library's product y[m, n] = x[m, k] · W[n, k]ᵀ on random data, `copies` weights in rotation.
  // `open_library` loads cuBLASLt from `path`, or by its usual names if empty, and gives its name and
  // version.
  virtual Result<std::string> open_library(const std::string& path) = 0;
  virtual Result<std::vector<double>> library_product(ProductKind kind, int m, int n, int k, int copies,
                                                      int samples) = 0;
};

Result<std::unique_ptr<DeviceProbe>> make_cuda_probe(int ordinal);

}  // namespace servoflow::ops
