#include "toolkit/gpu_watch.h"

#include <dlfcn.h>

#include <array>
#include <utility>

namespace servoflow::toolkit {
namespace {

// The part of NVML's interface that is read here; its binary interface is kept stable by NVIDIA.
using Device = void*;
constexpr unsigned kSmClock = 1, kMemoryClock = 2, kGpuSensor = 0;

constexpr std::array<const char*, 9> kReasons = {
    "idle",       "application_clocks", "power_cap",      "hardware_slowdown", "sync_boost",
    "thermal_sw", "thermal_hw",         "power_brake_hw", "display_clock"};

template <typename T>
Json number_or_null(const std::optional<T>& value) {
  return value ? Json(*value) : Json(nullptr);
}

}  // namespace

struct GpuWatch::Library {
  void* handle = nullptr;
  Device device = nullptr;
  bool initialised = false;
  int (*init)() = nullptr;
  int (*shutdown)() = nullptr;
  const char* (*error_text)(int) = nullptr;
  int (*by_bus)(const char*, Device*) = nullptr;
  int (*clock)(Device, unsigned, unsigned*) = nullptr;
  int (*max_clock)(Device, unsigned, unsigned*) = nullptr;
  int (*power)(Device, unsigned*) = nullptr;
  int (*power_limit)(Device, unsigned*) = nullptr;
  int (*temperature)(Device, unsigned, unsigned*) = nullptr;
  int (*reasons)(Device, unsigned long long*) = nullptr;
  int (*driver)(char*, unsigned) = nullptr;

  ~Library() {
    if (initialised && shutdown != nullptr) shutdown();
    if (handle != nullptr) dlclose(handle);
  }

  // A missing function leaves its pointer null: an older driver tells less.
  template <typename F>
  void find(F& function, const char* name) {
    function = reinterpret_cast<F>(dlsym(handle, name));
  }

  std::string open(const std::string& name, const std::string& bus) {
    handle = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) return "NVML: " + name + " cannot be loaded";
    find(init, "nvmlInit_v2");
    find(shutdown, "nvmlShutdown");
    find(error_text, "nvmlErrorString");
    find(by_bus, "nvmlDeviceGetHandleByPciBusId_v2");
    find(clock, "nvmlDeviceGetClockInfo");
    find(max_clock, "nvmlDeviceGetMaxClockInfo");
    find(power, "nvmlDeviceGetPowerUsage");
    find(power_limit, "nvmlDeviceGetEnforcedPowerLimit");
    find(temperature, "nvmlDeviceGetTemperature");
    find(reasons, "nvmlDeviceGetCurrentClocksThrottleReasons");
    find(driver, "nvmlSystemGetDriverVersion");
    if (init == nullptr || by_bus == nullptr) return "NVML: " + name + " has not the functions of NVML";
    if (const int error = init(); error != 0) return "NVML: " + text(error);
    initialised = true;
    if (const int error = by_bus(bus.c_str(), &device); error != 0)
      return "NVML: no GPU at " + bus + ": " + text(error);
    return {};
  }
  std::string text(int error) const {
    return error_text != nullptr ? error_text(error) : "error " + std::to_string(error);
  }

  // One number of the driver, or nothing.
  template <typename T, typename F, typename... Arguments>
  std::optional<T> ask(F function, Arguments... arguments) const {
    T value{};
    if (function == nullptr || function(device, arguments..., &value) != 0) return {};
    return value;
  }
  std::optional<double> watts(int (*function)(Device, unsigned*)) const {
    const auto milliwatts = ask<unsigned>(function);
    return milliwatts ? std::optional(*milliwatts / 1000.0) : std::nullopt;
  }
};

GpuWatch::GpuWatch(const std::string& bus, const std::string& library)
    : library_(std::make_unique<Library>()) {
  problem_ = library_->open(library, bus);
}

GpuWatch::~GpuWatch() = default;

GpuReading GpuWatch::read() const {
  GpuReading out;
  if (!problem_.empty()) return out;
  const Library& l = *library_;
  out.sm_mhz = l.ask<unsigned>(l.clock, kSmClock);
  out.memory_mhz = l.ask<unsigned>(l.clock, kMemoryClock);
  out.temperature_c = l.ask<unsigned>(l.temperature, kGpuSensor);
  out.power_w = l.watts(l.power);
  if (const auto bits = l.ask<unsigned long long>(l.reasons)) out.held_down = *bits;
  return out;
}

Json GpuWatch::limits() const {
  Json out = {
      {"driver", nullptr}, {"max_sm_mhz", nullptr}, {"max_memory_mhz", nullptr}, {"power_limit_w", nullptr}};
  if (!problem_.empty()) return out;
  const Library& l = *library_;
  std::array<char, 96> version{};
  if (l.driver != nullptr && l.driver(version.data(), static_cast<unsigned>(version.size())) == 0)
    out["driver"] = std::string(version.data());
  out["max_sm_mhz"] = number_or_null(l.ask<unsigned>(l.max_clock, kSmClock));
  out["max_memory_mhz"] = number_or_null(l.ask<unsigned>(l.max_clock, kMemoryClock));
  out["power_limit_w"] = number_or_null(l.watts(l.power_limit));
  return out;
}

std::vector<std::string> reasons_text(std::uint64_t bits) {
  std::vector<std::string> out;
  for (unsigned i = 0; i < 64; ++i)
    if ((bits >> i & 1) != 0) out.push_back(i < kReasons.size() ? kReasons[i] : "bit_" + std::to_string(i));
  return out;
}

Json reading_to_json(const GpuReading& r) {
  return {{"sm_mhz", number_or_null(r.sm_mhz)},
          {"memory_mhz", number_or_null(r.memory_mhz)},
          {"power_w", number_or_null(r.power_w)},
          {"temperature_c", number_or_null(r.temperature_c)},
          {"held_down", r.held_down ? Json(reasons_text(*r.held_down)) : Json(nullptr)}};
}

}  // namespace servoflow::toolkit
