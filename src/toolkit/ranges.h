// Which layers' inputs a low-precision format cannot hold: ranges by layer and step, saturation, and what
// clipping costs.
#pragma once

#include <string>
#include <vector>

#include "core/json.h"
#include "quant/formats.h"
#include "quant/methods/histogram.h"
#include "toolkit/calibration.h"
#include "toolkit/html_report.h"

namespace servoflow::toolkit {

struct RangeOptions {
  quant::Code code = quant::Code::kE4M3;  // that inputs are rounded to
  quant::CalibratorOptions calibrator;    // where the range is clipped
  // Magnitudes beyond this are flagged: 448 · 6 is the most that NVFP4 holds with a global scale of 1.
  float limit = 2688;
  double drift = 4;                       // largest over smallest range of a site's steps that is flagged
  std::string statistics = "STATISTICS";  // their file, for the command that clips
};

struct SiteRange {
  std::string name;
  std::uint64_t values = 0;
  float amax = 0;
  std::vector<float> step_amax;  // by step; one for layers before the first
  double drift = 1;              // largest / smallest of them
  float percentile = 0;          // 99.99 % of all values lie below; 0 if there are too few to tell
  std::uint64_t beyond = 0;      // values beyond the limit
  std::vector<std::uint64_t> step_beyond;
  float clip = 0;             // the threshold chosen
  std::uint64_t clipped = 0;  // values beyond it
  double snr_db = 0,
         snr_full_db = 0;    // of rounding with the clip, and with the whole range, one scale per tensor
  double channel_ratio = 1;  // largest channel's range over the median channel's: outliers
  bool flagged = false;
};

// What to clip where values lie beyond the limit.
struct ClipAdvice {
  int beyond = 0;  // sites with such values
  int sites = 0;   // those of them that the calibrator clips
  // The one asked for. Where that is minmax, which clips nothing: percentile, or mse if there are too few
  // values for that.
  quant::CalibratorOptions calibrator;
  bool too_few = false;            // mse for that reason
  std::vector<std::string> globs;  // that name these sites and no other one
  std::string command;             // of servoflow quantize, for a shell; empty if no site is to be clipped
};

struct RangeReport {
  std::vector<SiteRange> sites;  // by name
  int flagged = 0;
  ClipAdvice advice;
  std::string statistics, code;
  RangeOptions options;
};

Result<RangeReport> ranges(const CalibrationStatistics& statistics, const RangeOptions& options);
std::string ranges_text(const RangeReport& report, bool all);
Json ranges_to_json(const RangeReport& report);
HtmlReport ranges_html(const RangeReport& report);

}  // namespace servoflow::toolkit
