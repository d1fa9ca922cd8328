// What a GPU's driver says about it at a moment: clocks, power, temperature, and what holds the clocks down.
// Read through NVML, which comes with the driver and is looked for when it is needed; nothing is ever set.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/json.h"

namespace servoflow::toolkit {

// What the driver does not tell is empty.
struct GpuReading {
  std::optional<std::uint32_t> sm_mhz, memory_mhz, temperature_c;
  std::optional<double> power_w;
  std::optional<std::uint64_t> held_down;  // NVML's bits of reasons
};

// Names of the bits, lowest first: "power_cap", "hardware_slowdown", …; unknown ones by number.
std::vector<std::string> reasons_text(std::uint64_t bits);
// {sm_mhz, memory_mhz, power_w, temperature_c, held_down: […]}
Json reading_to_json(const GpuReading& reading);

class GpuWatch {
 public:
  // `bus` is the PCI address of the GPU. Never fails: without library or GPU, readings are empty and
  // `problem()` says why.
  explicit GpuWatch(const std::string& bus, const std::string& library = "libnvidia-ml.so.1");
  ~GpuWatch();
  GpuWatch(const GpuWatch&) = delete;
  GpuWatch& operator=(const GpuWatch&) = delete;

  GpuReading read() const;
  const std::string& problem() const { return problem_; }  // empty: it works
  // {driver, max_sm_mhz, max_memory_mhz, power_limit_w}; what is unknown is null.
  Json limits() const;

 private:
  struct Library;
  std::unique_ptr<Library> library_;
  std::string problem_;
};

}  // namespace servoflow::toolkit
