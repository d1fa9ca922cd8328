#include "toolkit/ranges.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "core/status_macros.h"
#include "quant/methods/weight_grid.h"

namespace servoflow::toolkit {
namespace {

double decibels(double signal, double noise) {
  return noise > 0 && signal > 0 ? 10 * std::log10(signal / noise) : 0;
}

std::string short_site(std::string name) {
  for (const auto& [from, to] :
       {std::pair<std::string, std::string>{
            "paligemma_with_expert.paligemma.model.vision_tower.vision_model.encoder.", "vision."},
        {"paligemma_with_expert.paligemma.model.language_model.", "prefix."},
        {"paligemma_with_expert.gemma_expert.model.", "expert."},
        {"paligemma_with_expert.paligemma.model.", ""}})
    if (name.starts_with(from)) return to + name.substr(from.size());
  return name;
}

}  // namespace

Result<RangeReport> ranges(const CalibrationStatistics& statistics, const RangeOptions& options) {
  RangeReport report{.statistics = statistics.digest(),
                     .code = std::string(quant::code_name(options.code)),
                     .options = options};
  const quant::Lattice lattice = quant::lattice_of(options.code);
  for (const auto& [name, site] : statistics.sites) {
    SiteRange r{.name = name};
    const quant::Histogram all = site.all_steps();
    r.values = all.count();
    r.amax = all.amax();
    r.beyond = all.above(options.limit);
    float least = INFINITY;
    for (const quant::Histogram& h : site.steps) {
      r.step_amax.push_back(h.amax());
      r.step_beyond.push_back(h.above(options.limit));
      least = std::min(least, h.amax());
    }
    r.drift = least > 0 ? static_cast<double>(r.amax) / static_cast<double>(least) : INFINITY;
    if (const auto p = quant::clipping_threshold(all, lattice, {quant::Calibrator::kPercentile, 0.9999});
        p.ok())
      r.percentile = *p;
    Result<float> clip = quant::clipping_threshold(all, lattice, options.calibrator);
    if (!clip.ok()) return clip.status().with_context(name);
    r.clip = *clip;
    r.clipped = r.clip < r.amax ? all.above(r.clip) : 0;
    double signal = 0;
    for (const double s : site.channel_square) signal += s;
    signal /= static_cast<double>(std::max<std::uint64_t>(1, all.count()));
    r.snr_db = decibels(signal, quant::histogram_mse(all, lattice, r.clip));
    r.snr_full_db = decibels(signal, quant::histogram_mse(all, lattice, r.amax));
    std::vector<float> channels = site.channel_amax;
    if (!channels.empty()) {
      const auto middle = channels.begin() + static_cast<std::ptrdiff_t>(channels.size() / 2);
      std::nth_element(channels.begin(), middle, channels.end());
      if (*middle > 0) r.channel_ratio = static_cast<double>(r.amax) / static_cast<double>(*middle);
    }
    r.flagged = r.beyond > 0 || r.drift > options.drift;
    report.flagged += r.flagged;
    report.sites.push_back(std::move(r));
  }
  return report;
}

std::string ranges_text(const RangeReport& report, bool all) {
  std::string out = fmt::format(
      "Inputs of {} sites, rounded to {} with one scale per tensor; statistics "
      "{}\n\n{:<44}{:>10}{:>10}{:>8}{:>9}{:>10}{:>9}{:>9}{:>9}\n",
      report.sites.size(), report.code, report.statistics.substr(0, 16), "site", "amax", "p99.99", "drift",
      "channels", "clip", "clipped", "SNR dB", "full");
  int shown = 0;
  for (const SiteRange& r : report.sites) {
    if (!all && !r.flagged) continue;
    ++shown;
    out += fmt::format(
        "{:<44}{:>10.4g}{:>10.4g}{:>7.1f}x{:>8.1f}x{:>10.4g}{:>9}{:>9.1f}{:>9.1f}{}\n", short_site(r.name),
        r.amax, r.percentile, r.drift, r.channel_ratio, r.clip, r.clipped, r.snr_db, r.snr_full_db,
        r.beyond > 0 ? fmt::format("  {} values beyond {:g}", r.beyond, report.options.limit) : "");
  }
  if (shown == 0) out += "(none flagged; --all shows every site)\n";
  return out + fmt::format(
                   "\n{} of {} flagged: values beyond {:g}, or ranges of denoise steps that differ by more "
                   "than {:g}x.\n"
                   "drift: largest over smallest range of the steps. channels: the largest channel over the "
                   "median one.\n",
                   report.flagged, report.sites.size(), report.options.limit, report.options.drift);
}

Json ranges_to_json(const RangeReport& report) {
  Json sites = Json::array();
  const auto number = [](double v) { return std::isfinite(v) ? Json(v) : Json(nullptr); };
  for (const SiteRange& r : report.sites)
    sites.push_back({{"name", r.name},
                     {"values", r.values},
                     {"amax", r.amax},
                     {"step_amax", r.step_amax},
                     {"drift", number(r.drift)},
                     {"p9999", r.percentile},
                     {"beyond", r.beyond},
                     {"step_beyond", r.step_beyond},
                     {"clip", r.clip},
                     {"clipped", r.clipped},
                     {"snr_db", r.snr_db},
                     {"snr_full_db", r.snr_full_db},
                     {"channel_ratio", number(r.channel_ratio)},
                     {"flagged", r.flagged}});
  return {{"statistics", report.statistics},
          {"code", report.code},
          {"limit", report.options.limit},
          {"flagged", report.flagged},
          {"sites", sites}};
}

HtmlReport ranges_html(const RangeReport& report) {
  HtmlReport html("servoflow ranges");
  Json traces = Json::array();
  Json x = Json::array(), y = Json::array(), z = Json::array();
  for (const SiteRange& r : report.sites) {
    if (r.step_amax.size() < 2) continue;
    Json row = Json::array();
    for (const float a : r.step_amax) row.push_back(std::log2(std::max(a, 1e-9f)));
    if (x.empty())
      for (std::size_t j = 0; j < r.step_amax.size(); ++j) x.push_back(j);
    y.push_back(short_site(r.name));
    z.push_back(row);
  }
  html.section("Ranges");
  if (!y.empty())
    html.figure("log2 of the largest input by denoise step",
                Json::array({{{"type", "heatmap"}, {"x", x}, {"y", y}, {"z", z}}}),
                {{"height", 200 + 16 * static_cast<int>(y.size())}, {"margin", {{"l", 260}}}});
  html.section("All sites").preformatted(ranges_text(report, true));
  html.data("ranges", ranges_to_json(report));
  return html;
}

}  // namespace servoflow::toolkit
