#include "toolkit/calibration.h"

#include <algorithm>
#include <cmath>

#include "core/json.h"
#include "core/safetensors.h"
#include "core/status_macros.h"
#include "toolkit/digest.h"

namespace servoflow::toolkit {
namespace {

constexpr int kBlock = 16;

struct Part {
  SafetensorsWriter::Entry entry;
  std::vector<std::byte> bytes;
};

template <typename T>
Part part(std::string name, DType dtype, Shape shape, const std::vector<T>& values) {
  const std::span<const std::byte> bytes = std::as_bytes(std::span(values));
  return {{std::move(name), dtype, shape}, {bytes.begin(), bytes.end()}};
}

void add_histograms(const std::string& name, std::span<const quant::Histogram> histograms,
                    std::vector<Part>& out) {
  std::vector<std::uint64_t> bins, bad;
  std::vector<float> range;
  for (const quant::Histogram& h : histograms) {
    bins.insert(bins.end(), h.bins().begin(), h.bins().end());
    range.push_back(h.limit());
    range.push_back(h.amax());
    bad.push_back(h.not_finite());
  }
  const auto n = static_cast<std::int64_t>(histograms.size());
  out.push_back(part(name, DType::kU64, {n, quant::Histogram::kBins}, bins));
  out.push_back(part(name + "/range", DType::kF32, {n, 2}, range));
  out.push_back(part(name + "/not_finite", DType::kU64, {n}, bad));
}

std::vector<Part> parts_of(const std::string& name, const SiteStatistics& s) {
  std::vector<Part> out;
  add_histograms(name + "/histogram", s.steps, out);
  add_histograms(name + "/tokens", {&s.tokens, 1}, out);
  add_histograms(name + "/blocks", {&s.blocks, 1}, out);
  std::vector<double> channels(s.channel_amax.begin(), s.channel_amax.end());
  for (const auto* sums : {&s.channel_abs, &s.channel_sum, &s.channel_square})
    channels.insert(channels.end(), sums->begin(), sums->end());
  out.push_back(part(name + "/channels", DType::kF64, {4, s.width}, channels));
  out.push_back(part(name + "/rows", DType::kU64, {1}, std::vector<std::uint64_t>{s.rows}));
  if (s.moment)
    out.push_back(part(name + "/moment", DType::kF64, {s.width, s.width},
                       std::vector<double>(s.moment->sums().begin(), s.moment->sums().end())));
  return out;
}

std::map<std::string, std::string> metadata_of(const CalibrationStatistics& c) {
  Json cases = Json::array(), moments = c.moments;
  for (const auto& one : c.cases) cases.push_back({{"name", one.name}, {"sha256", one.digest}});
  return {{"servoflow_calibration", std::to_string(kCalibrationVersion)},
          {"weights_sha256", c.weights},
          {"checkpoint", c.checkpoint},
          {"device", c.device},
          {"backend", c.backend},
          {"precision", c.precision},
          {"denoise_steps", std::to_string(c.denoise_steps)},
          {"moments", moments.dump()},
          {"cases", cases.dump()}};
}

}  // namespace

void SiteStatistics::add(int step, std::span<const float> x) {
  const auto k = static_cast<std::size_t>(width);
  const auto index = static_cast<std::size_t>(std::max(step, 0));
  if (steps.size() <= index) steps.resize(index + 1);
  steps[index].add(x);
  if (channel_amax.empty()) {
    channel_amax.resize(k);
    channel_abs.resize(k);
    channel_sum.resize(k);
    channel_square.resize(k);
  }
  std::vector<float> amax_of_blocks((k + kBlock - 1) / kBlock);
  for (std::size_t r = 0; r < x.size() / k; ++r) {
    std::fill(amax_of_blocks.begin(), amax_of_blocks.end(), 0.0f);
    for (std::size_t c = 0; c < k; ++c) {
      const float v = x[r * k + c], a = std::fabs(v);
      channel_amax[c] = std::max(channel_amax[c], a);
      channel_abs[c] += static_cast<double>(a);
      channel_sum[c] += static_cast<double>(v);
      channel_square[c] += static_cast<double>(v) * static_cast<double>(v);
      amax_of_blocks[c / kBlock] = std::max(amax_of_blocks[c / kBlock], a);
    }
    blocks.add(amax_of_blocks);
    tokens.add({&*std::max_element(amax_of_blocks.begin(), amax_of_blocks.end()), 1});
    ++rows;
  }
  if (moment) moment->add(x);
}

quant::Histogram SiteStatistics::all_steps() const {
  quant::Histogram out;
  for (const quant::Histogram& h : steps) out.add(h);
  return out;
}

std::string CalibrationStatistics::digest() const {
  Digest digest;
  for (const auto& [key, value] : metadata_of(*this)) {
    digest.add(key);
    digest.add(value);
  }
  for (const auto& [name, site] : sites) {
    if (site.rows == 0) continue;
    for (const Part& p : parts_of(name, site)) {
      digest.add(p.entry.name);
      digest.add(p.bytes);
    }
  }
  return digest.hex();
}

Status write_calibration(const CalibrationStatistics& statistics, const std::string& path) {
  std::map<std::string, std::string> metadata = metadata_of(statistics);
  metadata["sha256"] = statistics.digest();
  std::vector<SafetensorsWriter::Entry> entries;
  std::vector<std::string> names;
  for (const auto& [name, site] : statistics.sites) {
    if (site.rows == 0) continue;
    for (const Part& p : parts_of(name, site)) entries.push_back(p.entry);
    names.push_back(name);
  }
  metadata["sites"] = Json(names).dump();
  SF_ASSIGN_OR_RETURN(const auto file, SafetensorsWriter::create(path, entries, metadata));
  for (const auto& [name, site] :
       statistics.sites) {  // made once more, so that one site's bytes at a time are in memory
    if (site.rows == 0) continue;
    for (const Part& p : parts_of(name, site)) SF_RETURN_IF_ERROR(file->write(p.bytes));
  }
  return file->finish();
}

}  // namespace servoflow::toolkit
