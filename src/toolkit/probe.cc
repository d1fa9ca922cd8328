#include "toolkit/probe.h"

#include <algorithm>
#include <cmath>
#include <ctime>

#include "core/status_macros.h"
#include "core/thread_pool.h"
#include "toolkit/decision.h"
#include "toolkit/machine.h"
#include "toolkit/peaks.h"
#include "toolkit/probe_parts.h"

namespace servoflow::toolkit {
namespace {

constexpr double kNoisySpread = 0.05, kNoisyOthers = 0.1, kSteadyClock = 0.9;

double quantile(const std::vector<double>& sorted, double share) {
  const double at = share * static_cast<double>(sorted.size() - 1);
  const auto low = static_cast<std::size_t>(at);
  const std::size_t high = std::min(low + 1, sorted.size() - 1);
  return sorted[low] + (sorted[high] - sorted[low]) * (at - static_cast<double>(low));
}

std::string percent(double share) { return std::to_string(std::lround(share * 100)) + " %"; }

std::string now_utc() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  gmtime_r(&now, &parts);
  char text[32] = {};
  std::strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%SZ", &parts);
  return text;
}

double clock_of(const Json& reading) {
  const auto found = reading.find("clock_ghz");
  return found != reading.end() && found->is_number() ? found->get<double>() : 0;
}

}  // namespace

Measured measured(std::vector<double> samples) {
  if (samples.empty()) return {};
  std::sort(samples.begin(), samples.end());
  Measured out{.median = quantile(samples, 0.5), .samples = static_cast<int>(samples.size())};
  if (out.median > 0) out.spread = (quantile(samples, 0.75) - quantile(samples, 0.25)) / out.median;
  return out;
}

Steadiness judge_steadiness(const ProbedDevice& d, double others, const std::vector<double>& clocks) {
  Steadiness out;
  out.others = others;
  // Of what lasts milliseconds; a wake-up is never the same twice.
  std::vector<double> spreads;
  for (const BandwidthPoint& p : d.bandwidth)
    for (const Measured& m : {p.read, p.copy, p.write}) spreads.push_back(m.spread);
  for (const ProductRate& r : d.products) spreads.push_back(r.us.spread);
  std::sort(spreads.begin(), spreads.end());
  if (!spreads.empty()) out.spread = quantile(spreads, 0.5);
  if (out.spread > kNoisySpread)
    out.reasons.push_back("half of all measurements spread by more than " + percent(out.spread));
  if (out.others > kNoisyOthers)
    out.reasons.push_back("others (other processes, or the hypervisor) used " + percent(out.others) +
                          " of the cores meanwhile");
  out.noisy = !out.reasons.empty();
  if (!clocks.empty()) {
    const auto [low, high] = std::minmax_element(clocks.begin(), clocks.end());
    if (*high > 0) out.clock_drop = 1 - *low / *high;
  }
  // Where others take turns on the cores, a clock read by counting is theirs, too.
  if (out.clock_drop > 1 - kSteadyClock) {
    out.reasons.push_back("the clock fell by " + percent(out.clock_drop) + " between readings");
    (out.others > kNoisyOthers ? out.noisy : out.throttled) = true;
  }
  return out;
}

Result<ProbedDevice> probe_cpu(const ProbeOptions& o) {
  const Budget budget(o.cpu_seconds);
  // A phase ends when this share of the time is over; on a machine so slow that it is over already, a little
  // later.
  const auto at = [&](double share) {
    return std::max(share * o.cpu_seconds, budget.used() + 0.1 * o.cpu_seconds);
  };
  const auto doing = [&](const std::string& what) {
    if (o.progress) o.progress(std::min(1.0, budget.used() / o.cpu_seconds), "cpu: " + what);
  };
  SF_ASSIGN_OR_RETURN(const weights::Architecture architecture, weights::named_architecture(o.model));
  const int threads = o.threads > 0 ? o.threads : usable_cores();
  const Json machine = machine_json();
  ProbedDevice d{.device = "cpu"};
  d.name = machine["cpu"].is_string() ? machine["cpu"].get<std::string>() : "unknown CPU";
  d.identity = cpu_identity();
  d.identity["threads"] = threads;
  d.features = machine["flags"].get<std::vector<std::string>>();
  const auto bytes = [&](const char* key) {
    return machine[key].is_number() ? machine[key].get<std::uint64_t>() : std::uint64_t{0};
  };
  d.memory_bytes = bytes("memory_bytes");
  d.available_bytes = bytes("available_bytes");

  const CpuTimes begin = cpu_times();
  Json during = Json::array();
  std::vector<double> clocks;
  const auto read_state = [&] {
    Json reading = cpu_reading();
    if (const double clock = clock_of(reading); clock > 0) clocks.push_back(clock);
    return reading;
  };
  d.state["before"] = read_state();

  doing("arithmetic peaks");
  d.peaks = peaks_to_json(measure_peaks(threads, std::min(0.03, o.cpu_seconds / 1000)));
  during.push_back(read_state());
  doing("memory bandwidth");
  const std::vector<CacheLevel> caches = cpu_caches();
  d.bandwidth = cpu_bandwidth(caches, threads, d.available_bytes, budget, at(0.3), d.skipped);
  during.push_back(read_state());
  doing("thread pool");
  d.latencies = pool_latencies(threads);
  doing("number of threads");
  d.threads = measure_threads(architecture, threads, budget, at(0.45), d.skipped);

  std::uint64_t last_cache = 0;
  for (const CacheLevel& c : caches) last_cache = std::max(last_cache, c.bytes);
  const std::vector<ProductPrecision> precisions = product_precisions("cpu");
  for (std::size_t i = 0; i < precisions.size(); ++i) {
    doing("products in " + precisions[i].name);
    d.precisions.push_back(precisions[i].name);
    // What the instruction does at most is a guess that leaves nothing out wrongly.
    const bool int8 = precisions[i].name.rfind("int8", 0) == 0;
    const Json& peak = d.peaks[int8 ? "int8_gops" : precisions[i].backend + "_gflops"]["all_threads"];
    const ProductOptions options{.device = "cpu",
                                 .threads = threads,
                                 .precision = precisions[i],
                                 .cache_bytes = last_cache,
                                 .memory_bytes = d.available_bytes / 2,
                                 .expected_gops = peak.is_number() ? peak.get<double>() : 0,
                                 .seconds_each = std::min(0.25, o.cpu_seconds / 200)};
    const double share = 0.45 + 0.55 * static_cast<double>(i + 1) / static_cast<double>(precisions.size());
    SF_RETURN_IF_ERROR(
        measure_products(options, model_sites(architecture), budget, at(share), d.products, d.skipped));
    during.push_back(read_state());
  }
  d.state["during"] = std::move(during);
  d.state["after"] = read_state();
  const CpuTimes end = cpu_times();
  const double cores = usable_cores() * std::max(end.wall - begin.wall, 1e-3);
  const double others = (end.busy - begin.busy) + (end.stolen - begin.stolen) - (end.own - begin.own);
  d.steadiness = judge_steadiness(d, std::clamp(others / cores, 0.0, 1.0), clocks);
  return d;
}

Result<MachineProfile> run_probe(const ProbeOptions& o) {
  MachineProfile out;
  out.made = now_utc();
  const Budget budget(0);
  std::vector<std::string> devices = o.devices;
  if (devices.empty()) {
    devices.push_back("cpu");
    for (int i = 0; i < ops::cuda_device_count(); ++i) devices.push_back("cuda:" + std::to_string(i));
  }
  // Before anything is measured: a device that is not there.
  SF_ASSIGN_OR_RETURN(out.key, machine_key(devices));
  for (const std::string& device : devices) {
    SF_ASSIGN_OR_RETURN(ProbedDevice d, device == "cpu" ? probe_cpu(o) : probe_gpu(o, device));
    out.devices.push_back(std::move(d));
  }
  decide(builtin_rules(), out);
  out.seconds = budget.used();
  return out;
}

}  // namespace servoflow::toolkit
