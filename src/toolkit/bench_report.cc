// How a bench report reads: a table for people, the documented JSON for programs.
#include <fmt/format.h>

#include "toolkit/bench.h"
#include "toolkit/memory_plan.h"

namespace servoflow::toolkit {
namespace {

// The ceiling of this precision's arithmetic, all threads.
double arithmetic_peak(const BenchReport& r) {
  if (!r.peaks) return 0;
  return r.precision == "bf16" && r.peaks->bf16.all > 0 ? r.peaks->bf16.all : r.peaks->fp32.all;
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

std::string row(const std::string& name, const Distribution& d) {
  return fmt::format("{:<14}{:>10.3f}{:>10.3f}{:>10.3f}{:>9.3f}{:>10.3f}{:>10.3f}", name, d.min, d.p50,
                     d.mean, d.std, d.p95, d.p99);
}

}  // namespace

std::string bench_text(const BenchReport& r) {
  const WorkShape& w = r.work;
  std::string out = fmt::format(
      "{} on {}, {}, {}\n{} views, {} tokens, horizon {}, {} steps, batch {}; {} runs after {} of "
      "warm-up\n",
      r.model, r.backend, r.precision, r.hardware.empty() ? fmt::format("{} threads", r.threads) : r.hardware,
      w.views, w.tokens, w.horizon, w.steps, w.batch, r.repeat, r.warmup);
  out += fmt::format("ready in {:.2f} s; peak memory {}, {} weights and workspace {}\n\n", r.ready_s,
                     bytes_text(static_cast<double>(r.peak_rss_bytes)),
                     r.hardware.empty() ? "of it" : "and on the GPU",
                     bytes_text(static_cast<double>(r.device_bytes)));
  out += fmt::format("{:<14}{:>10}{:>10}{:>10}{:>9}{:>10}{:>10}{:>10}{:>9}{:>8}{:>8}{:>8}\n", "ms", "min",
                     "p50", "mean", "std", "p95", "p99", "GFLOP", "GFLOP/s", "of peak", "GB/s", "of peak");
  out += row("end to end", r.end_to_end) +
         fmt::format("   = {:.2f} Hz\n", r.end_to_end.p50 > 0 ? 1000 / r.end_to_end.p50 : 0);
  for (const StageBench& s : r.stages) {
    out += row((s.name == "step" ? "    " : "  ") + s.name, s.ms);
    if (s.work.flops > 0) {
      const Rate have = rate(s);
      out += fmt::format("{:>10.4g}{:>9.0f}{:>8}{:>8.3g}{:>8}", s.work.flops / 1e9, have.gflops,
                         share(have.gflops, arithmetic_peak(r)), have.gbs,
                         share(have.gbs, r.peaks ? r.peaks->read.all : 0));
    }
    out += "\n";
  }
  if (r.peaks) {
    const Peaks& p = *r.peaks;
    out += fmt::format("\npeaks here, 1 / {} threads: fp32 {:.0f} / {:.0f} GFLOP/s", p.threads, p.fp32.one,
                       p.fp32.all);
    if (p.bf16.all > 0) out += fmt::format(", bf16 {:.0f} / {:.0f} GFLOP/s", p.bf16.one, p.bf16.all);
    if (p.int8.all > 0) out += fmt::format(", int8 {:.0f} / {:.0f} GOP/s", p.int8.one, p.int8.all);
    out += fmt::format(", memory read {:.1f} / {:.1f} GB/s\n", p.read.one, p.read.all);
  }
  if (!r.components.empty()) out += "\n" + component_text(r.components);
  return out;
}

Json bench_to_json(const BenchReport& r) {
  const WorkShape& w = r.work;
  Json stages = Json::object(), rates = Json::object();
  for (const StageBench& s : r.stages) {
    stages[s.name] = distribution_to_json(s.ms);
    if (s.work.flops == 0) continue;
    const Rate have = rate(s);
    Json& one = rates[s.name] = work_to_json(s.work);
    one["gflops"] = have.gflops;
    one["gbs"] = have.gbs;
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
              {"hardware", r.hardware.empty() ? Json(nullptr) : Json(r.hardware)},
              {"threads", r.threads},
              {"repeat", r.repeat},
              {"warmup", r.warmup},
              {"ready_s", r.ready_s},
              {"peak_rss_bytes", r.peak_rss_bytes},
              {"device_bytes", r.device_bytes},
              {"end_to_end_ms", distribution_to_json(r.end_to_end)},
              {"warmup_ms", r.warmup_ms},
              {"stages_ms", std::move(stages)},
              {"rates", std::move(rates)},
              {"peaks", r.peaks ? peaks_to_json(*r.peaks) : Json(nullptr)},
              {"machine", r.machine},
              {"build", r.build}};
  if (!r.components.empty()) out["components"] = components_to_json(r.components);
  return out;
}

}  // namespace servoflow::toolkit
