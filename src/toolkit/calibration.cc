#include "toolkit/calibration.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

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

// One tensor's values out of a file, in the shape demanded.
class Reader {
 public:
  explicit Reader(const SafetensorsFile& file) : file_(file) {}
  template <typename T>
  Result<std::vector<T>> get(const std::string& name, DType dtype, const Shape& shape) const {
    const SafeTensor* t = file_.find(name);
    if (t == nullptr || t->dtype != dtype || !(t->shape == shape))
      return Status::invalid(file_.path() + ": " + name + ": " + (t == nullptr ? "missing" : "not ") +
                             (t == nullptr ? "" : std::string(dtype_name(dtype)) + " " + shape.to_string()));
    std::vector<T> out(t->bytes.size() / sizeof(T));
    std::memcpy(out.data(), t->bytes.data(), t->bytes.size());
    return out;
  }
  Result<std::vector<quant::Histogram>> histograms(const std::string& name, std::int64_t n) const {
    SF_ASSIGN_OR_RETURN(const auto bins, get<std::uint64_t>(name, DType::kU64, {n, quant::Histogram::kBins}));
    SF_ASSIGN_OR_RETURN(const auto range, get<float>(name + "/range", DType::kF32, {n, 2}));
    SF_ASSIGN_OR_RETURN(const auto bad, get<std::uint64_t>(name + "/not_finite", DType::kU64, {n}));
    std::vector<quant::Histogram> out;
    for (std::size_t i = 0; i < static_cast<std::size_t>(n); ++i) {
      auto h = quant::Histogram::restore(
          std::span(bins).subspan(i * quant::Histogram::kBins, quant::Histogram::kBins), range[2 * i],
          range[2 * i + 1], bad[i]);
      if (!h.ok()) return h.status().with_context(file_.path() + ": " + name);
      out.push_back(std::move(*h));
    }
    return out;
  }

 private:
  const SafetensorsFile& file_;
};

Result<SiteStatistics> read_site(const SafetensorsFile& file, const std::string& name) {
  const Reader reader(file);
  SiteStatistics s;
  const SafeTensor* histogram = file.find(name + "/histogram");
  const SafeTensor* channels = file.find(name + "/channels");
  if (histogram == nullptr || histogram->shape.rank() != 2 || channels == nullptr ||
      channels->shape.rank() != 2)
    return Status::invalid(file.path() + ": " + name + ": histogram or channels missing or misshapen");
  s.width = static_cast<int>(std::min<std::int64_t>(channels->shape[1], 1 << 24));
  SF_ASSIGN_OR_RETURN(s.steps, reader.histograms(name + "/histogram", histogram->shape[0]));
  SF_ASSIGN_OR_RETURN(auto tokens, reader.histograms(name + "/tokens", 1));
  SF_ASSIGN_OR_RETURN(auto blocks, reader.histograms(name + "/blocks", 1));
  s.tokens = std::move(tokens[0]);
  s.blocks = std::move(blocks[0]);
  SF_ASSIGN_OR_RETURN(const auto values, reader.get<double>(name + "/channels", DType::kF64, {4, s.width}));
  const auto k = static_cast<std::size_t>(s.width);
  for (std::size_t i = 0; i < values.size(); ++i)
    if (!std::isfinite(values[i]) || (values[i] < 0 && i / k != 2))
      return Status::invalid(file.path() + ": " + name + "/channels: element " + std::to_string(i) + " is " +
                             std::to_string(values[i]));
  s.channel_amax.assign(values.begin(), values.begin() + s.width);
  const auto sums = [&](std::ptrdiff_t row) {
    return std::vector<double>(values.begin() + row * s.width, values.begin() + (row + 1) * s.width);
  };
  s.channel_abs = sums(1);
  s.channel_sum = sums(2);
  s.channel_square = sums(3);
  SF_ASSIGN_OR_RETURN(const auto rows, reader.get<std::uint64_t>(name + "/rows", DType::kU64, {1}));
  s.rows = rows[0];
  if (file.find(name + "/moment") != nullptr) {
    SF_ASSIGN_OR_RETURN(auto moment, reader.get<double>(name + "/moment", DType::kF64, {s.width, s.width}));
    auto restored = quant::SecondMoment::restore(s.width, s.rows, std::move(moment));
    if (!restored.ok()) return restored.status().with_context(file.path() + ": " + name);
    s.moment = std::move(*restored);
  }
  return s;
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

Result<CalibrationStatistics> read_calibration(const std::string& path) {
  SF_ASSIGN_OR_RETURN(const SafetensorsFile file, SafetensorsFile::open(path));
  const auto text = [&](const std::string& key) {
    const auto it = file.metadata().find(key);
    return it == file.metadata().end() ? std::string() : it->second;
  };
  const std::string version = text("servoflow_calibration");
  if (version != std::to_string(kCalibrationVersion))
    return Status::invalid(path + ": " +
                           (version.empty()
                                ? "not a calibration statistics file"
                                : "statistics of version " + version + ", this program reads version " +
                                      std::to_string(kCalibrationVersion)) +
                           "; make one with `servoflow calibrate`");
  CalibrationStatistics c{.weights = text("weights_sha256"),
                          .checkpoint = text("checkpoint"),
                          .device = text("device"),
                          .backend = text("backend"),
                          .precision = text("precision")};
  const std::string steps = text("denoise_steps");
  if (steps.empty() || steps.size() > 4 || steps.find_first_not_of("0123456789") != std::string::npos)
    return Status::invalid(path + ": metadata denoise_steps: \"" + steps + "\"");
  c.denoise_steps = std::stoi(steps);
  SF_ASSIGN_OR_RETURN(const Json cases, parse_json(text("cases"), path + ": metadata cases"));
  SF_ASSIGN_OR_RETURN(const Json moments, parse_json(text("moments"), path + ": metadata moments"));
  SF_ASSIGN_OR_RETURN(const Json names, parse_json(text("sites"), path + ": metadata sites"));
  const Status shape =
      Status::invalid(path + ": metadata cases, moments or sites: not as this program writes them");
  if (!cases.is_array() || !moments.is_array() || !names.is_array()) return shape;
  for (const Json& one : cases) {
    if (!one.is_object() || !one.contains("name") || !one["name"].is_string() || !one.contains("sha256") ||
        !one["sha256"].is_string())
      return shape;
    c.cases.push_back({one["name"], one["sha256"]});
  }
  for (const Json& one : moments) {
    if (!one.is_string()) return shape;
    c.moments.push_back(one);
  }
  for (const Json& one : names) {
    if (!one.is_string()) return shape;
    SF_ASSIGN_OR_RETURN(c.sites[one.get<std::string>()], read_site(file, one));
  }
  if (c.digest() != text("sha256"))
    return Status::invalid(
        path + ": its SHA-256 does not agree with what it holds: damaged or edited; calibrate again");
  return c;
}

}  // namespace servoflow::toolkit
