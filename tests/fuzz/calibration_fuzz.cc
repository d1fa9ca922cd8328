// Statistics of calibration: refused with a reason, or something that ranges, calibrators and more inputs can
// work with. The parser is entered behind the digest, which no fuzzer would guess.
//
// The input is the header of a safetensors file, a NUL, and its data, in which a NUL and a byte n stand for
// n + 1 zeros, or from 64 on for (n - 63) * 64 of them: histograms are mostly zeros.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "tests/fuzz/fuzz.h"
#include "toolkit/calibration.h"
#include "toolkit/ranges.h"

namespace servoflow::toolkit {
namespace {

using fuzz::accepted;
using fuzz::require;

constexpr std::size_t kMaxFile = std::size_t{1} << 19;

std::vector<std::byte> file_of(std::string_view input) {
  const std::size_t end = std::min(input.find('\0'), input.size());
  std::vector<std::byte> out;
  for (int i = 0; i < 8; ++i) out.push_back(static_cast<std::byte>((end >> (8 * i)) & 0xff));
  for (const char c : input.substr(0, end)) out.push_back(static_cast<std::byte>(c));
  for (std::size_t i = end + 1; i < input.size() && out.size() < kMaxFile; ++i) {
    if (input[i] != 0 || i + 1 == input.size()) {
      out.push_back(static_cast<std::byte>(input[i]));
      continue;
    }
    const std::size_t n = static_cast<unsigned char>(input[++i]);
    out.resize(out.size() + (n < 64 ? n + 1 : (n - 63) * 64));
  }
  return out;
}

void use(CalibrationStatistics statistics) {
  for (auto& [name, site] : statistics.sites) {
    const auto width = static_cast<std::size_t>(site.width);
    require(site.rows > 0 && width > 0 && !site.steps.empty());
    for (const auto* sums : {&site.channel_abs, &site.channel_sum, &site.channel_square})
      require(sums->size() == width &&
              std::all_of(sums->begin(), sums->end(), [](double v) { return std::isfinite(v); }));
    require(site.channel_amax.size() == width);
    for (const float a : site.channel_amax) require(std::isfinite(a) && a >= 0);
    const quant::Histogram all = site.all_steps();
    require(all.count() + all.not_finite() == site.rows * width);
    if (site.moment) require(site.moment->k() == site.width && site.moment->rows() == site.rows);
  }
  require(statistics.digest().size() == 64);
  using quant::Calibrator;
  for (const Calibrator kind :
       {Calibrator::kMinMax, Calibrator::kPercentile, Calibrator::kMse, Calibrator::kKl}) {
    // kKl alone takes longer than all else.
    if (kind == Calibrator::kKl && statistics.sites.size() > 1) continue;
    const auto report = ranges(statistics, {.calibrator = {kind, 0.5}, .limit = 2});
    if (!accepted(report)) continue;
    require(!ranges_text(*report, true).empty());
    for (const SiteRange& r : report->sites)
      require(std::isfinite(r.clip) && r.clip >= 0 && r.clip <= r.amax);
  }
  for (auto& [name, site] : statistics.sites) {  // a run that is continued
    const std::uint64_t rows = site.rows;
    site.add(static_cast<int>(site.steps.size()) - 1,
             std::vector<float>(static_cast<std::size_t>(site.width), 3.0f));
    require(site.rows == rows + 1);
  }
}

}  // namespace
}  // namespace servoflow::toolkit

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  namespace toolkit = servoflow::toolkit;
  const std::vector<std::byte> bytes = toolkit::file_of(servoflow::fuzz::as_text(data, size));
  const auto file = servoflow::SafetensorsFile::parse(bytes, "fuzz");
  if (!servoflow::fuzz::accepted(file)) return 0;
  auto statistics = toolkit::calibration_from_file(*file);
  if (servoflow::fuzz::accepted(statistics)) toolkit::use(std::move(*statistics));
  return 0;
}
