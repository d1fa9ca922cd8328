// What the rules reason with, from what was measured.
#include <algorithm>
#include <map>
#include <optional>
#include <set>

#include "toolkit/decision.h"
#include "toolkit/probe_parts.h"
#include "toolkit/work.h"

namespace servoflow::toolkit {
namespace {

constexpr WorkShape kShape{.views = 2, .tokens = 200, .horizon = 50, .steps = 10, .batch = 1};
// Parts that a denoise step consists of, per layer: norm and q/k/v, attention, out, gate and up, down.
constexpr int kPartsPerLayer = 5;

bool has(const std::vector<std::string>& list, std::string_view item) {
  return std::find(list.begin(), list.end(), item) != list.end();
}
bool any_starts(const std::vector<std::string>& list, std::string_view start) {
  return std::any_of(list.begin(), list.end(), [&](const std::string& s) { return s.rfind(start, 0) == 0; });
}
bool any_contains(const std::vector<std::string>& list, std::string_view part) {
  return std::any_of(list.begin(), list.end(),
                     [&](const std::string& s) { return s.find(part) != std::string::npos; });
}

// The best rate of any large product that multiplies in `precision`: "int8", or "int8-w8a8" and its kin.
std::optional<double> best_gops(const ProbedDevice& d, std::string_view precision) {
  std::optional<double> out;
  for (const ProductRate& r : d.products)
    if ((r.precision == precision || r.precision.rfind(std::string(precision) + "-w8a8", 0) == 0) &&
        r.m >= 256)
      out = std::max(out.value_or(0), r.gops());
  return out;
}

// Of the whole working set beyond the caches, with all workers.
const BandwidthPoint* memory_point(const ProbedDevice& d, bool one_worker) {
  const BandwidthPoint* best = nullptr;
  for (const BandwidthPoint& p : d.bandwidth) {
    if (p.level != "memory" || (one_worker && p.workers != 1)) continue;
    const bool better =
        best == nullptr || p.workers > best->workers || (p.workers == best->workers && p.bytes > best->bytes);
    if (better) best = &p;
  }
  return best;
}

// Milliseconds of one pass of a stage: its products one by one, each with weights from memory, scaled up to
// the stage's operations (attention). Nothing if a product was not measured.
std::optional<double> stage_ms(const ProbedDevice& d, const std::string& stage, int rows,
                               std::string_view precision, const StageWork& work, const std::string& by) {
  double us = 0, flops = 0;
  for (const ProductSite& site : model_sites(weights::pi05_architecture())) {
    if (site.stage != stage) continue;
    const auto found = std::find_if(d.products.begin(), d.products.end(), [&](const ProductRate& r) {
      return r.stage == stage && r.site == site.name && r.m == rows && r.precision == precision && r.cold &&
             (by.empty() || r.by.rfind(by, 0) == 0);
    });
    if (found == d.products.end()) return {};
    us += found->us.median * site.per_pass;
    flops += 2.0 * site.per_pass * rows * site.n * site.k;
  }
  return flops > 0 ? std::optional(us * 1e-3 * std::max(1.0, work.flops / flops)) : std::nullopt;
}

std::optional<double> latency_us(const ProbedDevice& d, std::string_view name) {
  for (const Latency& l : d.latencies)
    if (l.name == name) return l.us.median;
  return {};
}

void put(Figures& out, const std::string& name, const std::optional<double>& value) {
  if (value) out[name] = *value;
}

// What starting the parts of a denoise step takes at least.
std::optional<double> overhead_ms(const ProbedDevice& d, int layers) {
  const int parts = layers * kPartsPerLayer;
  if (d.device == "cpu") {
    const auto us = latency_us(d, "pool_wakeup");
    return us ? std::optional(*us * parts * 1e-3) : std::nullopt;
  }
  std::optional<double> least;
  const auto offer = [&](const std::optional<double>& us, double per) {
    if (us && (!least || *us * per < *least)) least = *us * per;
  };
  offer(latency_us(d, "grid_barrier"), parts * 1e-3);
  offer(latency_us(d, "graph_900"), parts / 900.0 * 1e-3);
  offer(latency_us(d, "graph_900_early"), parts / 900.0 * 1e-3);
  return least;
}

void thread_figures(const ProbedDevice& d, Figures& out) {
  if (d.threads.empty()) return;
  // One step has 50 rows, the prefix is like vision: both count, a step ten times.
  const auto cost = [](const ThreadPoint& t) { return 10 * t.expert_us.median + t.vision_us.median; };
  const ThreadPoint *best = &d.threads.front(), *all = best;
  for (const ThreadPoint& t : d.threads) {
    if (cost(t) < cost(*best)) best = &t;
    if (t.threads > all->threads) all = &t;
  }
  out["threads_usable"] = static_cast<double>(all->threads);
  out["threads_best"] = static_cast<double>(best->threads);
  if (cost(*best) > 0) out["threads_gain"] = cost(*all) / cost(*best);
}

}  // namespace

const std::map<std::string, std::string>& figure_meanings() {
  static const std::map<std::string, std::string> kMeanings = {
      {"kind", "cpu or cuda"},
      {"throttled", "whether the device was held down while it was measured"},
      {"noisy", "whether repeats lie far apart or others used the cores"},
      {"spread", "the median of all measurements' interquartile ranges, each divided by its median"},
      {"others", "share of the cores that other processes and the hypervisor used meanwhile"},
      {"clock_drop", "1 - the lowest clock seen / the highest"},
      {"memory_gbs", "1e9 bytes per second read from memory with all threads or processors"},
      {"memory_one_gbs", "the same with one"},
      {"bf16_gops", "1e9 operations per second of the fastest large BF16 product"},
      {"fp32_gops", "the same in FP32"},
      {"int8_gops", "the same in INT8, by this engine or a library"},
      {"fp8_gops", "the same in FP8, by this engine or a library"},
      {"hardware_int8", "whether the device has INT8 dot products"},
      {"hardware_fp8", "whether its tensor cores take FP8"},
      {"hardware_fp4", "whether its tensor cores take 4-bit floats"},
      {"engine_int8", "whether this build has INT8 kernels for the device"},
      {"engine_fp8", "whether this build has FP8 kernels for the device"},
      {"engine_4bit", "whether this build has 4-bit kernels for the device"},
      {"prefix_bytes_ms", "milliseconds to read the prefix's weights once in BF16, at memory_gbs"},
      {"prefix_flops_ms", "milliseconds of the prefix's operations, at bf16_gops"},
      {"step_bytes_ms",
       "milliseconds to read a denoise step's weights and cache once in BF16, at memory_gbs"},
      {"step_flops_ms", "milliseconds of a denoise step's operations, at bf16_gops"},
      {"step_4bit_ms", "milliseconds to read a denoise step's weights in 4.5 bits each, and its cache"},
      {"step_overhead_ms", "milliseconds that starting the parts of a denoise step takes at least"},
      {"vision_ms", "expected from the products of one pass in BF16, weights cold"},
      {"prefix_ms", "expected from the products of one pass in BF16, weights cold"},
      {"step_ms", "expected from the products of one denoise step in BF16, weights cold"},
      {"expected_bf16_ms", "vision + prefix + 10 steps, products alone"},
      {"expected_fp32_ms", "the same in FP32"},
      {"expected_int8_ms", "the same in INT8 by this engine"},
      {"floor_ms", "each stage at memory_gbs or bf16_gops, whichever takes longer"},
      {"memory_gb", "1e9 bytes of the device"},
      {"available_gb", "1e9 bytes of it that are free"},
      {"need_bf16_gb", "1e9 bytes of weights in BF16, and a tenth more"},
      {"need_8bit_gb", "1e9 bytes of weights in 8 bits, and a tenth more"},
      {"need_4bit_gb", "1e9 bytes of weights in 4.5 bits, and a tenth more"},
      {"threads_usable", "threads that were tried at most"},
      {"threads_best", "threads with which the sample products take least"},
      {"threads_gain", "time with all threads / time with the best number"},
      {"wakeup_us", "microseconds until all threads of the pool are at work"},
      {"wakeup_share", "step_overhead_ms / (step_ms + step_overhead_ms)"},
      {"devices", "how many were probed"},
      {"best_device", "the one with the least expected_bf16_ms or expected_fp32_ms"},
      {"best_ms", "its expected latency"},
      {"second_device", "the next"},
      {"second_ms", "its expected latency"},
  };
  return kMeanings;
}

Figures device_figures(const ProbedDevice& d) {
  Figures out;
  const bool cpu = d.device == "cpu";
  const weights::Architecture a = weights::pi05_architecture();
  const Work work = count_work(a, kShape, 2, 2), low = count_work(a, kShape, 4.5 / 8, 2);
  out["kind"] = std::string(cpu ? "cpu" : "cuda");
  out["throttled"] = d.steadiness.throttled;
  out["noisy"] = d.steadiness.noisy;
  out["spread"] = d.steadiness.spread;
  out["others"] = d.steadiness.others;
  out["clock_drop"] = d.steadiness.clock_drop;
  const auto optional_rate = [](const BandwidthPoint* p) {
    return p != nullptr && p->read.median > 0 ? std::optional(p->read.median) : std::nullopt;
  };
  const std::optional<double> gbs = optional_rate(memory_point(d, false));
  put(out, "memory_gbs", gbs);
  put(out, "memory_one_gbs", optional_rate(memory_point(d, true)));
  const std::optional<double> bf16 = best_gops(d, "bf16");
  put(out, "bf16_gops", bf16);
  put(out, "fp32_gops", best_gops(d, "fp32"));
  put(out, "int8_gops", best_gops(d, "int8"));
  put(out, "fp8_gops", best_gops(d, "fp8"));
  out["hardware_int8"] = any_starts(d.features, "avx512_vnni") || any_starts(d.features, "avx_vnni") ||
                         has(d.features, "amx_int8") || has(d.features, "i8mm") ||
                         has(d.features, "int8_tensor");
  out["hardware_fp8"] = has(d.features, "fp8_tensor");
  out["hardware_fp4"] = has(d.features, "fp4_tensor");
  out["engine_int8"] = any_starts(d.precisions, "int8-w8a8");
  out["engine_fp8"] = any_starts(d.precisions, "fp8-w8a8");
  out["engine_4bit"] = any_contains(d.precisions, "-w4a16");
  if (gbs) {
    out["prefix_bytes_ms"] = work.prefix.bytes() / *gbs * 1e-6;
    out["step_bytes_ms"] = work.step.bytes() / *gbs * 1e-6;
    out["step_4bit_ms"] = low.step.bytes() / *gbs * 1e-6;
  }
  if (bf16) {
    out["prefix_flops_ms"] = work.prefix.flops / *bf16 * 1e-6;
    out["step_flops_ms"] = work.step.flops / *bf16 * 1e-6;
  }
  if (gbs && bf16) {
    const auto floor = [&](const StageWork& w) { return std::max(w.bytes() / *gbs, w.flops / *bf16) * 1e-6; };
    out["floor_ms"] = floor(work.vision) + floor(work.prefix) + kShape.steps * floor(work.step);
  }

  const int picture = a.vision.tokens();
  for (const auto& [name, precision] :
       {std::pair("bf16", "bf16"), std::pair("fp32", "fp32"), std::pair("int8", "int8-w8a8")}) {
    const std::string by = cpu ? "cpu/" : "cuda/";  // not a library's
    const auto vision = stage_ms(d, "vision", kShape.views * picture, precision, work.vision, by),
               prefix =
                   stage_ms(d, "prefix", kShape.views * picture + kShape.tokens, precision, work.prefix, by),
               step = stage_ms(d, "expert", kShape.horizon, precision, work.step, by);
    if (std::string_view(name) == "bf16") {
      put(out, "vision_ms", vision);
      put(out, "prefix_ms", prefix);
      put(out, "step_ms", step);
    }
    if (vision && prefix && step)
      out[std::string("expected_") + name + "_ms"] = *vision + *prefix + kShape.steps * *step;
  }

  out["memory_gb"] = static_cast<double>(d.memory_bytes) * 1e-9;
  out["available_gb"] = static_cast<double>(d.available_bytes) * 1e-9;
  const auto all = static_cast<double>(work.all.weights + work.modulation_weights) +
                   static_cast<double>(a.vocab) * a.prefix.width;
  out["need_bf16_gb"] = all * 2 * 1.1e-9;
  out["need_8bit_gb"] = all * 1.1e-9;
  out["need_4bit_gb"] = all * 4.5 / 8 * 1.1e-9;
  put(out, "step_overhead_ms", overhead_ms(d, a.expert.depth));
  if (cpu) {
    thread_figures(d, out);
    put(out, "wakeup_us", latency_us(d, "pool_wakeup"));
    const auto overhead = out.find("step_overhead_ms"), step = out.find("step_ms");
    if (overhead != out.end() && step != out.end()) {
      const double lost = std::get<double>(overhead->second), own = std::get<double>(step->second);
      out["wakeup_share"] = lost / (lost + own);
    }
  }
  return out;
}

Figures machine_figures(const std::vector<ProbedDevice>& devices) {
  Figures out;
  out["devices"] = static_cast<double>(devices.size());
  std::vector<std::pair<double, std::string>> known;
  for (const ProbedDevice& d : devices) {
    const Figures f = device_figures(d);
    std::optional<double> least;
    for (const char* name : {"expected_bf16_ms", "expected_fp32_ms"})
      if (const auto found = f.find(name); found != f.end())
        least = std::min(least.value_or(1e300), std::get<double>(found->second));
    if (least) known.emplace_back(*least, d.device);
  }
  std::stable_sort(known.begin(), known.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  if (known.empty() && !devices.empty()) out["best_device"] = devices.front().device;
  if (!known.empty()) {
    out["best_ms"] = known[0].first;
    out["best_device"] = known[0].second;
  }
  if (known.size() > 1) {
    out["second_ms"] = known[1].first;
    out["second_device"] = known[1].second;
  }
  return out;
}

}  // namespace servoflow::toolkit
