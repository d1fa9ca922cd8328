#include "toolkit/machine.h"

#include <sys/utsname.h>

#include <array>
#include <cstdlib>
#include <fstream>
#include <set>
#include <sstream>
#include <string>
#include <string_view>

#include "build_info.h"
#include "build_revision.h"
#include "core/thread_pool.h"

namespace servoflow::toolkit {
namespace {

// Instruction sets that decide which kernels run.
constexpr std::array<std::string_view, 14> kFlags = {
    "avx2",        "fma",      "f16c",     "avx512f",  "avx512bw", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "avx_vnni", "amx_bf16", "amx_int8", "asimd",    "bf16",        "i8mm"};

std::string trimmed(std::string text) {
  const auto begin = text.find_first_not_of(" \t");
  const auto end = text.find_last_not_of(" \t\n");
  return begin == std::string::npos ? "" : text.substr(begin, end - begin + 1);
}

// The first line of a small system file; empty when it cannot be read.
std::string first_line(const char* path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return trimmed(line);
}

// The value behind "key :" or "key:" in files such as /proc/cpuinfo.
std::string field(const char* path, std::string_view key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    const auto colon = line.find(':');
    if (colon != std::string::npos && trimmed(line.substr(0, colon)) == key)
      return trimmed(line.substr(colon + 1));
  }
  return "";
}

Json text_or_null(const std::string& text) { return text.empty() ? Json(nullptr) : Json(text); }

Json kilobytes(const char* path, std::string_view key) {
  const std::string value = field(path, key);
  return value.empty() ? Json(nullptr) : Json(std::strtoull(value.c_str(), nullptr, 10) * 1024);
}

std::uint64_t own_memory(std::string_view key) {
  const Json value = kilobytes("/proc/self/status", key);
  return value.is_null() ? 0 : value.get<std::uint64_t>();
}

std::string first_of(std::string a, std::string b) { return a.empty() ? b : a; }

}  // namespace

Json machine_json() {
  Json flags = Json::array();
  std::istringstream words(first_of(field("/proc/cpuinfo", "flags"), field("/proc/cpuinfo", "Features")));
  std::set<std::string> have;
  for (std::string word; words >> word;) have.insert(word);
  for (std::string_view flag : kFlags)
    if (have.count(std::string(flag)) > 0) flags.push_back(flag);

  Json load = nullptr;
  std::istringstream averages(first_line("/proc/loadavg"));
  if (double one = 0, five = 0, fifteen = 0; averages >> one >> five >> fifteen) load = {one, five, fifteen};

  const std::string mhz = field("/proc/cpuinfo", "cpu MHz");
  utsname kernel{};
  uname(&kernel);
  return {{"cpu",
           text_or_null(first_of(field("/proc/cpuinfo", "model name"), field("/proc/cpuinfo", "CPU part")))},
          {"flags", flags},
          {"cores", usable_cores()},
          {"governor", text_or_null(first_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"))},
          {"mhz", mhz.empty() ? Json(nullptr) : Json(std::strtod(mhz.c_str(), nullptr))},
          {"kernel", std::string(kernel.sysname) + " " + kernel.release + " " + kernel.machine},
          {"memory_bytes", kilobytes("/proc/meminfo", "MemTotal")},
          {"available_bytes", kilobytes("/proc/meminfo", "MemAvailable")},
          {"huge_pages", text_or_null(first_line("/sys/kernel/mm/transparent_hugepage/enabled"))},
          {"load_average", load}};
}

Json build_json() {
  return {{"version", SF_BUILD_VERSION},
          {"revision", text_or_null(SF_BUILD_REVISION)},
          {"compiler", SF_BUILD_COMPILER},
          {"flags", SF_BUILD_FLAGS},
          {"type", SF_BUILD_TYPE}};
}

std::uint64_t peak_resident_bytes() { return own_memory("VmHWM"); }
std::uint64_t resident_bytes() { return own_memory("VmRSS"); }

}  // namespace servoflow::toolkit
