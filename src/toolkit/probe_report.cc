// The profile as tables.
#include <fmt/format.h>

#include <algorithm>

#include "toolkit/probe.h"

namespace servoflow::toolkit {
namespace {

// Identity, state and peaks of a profile that was read are whatever stood in the file.
const Json& at(const Json& json, const char* key) {
  static const Json kNothing;
  const auto found = json.is_object() ? json.find(key) : json.end();
  return json.is_object() && found != json.end() ? *found : kNothing;
}
const Json& list_at(const Json& json, const char* key) {
  static const Json kEmpty = Json::array();
  return at(json, key).is_array() ? at(json, key) : kEmpty;
}
std::string text_at(const Json& json, const char* key, const char* otherwise = "?") {
  const Json& value = at(json, key);
  return value.is_string() ? value.get<std::string>() : otherwise;
}
double number_at(const Json& json, const char* key) {
  const Json& value = at(json, key);
  return value.is_number() ? value.get<double>() : 0;
}

std::string bytes_text(double bytes) {
  if (bytes >= 0x1p30) return fmt::format("{:.4g} GiB", bytes * 0x1p-30);
  if (bytes >= 0x1p20) return fmt::format("{:.4g} MiB", bytes * 0x1p-20);
  return fmt::format("{:.4g} KiB", bytes * 0x1p-10);
}

// "41.2 ± 3 %"
std::string value_text(const Measured& m, double scale = 1) {
  return m.samples == 0 ? "-" : fmt::format("{:.4g} +- {:.0f} %", m.median * scale, m.spread * 100);
}

std::string bandwidth_table(const ProbedDevice& d) {
  std::string out =
      fmt::format("  {:>10} {:>7} {:>7} {:>18} {:>18} {:>18}\n", "working set",
                  d.device == "cpu" ? "threads" : "SMs", "in", "read GB/s", "copy GB/s", "write GB/s");
  for (const BandwidthPoint& p : d.bandwidth)
    out +=
        fmt::format("  {:>10} {:>8} {:>7} {:>18} {:>18} {:>18}\n", bytes_text(static_cast<double>(p.bytes)),
                    p.workers, p.level, value_text(p.read), value_text(p.copy), value_text(p.write));
  return out;
}

std::string product_table(const ProbedDevice& d) {
  std::string out = fmt::format("  {:<16} {:>22} {:>10} {:>5} {:>18} {:>10} {:>10}  {}\n", "product",
                                "M x N x K", "precision", "W", "us", "Gop/s", "W GB/s", "by");
  for (const ProductRate& r : d.products)
    out += fmt::format("  {:<16} {:>22} {:>10} {:>5} {:>18} {:>10.0f} {:>10.1f}  {}\n",
                       r.stage + " " + r.site, fmt::format("{} x {} x {}", r.m, r.n, r.k), r.precision,
                       r.cold ? "cold" : "warm", value_text(r.us), r.gops(), r.weight_gbs(), r.by);
  return out;
}

std::string number_or(const Json& json) {
  return json.is_number() ? fmt::format("{:.4g}", json.get<double>()) : "?";
}

std::string cpu_lines(const ProbedDevice& d) {
  std::string caches;
  for (const Json& c : list_at(d.identity, "caches")) {
    const double shared = number_at(c, "shared_by");
    caches +=
        fmt::format("{}L{:.0f} {}{}", caches.empty() ? "" : ", ", number_at(c, "level"),
                    bytes_text(number_at(c, "bytes")), shared > 1 ? fmt::format(" for {:.0f}", shared) : "");
  }
  std::string out = fmt::format(
      "  {} usable cores, {} NUMA node(s), {} of {} free; {}\n", number_or(at(d.identity, "usable_cores")),
      list_at(d.identity, "numa_nodes").size(), bytes_text(static_cast<double>(d.available_bytes)),
      bytes_text(static_cast<double>(d.memory_bytes)), caches.empty() ? "caches unknown" : caches);
  std::string clocks = number_or(at(at(d.state, "before"), "clock_ghz"));
  for (const Json& r : list_at(d.state, "during")) clocks += " " + number_or(at(r, "clock_ghz"));
  out += "  clock, GHz, before ... after: " + clocks + " " +
         number_or(at(at(d.state, "after"), "clock_ghz")) + "\n";
  for (const char* name : {"fp32_gflops", "bf16_gflops", "int8_gops"}) {
    const Json& peak = at(d.peaks, name);
    if (const double all = number_at(peak, "all_threads"); all > 0)
      out += fmt::format("  peak {:<12} {:>8.0f} on one thread, {:>8.0f} on all ({})\n", name,
                         number_at(peak, "one_thread"), all, text_at(peak, "instruction"));
  }
  return out;
}

std::string gpu_lines(const ProbedDevice& d) {
  std::string out = fmt::format(
      "  capability {}, {} SMs, L2 {}, {} of {} free, CUDA driver {} runtime {}, driver {}\n",
      text_at(d.identity, "capability"), number_or(at(d.identity, "multiprocessors")),
      bytes_text(number_at(d.identity, "l2_bytes")), bytes_text(static_cast<double>(d.available_bytes)),
      bytes_text(static_cast<double>(d.memory_bytes)), text_at(d.identity, "cuda_driver"),
      text_at(d.identity, "cuda_runtime"), text_at(at(d.identity, "limits"), "driver"));
  const auto reading = [&](const char* when, const Json& r) {
    std::string held;
    for (const Json& reason : list_at(r, "held_down"))
      if (reason.is_string()) held += " " + reason.get<std::string>();
    out += fmt::format("  {:<7} {} MHz, memory {} MHz, {} W, {} C{}\n", when, number_or(at(r, "sm_mhz")),
                       number_or(at(r, "memory_mhz")), number_or(at(r, "power_w")),
                       number_or(at(r, "temperature_c")), held.empty() ? "" : "; held down by" + held);
  };
  if (const std::string problem = text_at(d.state, "problem", ""); !problem.empty())
    return out + "  clocks and power are unknown: " + problem + "\n";
  reading("before", at(d.state, "before"));
  for (const Json& r : list_at(d.state, "during")) reading("during", r);
  reading("after", at(d.state, "after"));
  return out;
}

std::string device_text(const ProbedDevice& d) {
  std::string out = fmt::format("\n{}: {}\n", d.device, d.name);
  out += d.device == "cpu" ? cpu_lines(d) : gpu_lines(d);
  std::string features;
  for (const std::string& f : d.features) features += " " + f;
  out += "  has" + (features.empty() ? " nothing special" : features) + "\n\n" + bandwidth_table(d) + "\n";
  for (const Latency& l : d.latencies)
    out += fmt::format("  {:<28} {:>18} us  {}\n", l.name, value_text(l.us), l.about);
  for (const ThreadPoint& t : d.threads)
    out += fmt::format("  {:>3} threads: expert gate_up {:>16} us, vision up {:>16} us\n", t.threads,
                       value_text(t.expert_us), value_text(t.vision_us));
  out += "\n" + product_table(d);
  for (const std::string& s : d.skipped) out += "  not measured: " + s + "\n";
  const Steadiness& s = d.steadiness;
  out += fmt::format("\n  {}: median spread {:.1f} %, others used {:.0f} % of the cores\n",
                     s.throttled ? "THROTTLED"
                     : s.noisy   ? "NOISY MACHINE"
                                 : "steady",
                     s.spread * 100, s.others * 100);
  for (const std::string& reason : s.reasons) out += "    " + reason + "\n";
  return out;
}

}  // namespace

std::string probe_text(const MachineProfile& p) {
  std::string out = fmt::format("servoflow probe, {}, {:.1f} s\n", p.made, p.seconds);
  for (const ProbedDevice& d : p.devices) out += device_text(d);
  out += "\nrecommended (rule: why)\n";
  for (const Json& d : p.decisions) {
    out += fmt::format("  {} {}: {}\n", text_at(d, "device"), text_at(d, "topic"), text_at(d, "advice"));
    std::string because;
    for (const Json& b : list_at(d, "because"))
      if (b.is_string()) because += (because.empty() ? "" : ", ") + b.get<std::string>();
    out += fmt::format("      {}{}\n", text_at(d, "rule"), because.empty() ? "" : ": " + because);
  }
  out += fmt::format("\nauto on this machine: --device {} --precision {}{}\n", p.choice.device,
                     p.choice.precision,
                     p.choice.threads > 0 ? fmt::format(" --threads {}", p.choice.threads) : "");
  return out;
}

}  // namespace servoflow::toolkit
