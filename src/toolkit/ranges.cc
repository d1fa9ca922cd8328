#include "toolkit/ranges.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <filesystem>
#include <set>

#include "core/status_macros.h"
#include "quant/methods/weight_grid.h"
#include "quant/patterns.h"

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

// The folder's own name, also of "." and "policy/"; empty for the root.
std::string named_after(const std::string& folder) {
  std::error_code failed;
  std::filesystem::path path = std::filesystem::absolute(folder, failed).lexically_normal();
  if (failed) return {};
  if (!path.has_filename()) path = path.parent_path();
  return path.filename().string();
}

// For a POSIX shell, and no option.
std::string quoted(const std::string& bare) {
  const std::string word = bare.starts_with('-') ? "./" + bare : bare;
  const auto plain = [](unsigned char c) {
    return std::isalnum(c) || std::string_view("/._-+=:,@%").find(static_cast<char>(c)) != std::string::npos;
  };
  if (!word.empty() && std::all_of(word.begin(), word.end(), plain)) return word;
  std::string out = "'";
  for (const char c : word) out += c == '\'' ? "'\\''" : std::string(1, c);
  return out + "'";
}

// The names as they are, or all layers of a kind as one glob where that names no site beside.
std::vector<std::string> globs_of(const std::vector<std::string>& names, const CalibrationStatistics& all) {
  std::vector<std::string> out;
  const std::set<std::string> wanted(names.begin(), names.end());
  for (const std::string& name : names) {
    std::string glob = name;
    const std::size_t layer = name.find("layers.");
    const std::size_t end = layer == std::string::npos ? layer : name.find('.', layer + 7);
    if (end != std::string::npos) {
      const std::string any = name.substr(0, layer + 7) + "*" + name.substr(end);
      const auto spared = [&](const auto& site) {
        return quant::glob_matches(any, site.first) && !wanted.contains(site.first);
      };
      if (std::none_of(all.sites.begin(), all.sites.end(), spared)) glob = any;
    }
    if (std::find(out.begin(), out.end(), glob) == out.end()) out.push_back(glob);
  }
  return out;
}

// The recipe whose inputs have this code and a calibrated scale: what clipping is about.
const char* static_recipe(quant::Code code) {
  return code == quant::Code::kInt8   ? "int8-w8a8-static"
         : code == quant::Code::kE2M1 ? "nvfp4-w4a4"
                                      : "fp8-w8a8-static";
}

std::string clip_command(const CalibrationStatistics& statistics, const RangeOptions& options,
                         const ClipAdvice& advice) {
  const std::string recipe = static_recipe(options.code);
  const std::string name = named_after(statistics.checkpoint);
  std::string out = "servoflow quantize " + quoted(statistics.checkpoint) + " " +
                    quoted((name.empty() ? "policy" : name) + "-" + recipe) + " --recipe " + recipe +
                    " --statistics " + quoted(options.statistics);
  // Smoothing, which INT8 inputs get unasked, would move what was measured.
  if (options.code == quant::Code::kInt8) out += " --smooth none";
  out += fmt::format(" --calibrator {}", quant::calibrator_name(advice.calibrator.kind));
  if (advice.calibrator.kind == quant::Calibrator::kPercentile)
    out += fmt::format(" --percentile {}", advice.calibrator.percentile);
  for (const std::string& glob : advice.globs) out += " --clip " + quoted(glob);
  return out;
}

// Fills in the sites that this calibrator clips.
Status clip_by(const quant::CalibratorOptions& calibrator, const CalibrationStatistics& statistics,
               const RangeOptions& options, const std::vector<const SiteRange*>& beyond, ClipAdvice& advice) {
  std::vector<std::string> names;
  for (const SiteRange* r : beyond) {
    const Result<float> clip = quant::clipping_threshold(statistics.sites.at(r->name).all_steps(),
                                                         quant::lattice_of(options.code), calibrator);
    if (!clip.ok()) return clip.status().with_context(r->name);
    if (*clip < r->amax) names.push_back(r->name);
  }
  advice.calibrator = calibrator;
  advice.sites = static_cast<int>(names.size());
  advice.globs = globs_of(names, statistics);
  if (!names.empty()) advice.command = clip_command(statistics, options, advice);
  return {};
}

Result<ClipAdvice> advise(const CalibrationStatistics& statistics, const RangeOptions& options,
                          const std::vector<SiteRange>& sites) {
  ClipAdvice advice{.calibrator = options.calibrator};
  std::vector<const SiteRange*> beyond;
  for (const SiteRange& r : sites)
    if (r.beyond > 0) beyond.push_back(&r);
  advice.beyond = static_cast<int>(beyond.size());
  quant::CalibratorOptions calibrator = options.calibrator;
  if (calibrator.kind == quant::Calibrator::kMinMax) {
    const double left = 1 - calibrator.percentile;
    if (!(left > 0 && left < 1))
      return Status::invalid(
          fmt::format("--percentile is a share between 0 and 1, not {}", calibrator.percentile));
    const bool few = std::any_of(beyond.begin(), beyond.end(), [&](const SiteRange* r) {
      return static_cast<double>(r->values) * left < 1;
    });
    calibrator.kind = few ? quant::Calibrator::kMse : quant::Calibrator::kPercentile;
    advice.too_few = few;
  }
  SF_RETURN_IF_ERROR(clip_by(calibrator, statistics, options, beyond, advice));
  return advice;
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
  SF_ASSIGN_OR_RETURN(report.advice, advise(statistics, options, report.sites));
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
  out += fmt::format(
      "\n{} of {} flagged: values beyond {:g}, or ranges of denoise steps that differ by more "
      "than {:g}x.\n"
      "drift: largest over smallest range of the steps. channels: the largest channel over the "
      "median one.\n",
      report.flagged, report.sites.size(), report.options.limit, report.options.drift);
  const ClipAdvice& advice = report.advice;
  if (advice.beyond == 0) return out;
  if (advice.too_few)
    out += fmt::format("\nA site has too few values for percentile {}: what follows is by mse.\n",
                       advice.calibrator.percentile);
  const std::string_view by = quant::calibrator_name(advice.calibrator.kind);
  if (advice.sites < advice.beyond)
    out += fmt::format(
        "\n{} of the {} sites with values beyond {:g} keep their whole range by {}; another "
        "--calibrator may clip them.\n",
        advice.beyond - advice.sites, advice.beyond, report.options.limit, by);
  if (advice.sites > 0)
    out += fmt::format("\nTo clip {} sites with values beyond {:g}, by {}, and no other:\n  {}\n",
                       advice.sites, report.options.limit, by, advice.command);
  return out;
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
          {"clip",
           {{"beyond", report.advice.beyond},
            {"sites", report.advice.sites},
            {"calibrator", quant::calibrator_name(report.advice.calibrator.kind)},
            {"too_few_values", report.advice.too_few},
            {"globs", report.advice.globs},
            {"command", report.advice.command.empty() ? Json(nullptr) : Json(report.advice.command)}}},
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
