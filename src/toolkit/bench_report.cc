// How a bench report reads: a table for people, the documented JSON for programs.
#include <fmt/format.h>

#include "toolkit/bench.h"
#include "toolkit/memory_plan.h"
#include "toolkit/writers.h"

namespace servoflow::toolkit {
namespace {

// The ceilings of this precision's arithmetic and of memory, in 1e9 per second; 0 where unknown.
struct Ceilings {
  double arithmetic = 0, memory = 0;
};

Ceilings ceilings(const BenchReport& r) {
  if (r.device_peaks) return {r.device_peaks->product_tflops * 1e3, r.device_peaks->copy_gbs};
  if (!r.peaks) return {};
  // Products of 4-bit weights, and of 8-bit ones with other inputs, are bf16 products of unpacked panels.
  const Peaks& p = *r.peaks;
  double arithmetic = r.precision != "fp32" && p.bf16.all > 0 ? p.bf16.all : p.fp32.all;
  if (r.precision.starts_with("int8-w8a8") && p.int8.all > 0) arithmetic = p.int8.all;
  return {arithmetic, p.read.all};
}

struct Rate {
  double gflops = 0, gbs = 0;
};

// At the median.
Rate rate(const StageBench& s) {
  if (s.ms.p50 <= 0) return {};
  return {s.work.flops / s.ms.p50 / 1e6, s.work.bytes() / s.ms.p50 / 1e6};
}

std::string share(double rate, double peak) {
  return peak > 0 && rate > 0 ? fmt::format("{:.0f} %", 100 * rate / peak) : "-";
}

Json share_json(double rate, double peak) { return peak > 0 ? Json(100 * rate / peak) : Json(nullptr); }

template <typename T>
std::string value_text(const std::optional<T>& value, const char* unit) {
  return value ? fmt::format("{:.0f} {}", static_cast<double>(*value), unit) : fmt::format("? {}", unit);
}

std::string reading_text(const GpuReading& r) {
  std::string out =
      fmt::format("SM {}, memory {}, {}, {}", value_text(r.sm_mhz, "MHz"), value_text(r.memory_mhz, "MHz"),
                  value_text(r.power_w, "W"), value_text(r.temperature_c, "°C"));
  if (r.held_down) {
    std::string reasons;
    for (const std::string& reason : reasons_text(*r.held_down))
      reasons += (reasons.empty() ? "" : ", ") + reason;
    out += ", held down by " + (reasons.empty() ? "nothing" : reasons);
  }
  return out;
}

std::string gpu_text(const GpuBench& g) {
  if (!g.problem.empty()) return "GPU clocks and power: not read: " + g.problem + "\n";
  std::string out = "GPU before  " + reading_text(g.before) + "\n";
  if (!g.during.empty()) out += "    during  " + reading_text(g.during[g.during.size() / 2]) + "\n";
  return out + "    after   " + reading_text(g.after) + "\n";
}

std::string memory_text(const BenchReport& r) {
  std::string out = fmt::format("memory after a tenth of the runs and at the end: host {} and {}",
                                bytes_text(static_cast<double>(r.settled.resident)),
                                bytes_text(static_cast<double>(r.ended.resident)));
  if (r.settled.device_used && r.ended.device_used)
    out += fmt::format(", GPU in use {} and {}", bytes_text(static_cast<double>(*r.settled.device_used)),
                       bytes_text(static_cast<double>(*r.ended.device_used)));
  return out + "\n";
}

std::string batches_text(const std::vector<BatchBench>& batches) {
  if (batches.empty()) return {};
  std::string out = fmt::format("\n{:<8}{:>10}{:>10}{:>14}  {}\n", "batch", "min", "p50", "p50 / request",
                                "bits of each request");
  for (const BatchBench& b : batches)
    out +=
        fmt::format("{:<8}{:>10.3f}{:>10.3f}{:>14.3f}  {}\n", b.size, b.ms.min, b.ms.p50, b.ms.p50 / b.size,
                    b.equals_alone ? "as alone" : fmt::format("DIFFER from alone, by {:.3g}", b.difference));
  return out;
}

Json memory_to_json(const MemoryReading& m) {
  return {{"resident_bytes", m.resident},
          {"device_used_bytes", m.device_used ? Json(*m.device_used) : Json(nullptr)}};
}

Json gpu_to_json(const GpuBench& g) {
  Json during = Json::array();
  for (const GpuReading& r : g.during) during.push_back(reading_to_json(r));
  return {{"problem", g.problem.empty() ? Json(nullptr) : Json(g.problem)},
          {"limits", g.limits},
          {"before", reading_to_json(g.before)},
          {"during", std::move(during)},
          {"after", reading_to_json(g.after)}};
}

Json batches_to_json(const std::vector<BatchBench>& batches) {
  Json out = Json::array();
  for (const BatchBench& b : batches)
    out.push_back({{"batch", b.size},
                   {"end_to_end_ms", distribution_to_json(b.ms)},
                   {"equals_alone", b.equals_alone},
                   {"difference", b.difference}});
  return out;
}

std::string row(const std::string& name, const Distribution& d) {
  return fmt::format("{:<14}{:>10.3f}{:>10.3f}{:>10.3f}{:>9.3f}{:>10.3f}{:>10.3f}", name, d.min, d.p50,
                     d.mean, d.std, d.p95, d.p99);
}

}  // namespace

std::string bench_text(const BenchReport& r) {
  const WorkShape& w = r.work;
  std::string out = fmt::format(
      "{} on {}, {}, {}\n{} views, {} tokens, horizon {}, {} steps, batch {}{}; {} runs after {} of "
      "warm-up\n",
      r.model, r.backend, r.precision, r.hardware.empty() ? fmt::format("{} threads", r.threads) : r.hardware,
      w.views, w.tokens, w.horizon, w.steps, w.batch, r.ragged ? " (ragged: at most that)" : "", r.repeat,
      r.warmup);
  out += precisions_text(r.precisions);
  if (r.recorded > 0) out += fmt::format("{} of the runs had to be recorded first\n", r.recorded);
  out += fmt::format("ready in {:.2f} s{}; peak memory {}, {} weights and workspace {}\n\n", r.ready_s,
                     r.prepared > 0 ? fmt::format(" with {} recordings", r.prepared) : "",
                     bytes_text(static_cast<double>(r.peak_rss_bytes)),
                     r.hardware.empty() ? "of it" : "and on the GPU",
                     bytes_text(static_cast<double>(r.device_bytes)));
  // A GPU's rates are a thousand times a CPU's.
  const bool tera = r.device_ms.has_value();
  const Ceilings most = ceilings(r);
  out += fmt::format("{:<14}{:>10}{:>10}{:>10}{:>9}{:>10}{:>10}{:>10}{:>9}{:>8}{:>8}{:>8}\n", "ms", "min",
                     "p50", "mean", "std", "p95", "p99", "GFLOP", tera ? "TFLOP/s" : "GFLOP/s", "of peak",
                     "GB/s", "of peak");
  out += row("end to end", r.end_to_end) +
         fmt::format("   = {:.2f} Hz\n", r.end_to_end.p50 > 0 ? 1000 / r.end_to_end.p50 : 0);
  if (r.device_ms) out += row("on the GPU", *r.device_ms) + "\n";
  for (const StageBench& s : r.stages) {
    out += row((s.name == "step" ? "    " : "  ") + s.name, s.ms);
    if (s.work.flops > 0) {
      const Rate have = rate(s);
      out += fmt::format("{:>10.4g}{:>9}{:>8}{:>8.4g}{:>8}", s.work.flops / 1e9,
                         tera ? fmt::format("{:.1f}", have.gflops / 1e3) : fmt::format("{:.0f}", have.gflops),
                         share(have.gflops, most.arithmetic), have.gbs, share(have.gbs, most.memory));
    }
    out += "\n";
  }
  out += "\n";
  if (r.gpu) out += gpu_text(*r.gpu);
  out += memory_text(r);
  out += fmt::format("actions of the first run {:016x}; of {} repeats of the same noise {} gave other bits\n",
                     r.actions_hash, r.compared_repeats, r.different_repeats);
  if (r.device_peaks)
    out += fmt::format("peaks of this GPU: {:.0f} TFLOP/s, copies {:.0f} GB/s ({})\n",
                       r.device_peaks->product_tflops, r.device_peaks->copy_gbs, r.device_peaks->source);
  if (r.peaks) {
    const Peaks& p = *r.peaks;
    out += fmt::format("peaks here, 1 / {} threads: fp32 {:.0f} / {:.0f} GFLOP/s", p.threads, p.fp32.one,
                       p.fp32.all);
    if (p.bf16.all > 0) out += fmt::format(", bf16 {:.0f} / {:.0f} GFLOP/s", p.bf16.one, p.bf16.all);
    if (p.int8.all > 0) out += fmt::format(", int8 {:.0f} / {:.0f} GOP/s", p.int8.one, p.int8.all);
    out += fmt::format(", memory read {:.1f} / {:.1f} GB/s\n", p.read.one, p.read.all);
  }
  out += batches_text(r.batches);
  if (!r.components.empty()) out += "\n" + component_text(r.components);
  return out;
}

Json bench_to_json(const BenchReport& r) {
  const WorkShape& w = r.work;
  const Ceilings most = ceilings(r);
  Json stages = Json::object(), rates = Json::object();
  for (const StageBench& s : r.stages) {
    stages[s.name] = distribution_to_json(s.ms);
    if (s.work.flops == 0) continue;
    const Rate have = rate(s);
    Json& one = rates[s.name] = work_to_json(s.work);
    one["gflops"] = have.gflops;
    one["gbs"] = have.gbs;
    one["arithmetic_percent"] = share_json(have.gflops, most.arithmetic);
    one["memory_percent"] = share_json(have.gbs, most.memory);
  }
  Json out = {{"work",
               {{"views", w.views},
                {"tokens", w.tokens},
                {"horizon", w.horizon},
                {"steps", w.steps},
                {"batch", w.batch}}},
              {"model", r.model},
              {"layout", r.layout},
              {"device", r.device},
              {"backend", r.backend},
              {"precision", r.precision},
              {"precisions", precisions_to_json(r.precisions)},
              {"weight_bytes", r.weight_bytes},
              {"hardware", r.hardware.empty() ? Json(nullptr) : Json(r.hardware)},
              {"threads", r.threads},
              {"repeat", r.repeat},
              {"warmup", r.warmup},
              {"ready_s", r.ready_s},
              {"records", {{"before_ready", r.prepared}, {"in_samples", r.recorded}}},
              {"peak_rss_bytes", r.peak_rss_bytes},
              {"device_bytes", r.device_bytes},
              {"end_to_end_ms", distribution_to_json(r.end_to_end)},
              {"device_ms", r.device_ms ? distribution_to_json(*r.device_ms) : Json(nullptr)},
              {"warmup_ms", r.warmup_ms},
              {"stages_ms", std::move(stages)},
              {"rates", std::move(rates)},
              {"peaks", r.peaks ? peaks_to_json(*r.peaks) : Json(nullptr)},
              {"device_peaks", r.device_peaks ? device_peaks_to_json(*r.device_peaks) : Json(nullptr)},
              {"gpu", r.gpu ? gpu_to_json(*r.gpu) : Json(nullptr)},
              {"memory",
               {{"opened", memory_to_json(r.opened)},
                {"settled", memory_to_json(r.settled)},
                {"ended", memory_to_json(r.ended)}}},
              {"ragged", r.ragged},
              {"actions",
               {{"hash", fmt::format("{:016x}", r.actions_hash)},
                {"compared_repeats", r.compared_repeats},
                {"different_repeats", r.different_repeats}}},
              {"batches", batches_to_json(r.batches)},
              {"machine", r.machine},
              {"build", r.build}};
  if (!r.components.empty()) out["components"] = components_to_json(r.components);
  return out;
}

}  // namespace servoflow::toolkit
