// A GPU: its memory, launches and copies through ops/device_probe.h, its products through the backend and,
// where it is installed, a library.
#include <algorithm>
#include <cstdlib>
#include <set>

#include "core/status_macros.h"
#include "toolkit/gpu_watch.h"
#include "toolkit/probe_parts.h"

namespace servoflow::toolkit {
namespace {

constexpr int kSamples = 9;
// One processor is as slow in more; it would take long.
constexpr std::uint64_t kMostForOne = std::uint64_t{128} << 20;
// Nothing holds the clock down when the GPU is idle or its clocks were set by its owner.
const std::set<std::string> kHarmless = {"idle", "application_clocks", "sync_boost", "display_clock"};

std::string version_text(int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); }

class GpuBench {
 public:
  GpuBench(const ProbeOptions& o, const std::string& device, ops::DeviceProbe& probe,
           const ops::GpuIdentity& id)
      : o_(o), probe_(probe), id_(id), watch_(id.bus), budget_(o.gpu_seconds) {
    d_.device = device;
  }

  Result<ProbedDevice> run() {
    identify();
    SF_ASSIGN_OR_RETURN(const weights::Architecture architecture, weights::named_architecture(o_.model));
    const std::vector<ProductSite> sites = model_sites(architecture);
    d_.state = {{"problem", watch_.problem()}, {"before", read()}};
    doing("memory bandwidth");
    SF_RETURN_IF_ERROR(bandwidth());
    doing("launches and copies");
    SF_RETURN_IF_ERROR(latencies());
    const std::vector<ProductPrecision> precisions = product_precisions(d_.device);
    for (std::size_t i = 0; i < precisions.size(); ++i) {
      doing("products in " + precisions[i].name);
      d_.precisions.push_back(precisions[i].name);
      const double share = 0.35 + 0.4 * static_cast<double>(i + 1) / static_cast<double>(precisions.size());
      const ProductOptions options{.device = d_.device,
                                   .precision = precisions[i],
                                   .cache_bytes = id_.l2_bytes,
                                   .memory_bytes = id_.free_bytes / 2,
                                   .seconds_each = 0.03};
      SF_RETURN_IF_ERROR(
          measure_products(options, sites, budget_, share * o_.gpu_seconds, d_.products, d_.skipped));
      during_.push_back(read());
    }
    doing("a library's products");
    library(sites);
    d_.state["during"] = std::move(during_);
    d_.state["after"] = read();
    d_.steadiness = judge_steadiness(d_, 0, clocks_);
    // The driver knows why a clock is down; a clock that is merely lower when idle is no throttling.
    d_.steadiness.throttled = !held_.empty();
    d_.steadiness.clock_drop = held_.empty() ? 0 : d_.steadiness.clock_drop;
    std::erase_if(d_.steadiness.reasons,
                  [](const std::string& r) { return r.rfind("the clock fell", 0) == 0; });
    for (const std::string& reason : held_)
      d_.steadiness.reasons.push_back("the driver held the clock down: " + reason);
    return std::move(d_);
  }

 private:
  void doing(const std::string& what) {
    if (o_.progress) o_.progress(std::min(1.0, budget_.used() / o_.gpu_seconds), d_.device + ": " + what);
  }

  void identify() {
    d_.name = id_.name;
    const int capability = id_.capability_major * 10 + id_.capability_minor;
    d_.identity = {
        {"bus", id_.bus},
        {"capability", std::to_string(id_.capability_major) + "." + std::to_string(id_.capability_minor)},
        {"multiprocessors", id_.multiprocessors},
        {"l2_bytes", id_.l2_bytes},
        {"shared_bytes", id_.shared_bytes},
        {"memory_bus_bits", id_.memory_bus_bits},
        {"integrated", id_.integrated},
        {"ecc", id_.ecc},
        {"cuda_driver", version_text(id_.driver)},
        {"cuda_runtime", version_text(id_.runtime)},
        {"limits", watch_.limits()}};
    d_.memory_bytes = id_.memory_bytes;
    d_.available_bytes = id_.free_bytes;
    for (const auto& [least, name] : {std::pair(75, "int8_tensor"), std::pair(80, "bf16_tensor"),
                                      std::pair(89, "fp8_tensor"), std::pair(100, "fp4_tensor")})
      if (capability >= least) d_.features.push_back(name);
  }

  Json read() {
    const GpuReading r = watch_.read();
    if (r.sm_mhz) clocks_.push_back(*r.sm_mhz);
    if (r.held_down)
      for (const std::string& reason : reasons_text(*r.held_down))
        if (kHarmless.count(reason) == 0) held_.insert(reason);
    return reading_to_json(r);
  }

  Status bandwidth() {
    std::vector<std::uint64_t> sizes;
    for (const std::uint64_t mib : {1, 4, 16, 32, 48, 64, 128, 512, 2048})
      if ((mib << 20) <= id_.free_bytes / 4) sizes.push_back(mib << 20);
    const int all = id_.multiprocessors;
    for (const int processors : std::set<int>{1, std::max(1, all / 4), std::max(1, all / 2), all})
      for (const std::uint64_t size : sizes) {
        if (processors == 1 && size > kMostForOne) continue;
        if (budget_.used() > 0.3 * o_.gpu_seconds) {
          d_.skipped.push_back("bandwidth of " + std::to_string(size) + " bytes with " +
                               std::to_string(processors) + " processors: no time left");
          continue;
        }
        BandwidthPoint p{
            .bytes = size, .workers = processors, .level = size <= id_.l2_bytes * 3 / 4 ? "L2" : "memory"};
        const auto rate = [&](ops::Traffic traffic) -> Result<Measured> {
          SF_ASSIGN_OR_RETURN(std::vector<double> us, probe_.stream(traffic, size, processors, kSamples));
          for (double& x : us) x = static_cast<double>(size) / x * 1e-3;
          return measured(std::move(us));
        };
        SF_ASSIGN_OR_RETURN(p.read, rate(ops::Traffic::kRead));
        SF_ASSIGN_OR_RETURN(p.copy, rate(ops::Traffic::kCopy));
        SF_ASSIGN_OR_RETURN(p.write, rate(ops::Traffic::kWrite));
        d_.bandwidth.push_back(std::move(p));
        if (size == sizes.back()) during_.push_back(read());
      }
    return {};
  }

  void add(const std::string& name, const std::string& about, Result<std::vector<double>> us) {
    if (us.ok()) {
      d_.latencies.push_back({name, about, measured(std::move(*us))});
    } else {
      d_.skipped.push_back(name + ": " + us.status().message());
    }
  }

  Status latencies() {
    add("launch", "an empty kernel, from the call to its known end", probe_.launch(200));
    add("launch_in_a_row", "each of 500 empty kernels on a stream", probe_.launch_in_a_row(9));
    add("graph_900", "a recorded graph of 900 empty kernels, from the call to its known end",
        probe_.graph(900, false, 50));
    add("graph_900_early", "the same with programmatic dependent launch", probe_.graph(900, true, 50));
    add("grid_barrier", "one barrier among a block on every multiprocessor", probe_.grid_barrier(9));
    for (const bool to_device : {true, false})
      for (const bool pinned : {true, false})
        for (const std::uint64_t bytes :
             {std::uint64_t{1} << 10, std::uint64_t{1} << 20, std::uint64_t{64} << 20})
          add(std::string(to_device ? "to_device_" : "to_host_") + (pinned ? "pinned_" : "pageable_") +
                  std::to_string(bytes),
              std::to_string(bytes) + " bytes of " + (pinned ? "pinned" : "pageable") + " host memory " +
                  (to_device ? "to the device" : "from the device") + ", from the call to its known end",
              probe_.transfer(to_device, pinned, bytes, bytes > (1 << 20) ? 7 : 50));
    return {};
  }

  void library(const std::vector<ProductSite>& sites) {
    const Result<std::string> name = probe_.open_library(o_.cublaslt);
    if (!name.ok()) {
      d_.skipped.push_back("products of a library, as a yardstick: " + name.status().message() +
                           " (--cublaslt FILE names it)");
      return;
    }
    std::vector<std::pair<ops::ProductKind, std::string>> kinds = {{ops::ProductKind::kBf16, "bf16"}};
    if (std::count(d_.features.begin(), d_.features.end(), "fp8_tensor") > 0)
      kinds.emplace_back(ops::ProductKind::kFp8, "fp8");
    kinds.emplace_back(ops::ProductKind::kInt8, "int8");
    for (const auto& [kind, precision] : kinds)
      for (const ProductSite& site : sites)
        for (const int rows : site.rows) {
          const std::string what = *name + "'s " + site.stage + " " + site.name + " " + std::to_string(rows) +
                                   " x " + std::to_string(site.n) + " x " + std::to_string(site.k) + " in " +
                                   precision;
          if (budget_.left() < 0) {
            d_.skipped.push_back(what + ": no time left");
            continue;
          }
          const auto weight = static_cast<std::uint64_t>(site.n) * static_cast<std::uint64_t>(site.k) *
                              (precision == "bf16" ? 2 : 1);
          const int copies =
              static_cast<int>(std::clamp<std::uint64_t>(3 * id_.l2_bytes / weight + 2, 1, 64));
          Result<std::vector<double>> us =
              probe_.library_product(kind, rows, site.n, site.k, copies, kSamples);
          if (!us.ok()) {
            d_.skipped.push_back(what + ": " + us.status().message());
            continue;
          }
          d_.products.push_back({.stage = site.stage,
                                 .site = site.name,
                                 .m = rows,
                                 .n = site.n,
                                 .k = site.k,
                                 .precision = precision,
                                 .cold = true,
                                 .by = *name,
                                 .weight_bytes = weight,
                                 .us = measured(std::move(*us))});
        }
    during_.push_back(read());
  }

  const ProbeOptions& o_;
  ops::DeviceProbe& probe_;
  const ops::GpuIdentity& id_;
  GpuWatch watch_;
  Budget budget_;
  ProbedDevice d_;
  Json during_ = Json::array();
  std::vector<double> clocks_;
  std::set<std::string> held_;
};

}  // namespace

Result<ProbedDevice> probe_gpu(const ProbeOptions& o, const std::string& device) {
  const int ordinal = device.size() > 5 ? std::atoi(device.c_str() + 5) : 0;
  SF_ASSIGN_OR_RETURN(const std::unique_ptr<ops::DeviceProbe> probe, ops::make_cuda_probe(ordinal));
  const ops::GpuIdentity identity = probe->identity();
  return GpuBench(o, device, *probe, identity).run();
}

}  // namespace servoflow::toolkit
