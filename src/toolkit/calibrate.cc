#include "toolkit/calibrate.h"

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <set>

#include "core/status_macros.h"
#include "quant/patterns.h"
#include "toolkit/case_runner.h"
#include "toolkit/digest.h"
#include "toolkit/linears.h"

namespace servoflow::toolkit {
namespace {

// Whether one of these globs names a layer of the site.
bool keeps_moment(const Site& site, const std::vector<std::string>& globs) {
  return std::any_of(globs.begin(), globs.end(), [&](const std::string& glob) {
    return std::any_of(site.linears.begin(), site.linears.end(),
                       [&](const std::string& linear) { return quant::glob_matches(glob, linear); });
  });
}

// Adds what goes into each site.
class InputTap : public CaseTap {
 public:
  InputTap(const weights::Architecture& architecture, CalibrationStatistics& statistics) {
    for (const Site& site : sites(architecture)) {
      SiteStatistics& s = statistics.sites[site.linears.front()];
      s.width = site.width;
      if (keeps_moment(site, statistics.moments) && !s.moment) s.moment.emplace(site.width);
      index_[site.linears.front()] = &s;
    }
  }
  bool wants(std::string_view) const override { return false; }
  void record(std::string_view, std::span<const float>, const Shape&) override {}
  bool wants_inputs() const override { return true; }
  void input(std::string_view weights, int step, std::span<const float> rows, const Shape& shape) override {
    std::string first(weights.substr(0, weights.find(' ')));
    if (first.ends_with(".weight")) first.resize(first.size() - 7);
    const auto it = index_.find(first);
    if (it == index_.end()) return;  // a projection in high precision
    if (shape[1] == it->second->width) it->second->add(step, rows);
  }

 private:
  std::map<std::string, SiteStatistics*> index_;
};

Status fits(const CalibrationStatistics& old, const CalibrationStatistics& now, const std::string& path) {
  const auto differs = [&](const std::string& what, const std::string& a, const std::string& b) {
    return Status::invalid(path + ": holds statistics of " + what + " " + a + ", this run has " + b +
                           "; choose another file, or remove it");
  };
  if (old.weights != now.weights)
    return differs("weights", old.weights.substr(0, 12), now.weights.substr(0, 12));
  if (old.precision != now.precision) return differs("precision", old.precision, now.precision);
  if (old.device != now.device) return differs("device", old.device, now.device);
  if (old.denoise_steps != now.denoise_steps)
    return differs("schedules of", std::to_string(old.denoise_steps) + " steps",
                   std::to_string(now.denoise_steps) + " steps");
  if (old.moments != now.moments)
    return differs("second moments", Json(old.moments).dump(), Json(now.moments).dump());
  return {};
}

// What a file holds is added to, channel by channel: its digest says that it is whole, not that it was made
// for this network.
Status fits_network(const CalibrationStatistics& old, const weights::Architecture& architecture,
                    const std::string& path) {
  std::map<std::string, const Site*> known;
  const std::vector<Site> all = sites(architecture);
  for (const Site& site : all) known[site.linears.front()] = &site;
  for (const auto& [name, statistics] : old.sites) {
    const auto site = known.find(name);
    if (site == known.end())
      return Status::invalid(path + ": " + name + " is no layer of this network; choose another file");
    if (statistics.width != site->second->width)
      return Status::invalid(path + ": " + name + " has " + std::to_string(statistics.width) +
                             " input channels there, " + std::to_string(site->second->width) +
                             " in the checkpoint; choose another file");
    if (statistics.moment.has_value() != keeps_moment(*site->second, old.moments))
      return Status::invalid(path + ": " + name + (statistics.moment ? " has" : " lacks") +
                             " second moments, against the file's own list of them; choose another file");
  }
  return {};
}

// Evenly spread over the folder in the order of names, which is the order of episodes: not the first ones
// only.
std::vector<CaseFile> spread(std::vector<CaseFile> all, int limit) {
  if (limit <= 0 || static_cast<std::size_t>(limit) >= all.size()) return all;
  std::vector<CaseFile> out;
  for (int i = 0; i < limit; ++i)
    out.push_back(std::move(all[static_cast<std::size_t>(i) * all.size() / static_cast<std::size_t>(limit)]));
  return out;
}

}  // namespace

Result<CalibrateReport> calibrate(const std::string& checkpoint, const CalibrateOptions& options) {
  if (options.out.empty()) return Status::invalid("calibrate: no file to write the statistics to");
  SF_ASSIGN_OR_RETURN(weights::Checkpoint opened, weights::open_checkpoint(checkpoint));
  const std::string folder =
      options.cases.empty() ? (std::filesystem::path(checkpoint) / "cases").string() : options.cases;
  SF_ASSIGN_OR_RETURN(std::vector<CaseFile> all, read_cases(folder));
  const std::vector<CaseFile> cases = spread(std::move(all), options.limit);

  CalibrateReport report;
  CalibrationStatistics& now = report.statistics;
  now.checkpoint = checkpoint;
  now.moments = options.moments;
  now.denoise_steps = options.steps > 0 ? options.steps : opened.architecture.default_steps;
  const std::vector<quant::Linear> linears = linear_layers(opened.architecture);
  for (const std::string& glob : options.moments)
    if (std::none_of(linears.begin(), linears.end(),
                     [&](const auto& l) { return quant::glob_matches(glob, l.name); }))
      return Status::invalid("--moments " + glob + ": matches no linear layer of " + checkpoint);
  SF_ASSIGN_OR_RETURN(now.weights, weights_digest(opened, options.loading));

  const weights::Architecture architecture = opened.architecture;
  SF_ASSIGN_OR_RETURN(const auto runner, CaseRunner::open(std::move(opened), cases,
                                                          {.device = options.device,
                                                           .precision = options.precision,
                                                           .tokenizer = options.tokenizer,
                                                           .assets = options.assets,
                                                           .threads = options.threads,
                                                           .loading = options.loading}));
  now.device = runner->info().device;
  now.backend = runner->info().backend;
  now.precision = runner->info().precision;
  std::error_code ignored;
  if (std::filesystem::exists(options.out, ignored)) {
    SF_ASSIGN_OR_RETURN(CalibrationStatistics old, read_calibration(options.out));
    SF_RETURN_IF_ERROR(fits(old, now, options.out));
    SF_RETURN_IF_ERROR(fits_network(old, architecture, options.out));
    now = std::move(old);
  }
  std::set<std::string> done;
  for (const auto& one : now.cases) done.insert(one.digest);

  InputTap tap(architecture, now);
  using Clock = std::chrono::steady_clock;
  Clock::time_point saved = Clock::now();
  for (std::size_t i = 0; i < cases.size(); ++i) {
    const CaseFile& c = cases[i];
    SF_ASSIGN_OR_RETURN(const std::string digest, file_digest(c.file.path()));
    if (done.contains(digest)) {
      ++report.skipped;
      continue;
    }
    if (options.running) options.running(static_cast<int>(i), static_cast<int>(cases.size()), c.name);
    const Result<CaseOutcome> outcome = runner->run(c, &tap, now.denoise_steps);
    if (!outcome.ok()) return outcome.status().with_context(c.file.path());
    for (const auto& [name, site] : now.sites)
      for (const quant::Histogram& h : site.steps)
        if (h.not_finite() > 0)
          return Status::invalid(c.file.path() + ": inputs of " + name +
                                 " are not finite; leave this case out");
    now.cases.push_back({c.name, digest});
    done.insert(digest);
    ++report.run;
    if (std::chrono::duration<double>(Clock::now() - saved).count() > options.save_every_seconds) {
      SF_RETURN_IF_ERROR(write_calibration(now, options.out));
      saved = Clock::now();
    }
  }
  if (report.run > 0) SF_RETURN_IF_ERROR(write_calibration(now, options.out));
  std::erase_if(now.sites, [](const auto& site) { return site.second.rows == 0; });  // never computed
  return report;
}

}  // namespace servoflow::toolkit
