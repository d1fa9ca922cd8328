// Who the CPU is, how it is doing, and how much of it others are using.
#include <sched.h>
#include <sys/resource.h>
#include <sys/time.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <thread>

#include "core/thread_pool.h"
#include "toolkit/machine.h"
#include "toolkit/probe_parts.h"

namespace servoflow::toolkit {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

std::string line_of(const fs::path& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// "48K", "32M"
std::uint64_t size_of(const std::string& text) {
  char* end = nullptr;
  const std::uint64_t number = std::strtoull(text.c_str(), &end, 10);
  return number << (*end == 'K' ? 10 : *end == 'M' ? 20 : *end == 'G' ? 30 : 0);
}

// "0-3,8": how many.
int count_of(const std::string& list) {
  int count = 0;
  std::istringstream parts(list);
  for (std::string part; std::getline(parts, part, ',');) {
    const auto dash = part.find('-');
    const int first = std::atoi(part.c_str());
    count += dash == std::string::npos ? 1 : std::atoi(part.c_str() + dash + 1) - first + 1;
  }
  return count;
}

std::vector<fs::path> numbered(const fs::path& folder, const std::string& prefix) {
  std::map<int, fs::path> found;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(folder, error)) {
    const std::string name = entry.path().filename().string();
    if (name.rfind(prefix, 0) != 0 || name.size() == prefix.size() ||
        name.find_first_not_of("0123456789", prefix.size()) != std::string::npos)
      continue;
    found[std::atoi(name.c_str() + prefix.size())] = entry.path();
  }
  std::vector<fs::path> out;
  for (auto& [number, path] : found) out.push_back(path);
  return out;
}

Json numa_nodes(const fs::path& root) {
  Json out = Json::array();
  for (const fs::path& node : numbered(root / "node", "node")) {
    std::ifstream info(node / "meminfo");
    std::uint64_t bytes = 0;
    for (std::string line; std::getline(info, line);)
      if (const auto at = line.find("MemTotal:"); at != std::string::npos)
        bytes = std::strtoull(line.c_str() + at + 9, nullptr, 10) * 1024;
    out.push_back({{"node", std::atoi(node.filename().string().c_str() + 4)},
                   {"cpus", line_of(node / "cpulist")},
                   {"memory_bytes", bytes > 0 ? Json(bytes) : Json(nullptr)}});
  }
  return out;
}

// Cores' worth of time that the container may use, null for no limit.
Json cpu_quota() {
  std::istringstream line(line_of("/sys/fs/cgroup/cpu.max"));
  double quota = 0, period = 0;
  if (line >> quota >> period && period > 0) return quota / period;
  return nullptr;
}

// One addition per cycle, each waiting for the last: the longest chain a clock can be read from.
#if defined(__x86_64__) || defined(__aarch64__)
constexpr int kChain = 16;
double chain_ghz(int rounds) {
  std::uint64_t x = 1, y = 3;
  const Clock::time_point begin = Clock::now();
  for (int i = 0; i < rounds; ++i) {
#if defined(__x86_64__)
#define SF_ADD "add %1, %0\n\t"
    asm volatile(SF_ADD SF_ADD SF_ADD SF_ADD SF_ADD SF_ADD SF_ADD SF_ADD SF_ADD SF_ADD SF_ADD SF_ADD SF_ADD
                     SF_ADD SF_ADD SF_ADD
                 : "+r"(x)
                 : "r"(y)
                 : "cc");
#else
#define SF_ADD "add %0, %0, %1\n\t"
    asm volatile(SF_ADD SF_ADD SF_ADD SF_ADD SF_ADD SF_ADD SF_ADD SF_ADD SF_ADD SF_ADD SF_ADD SF_ADD SF_ADD
                     SF_ADD SF_ADD SF_ADD
                 : "+r"(x)
                 : "r"(y));
#endif
#undef SF_ADD
  }
  const double ns = std::chrono::duration<double, std::nano>(Clock::now() - begin).count();
  return static_cast<double>(rounds) * kChain / ns;
}
#endif

}  // namespace

// All threads at once, the best of five short chains on each; the slowest thread counts. A thread that lost
// its core for a while has the other four.
double clock_ghz() {
#if defined(__x86_64__) || defined(__aarch64__)
  std::vector<double> best(static_cast<std::size_t>(usable_cores()), 0);
  std::vector<std::thread> team;
  for (double& mine : best)
    team.emplace_back([&mine] {
      for (int i = 0; i < 5; ++i) mine = std::max(mine, chain_ghz(200000));  // about a millisecond each
    });
  for (std::thread& t : team) t.join();
  return *std::min_element(best.begin(), best.end());
#else
  return 0;
#endif
}

std::vector<CacheLevel> cpu_caches(const std::string& root) {
  std::vector<CacheLevel> out;
  for (const fs::path& index : numbered(fs::path(root) / "cpu/cpu0/cache", "index")) {
    if (line_of(index / "type") == "Instruction") continue;
    const CacheLevel level{.level = std::atoi(line_of(index / "level").c_str()),
                           .bytes = size_of(line_of(index / "size")),
                           .shared_by = std::max(1, count_of(line_of(index / "shared_cpu_list")))};
    if (level.level > 0 && level.bytes > 0) out.push_back(level);
  }
  return out;
}

Json cpu_identity(const std::string& root) {
  Json caches = Json::array();
  for (const CacheLevel& c : cpu_caches(root))
    caches.push_back({{"level", c.level}, {"bytes", c.bytes}, {"shared_by", c.shared_by}});
  std::set<std::string> packages, cores;
  int logical = 0;
  for (const fs::path& cpu : numbered(fs::path(root) / "cpu", "cpu")) {
    const std::string package = line_of(cpu / "topology/physical_package_id"),
                      core = line_of(cpu / "topology/core_id");
    if (package.empty() || core.empty()) continue;
    ++logical;
    packages.insert(package);
    cores.insert(package + ":" + core);
  }
  Json out = {{"caches", caches}, {"numa_nodes", numa_nodes(root)}, {"cpu_quota", cpu_quota()}};
  out["sockets"] = packages.empty() ? Json(nullptr) : Json(packages.size());
  out["physical_cores"] = cores.empty() ? Json(nullptr) : Json(cores.size());
  out["logical_cpus"] = logical == 0 ? Json(nullptr) : Json(logical);
  out["usable_cores"] = usable_cores();
  return out;
}

CpuTimes cpu_times() {
  CpuTimes out;
  cpu_set_t mine;
  CPU_ZERO(&mine);
  const bool known = sched_getaffinity(0, sizeof(mine), &mine) == 0;
  const double tick = 1.0 / static_cast<double>(sysconf(_SC_CLK_TCK));
  std::ifstream file("/proc/stat");
  for (std::string line; std::getline(file, line);) {
    // cpuN user nice system idle iowait irq softirq steal …
    if (line.rfind("cpu", 0) != 0 || line.size() < 5 || line[3] == ' ') continue;
    std::istringstream fields(line.substr(3));
    unsigned cpu = 0;
    double user = 0, nice = 0, system = 0, idle = 0, waiting = 0, irq = 0, soft = 0, stolen = 0;
    if (!(fields >> cpu >> user >> nice >> system >> idle >> waiting >> irq >> soft)) continue;
    fields >> stolen;  // kernels before 2.6.11 do not tell
    if (known && (cpu >= CPU_SETSIZE || !CPU_ISSET(cpu, &mine))) continue;
    out.busy += (user + nice + system + irq + soft) * tick;
    out.stolen += stolen * tick;
  }
  rusage usage{};
  if (getrusage(RUSAGE_SELF, &usage) == 0) {
    const auto seconds = [](const timeval& t) {
      return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) * 1e-6;
    };
    out.own = seconds(usage.ru_utime) + seconds(usage.ru_stime);
  }
  out.wall = std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
  return out;
}

Json cpu_reading() {
  const double clock = clock_ghz();
  Json load = nullptr, temperatures = Json::object();
  std::istringstream averages(line_of("/proc/loadavg"));
  if (double one = 0; averages >> one) load = one;
  for (const fs::path& zone : numbered("/sys/class/thermal", "thermal_zone"))
    if (const std::string text = line_of(zone / "temp"); !text.empty())
      temperatures[line_of(zone / "type")] = std::atof(text.c_str()) / 1000;
  return {{"clock_ghz", clock > 0 ? Json(clock) : Json(nullptr)},
          {"load_average", load},
          {"temperatures_c", temperatures}};
}

}  // namespace servoflow::toolkit
