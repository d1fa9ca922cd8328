// Reading a statistics file: nothing in it is taken on trust.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <set>

#include "core/json.h"
#include "core/safetensors.h"
#include "core/status_macros.h"
#include "toolkit/calibration.h"

namespace servoflow::toolkit {
namespace {

constexpr std::int64_t kMaxWidth = 1 << 24;
constexpr std::int64_t kMaxSteps = 50;
constexpr std::uint64_t kMaxCount = std::uint64_t{1} << 62;
constexpr int kBlock = 16;
constexpr const char* kChannelRows[] = {"largest magnitude", "sum of magnitudes", "sum", "sum of squares"};

// A histogram that says how many values it saw: `count` of them, finite or not.
Status check_count(const quant::Histogram& h, std::uint64_t count, const std::string& name) {
  if (h.not_finite() <= count && h.count() == count - h.not_finite()) return {};
  return Status::invalid(name + ": holds " + std::to_string(h.count()) + " finite values and " +
                         std::to_string(h.not_finite()) + " others, expected " + std::to_string(count) +
                         " in all");
}

// Tensors of one file, each in the shape demanded.
class Reader {
 public:
  explicit Reader(const SafetensorsFile& file) : file_(file) {}

  const SafeTensor* find(const std::string& name) const { return file_.find(name); }
  Status error(const std::string& what) const { return Status::invalid(file_.path() + ": " + what); }

  template <typename T>
  Result<std::vector<T>> get(const std::string& name, DType dtype, const Shape& shape) {
    const SafeTensor* t = file_.find(name);
    const std::string expected = std::string(dtype_name(dtype)) + " " + shape.to_string();
    if (t == nullptr) return error(name + ": missing, expected " + expected);
    if (t->dtype != dtype || !(t->shape == shape))
      return error(name + ": is " + std::string(dtype_name(t->dtype)) + " " + t->shape.to_string() +
                   ", expected " + expected);
    taken_.insert(name);
    std::vector<T> out(t->bytes.size() / sizeof(T));
    if (!out.empty()) std::memcpy(out.data(), t->bytes.data(), t->bytes.size());
    return out;
  }

  Result<std::vector<quant::Histogram>> histograms(const std::string& name, std::int64_t n) {
    SF_ASSIGN_OR_RETURN(const auto bins, get<std::uint64_t>(name, DType::kU64, {n, quant::Histogram::kBins}));
    SF_ASSIGN_OR_RETURN(const auto range, get<float>(name + "/range", DType::kF32, {n, 2}));
    SF_ASSIGN_OR_RETURN(const auto bad, get<std::uint64_t>(name + "/not_finite", DType::kU64, {n}));
    std::vector<quant::Histogram> out;
    for (std::size_t i = 0; i < static_cast<std::size_t>(n); ++i) {
      auto h = quant::Histogram::restore(
          std::span(bins).subspan(i * quant::Histogram::kBins, quant::Histogram::kBins), range[2 * i],
          range[2 * i + 1], bad[i]);
      if (!h.ok()) return h.status().with_context(file_.path() + ": " + name + ": row " + std::to_string(i));
      out.push_back(std::move(*h));
    }
    return out;
  }

  // What no site has asked for.
  Status check_all_taken() const {
    for (const SafeTensor& t : file_.tensors())
      if (!taken_.contains(t.name)) return error(t.name + ": belongs to none of the sites in the metadata");
    return {};
  }

 private:
  const SafetensorsFile& file_;
  std::set<std::string> taken_;
};

Status read_channels(Reader& reader, const std::string& name, SiteStatistics& s) {
  const std::string field = name + "/channels";
  SF_ASSIGN_OR_RETURN(const auto values, reader.get<double>(field, DType::kF64, {4, s.width}));
  const auto k = static_cast<std::size_t>(s.width);
  for (std::size_t i = 0; i < values.size(); ++i) {
    const std::size_t row = i / k;
    const char* wrong = !std::isfinite(values[i])                                   ? "not finite"
                        : row != 2 && values[i] < 0                                 ? "negative"
                        : row == 0 && values[i] > std::numeric_limits<float>::max() ? "beyond float32"
                                                                                    : nullptr;
    if (wrong != nullptr)
      return reader.error(
          fmt::format("{}: {} of channel {} is {:g}: {}", field, kChannelRows[row], i % k, values[i], wrong));
  }
  for (std::size_t c = 0; c < k; ++c) s.channel_amax.push_back(static_cast<float>(values[c]));
  const auto sums = [&](std::size_t row) {
    const auto first = values.begin() + static_cast<std::ptrdiff_t>(row * k);
    return std::vector<double>(first, first + s.width);
  };
  s.channel_abs = sums(1);
  s.channel_sum = sums(2);
  s.channel_square = sums(3);
  return {};
}

// Histograms of one set of rows, seen as elements, as tokens and as blocks.
Status check_agreement(const Reader& reader, const std::string& name, const SiteStatistics& s) {
  const auto width = static_cast<std::uint64_t>(s.width);
  if (s.rows == 0 || s.rows > kMaxCount / width)
    return reader.error(name + "/rows: is " + std::to_string(s.rows) + ", expected 1 to 2^62 / " +
                        std::to_string(width) + " rows of that width");
  std::uint64_t finite = 0, bad = 0;
  for (const quant::Histogram& h : s.steps) {
    if (h.count() > kMaxCount - finite || h.not_finite() > kMaxCount - bad)
      return reader.error(name + "/histogram: counts overflow");
    finite += h.count();
    bad += h.not_finite();
  }
  if (finite + bad != s.rows * width)
    return reader.error(name + "/histogram: holds " + std::to_string(finite) + " finite values and " +
                        std::to_string(bad) + " others, " + std::to_string(s.rows) + " rows of " +
                        std::to_string(width) + " are " + std::to_string(s.rows * width));
  Status counts = check_count(s.tokens, s.rows, name + "/tokens");
  if (counts.ok()) counts = check_count(s.blocks, s.rows * ((width + kBlock - 1) / kBlock), name + "/blocks");
  if (!counts.ok()) return reader.error(counts.message());
  if (bad > 0) return {};  // they count as not finite in one place and as the largest in another
  const float amax = s.all_steps().amax();
  const float channels = *std::max_element(s.channel_amax.begin(), s.channel_amax.end());
  for (const auto& [part, other] : {std::pair<const char*, float>{"/tokens", s.tokens.amax()},
                                    {"/blocks", s.blocks.amax()},
                                    {"/channels", channels}})
    if (other != amax)
      return reader.error(
          fmt::format("{0}{1}: largest magnitude {2:g}, {0}/histogram has {3:g}", name, part, other, amax));
  return {};
}

Result<SiteStatistics> read_site(Reader& reader, const std::string& name, int denoise_steps) {
  SiteStatistics s;
  const SafeTensor* histogram = reader.find(name + "/histogram");
  const SafeTensor* channels = reader.find(name + "/channels");
  if (histogram == nullptr || histogram->shape.rank() != 2)
    return reader.error(name + "/histogram: missing, or not of two dimensions");
  if (channels == nullptr || channels->shape.rank() != 2)
    return reader.error(name + "/channels: missing, or not of two dimensions");
  const std::int64_t steps = histogram->shape[0], width = channels->shape[1];
  if (steps < 1 || steps > denoise_steps)
    return reader.error(name + "/histogram: has " + std::to_string(steps) +
                        " steps, the schedule in the metadata has " + std::to_string(denoise_steps));
  if (width < 1 || width > kMaxWidth)
    return reader.error(name + "/channels: has " + std::to_string(width) + " channels, expected 1 to " +
                        std::to_string(kMaxWidth));
  s.width = static_cast<int>(width);
  SF_ASSIGN_OR_RETURN(s.steps, reader.histograms(name + "/histogram", steps));
  SF_ASSIGN_OR_RETURN(auto tokens, reader.histograms(name + "/tokens", 1));
  SF_ASSIGN_OR_RETURN(auto blocks, reader.histograms(name + "/blocks", 1));
  s.tokens = std::move(tokens[0]);
  s.blocks = std::move(blocks[0]);
  SF_RETURN_IF_ERROR(read_channels(reader, name, s));
  SF_ASSIGN_OR_RETURN(const auto rows, reader.get<std::uint64_t>(name + "/rows", DType::kU64, {1}));
  s.rows = rows[0];
  SF_RETURN_IF_ERROR(check_agreement(reader, name, s));
  if (reader.find(name + "/moment") != nullptr) {
    SF_ASSIGN_OR_RETURN(auto moment, reader.get<double>(name + "/moment", DType::kF64, {width, width}));
    auto restored = quant::SecondMoment::restore(s.width, s.rows, std::move(moment));
    if (!restored.ok()) return reader.error(name + "/moment: " + restored.status().message());
    s.moment = std::move(*restored);
  }
  return s;
}

// Metadata that is a list in JSON.
Result<Json> list_of(const SafetensorsFile& file, const std::string& key) {
  const auto it = file.metadata().find(key);
  if (it == file.metadata().end()) return Status::invalid(file.path() + ": metadata " + key + ": missing");
  SF_ASSIGN_OR_RETURN(Json out, parse_json(it->second, file.path() + ": metadata " + key));
  if (!out.is_array()) return Status::invalid(file.path() + ": metadata " + key + ": is no list");
  return out;
}

Result<std::vector<std::string>> texts_of(const SafetensorsFile& file, const std::string& key) {
  SF_ASSIGN_OR_RETURN(const Json list, list_of(file, key));
  std::vector<std::string> out;
  for (const Json& one : list) {
    if (!one.is_string())
      return Status::invalid(file.path() + ": metadata " + key + "[" + std::to_string(out.size()) +
                             "]: is no text");
    out.push_back(one);
  }
  return out;
}

Result<std::vector<CalibrationStatistics::Case>> cases_of(const SafetensorsFile& file) {
  SF_ASSIGN_OR_RETURN(const Json list, list_of(file, "cases"));
  std::vector<CalibrationStatistics::Case> out;
  for (const Json& one : list) {
    if (!one.is_object() || !one.contains("name") || !one["name"].is_string() || !one.contains("sha256") ||
        !one["sha256"].is_string())
      return Status::invalid(file.path() + ": metadata cases[" + std::to_string(out.size()) +
                             "]: has no name and sha256");
    out.push_back({one["name"], one["sha256"]});
  }
  return out;
}

std::string text_of(const SafetensorsFile& file, const std::string& key) {
  const auto it = file.metadata().find(key);
  return it == file.metadata().end() ? std::string() : it->second;
}

}  // namespace

Result<CalibrationStatistics> calibration_from_file(const SafetensorsFile& file) {
  const std::string version = text_of(file, "servoflow_calibration");
  if (version != std::to_string(kCalibrationVersion))
    return Status::invalid(file.path() + ": " +
                           (version.empty()
                                ? "not a calibration statistics file"
                                : "statistics of version " + version + ", this program reads version " +
                                      std::to_string(kCalibrationVersion)) +
                           "; make one with `servoflow calibrate`");
  CalibrationStatistics c{.weights = text_of(file, "weights_sha256"),
                          .checkpoint = text_of(file, "checkpoint"),
                          .device = text_of(file, "device"),
                          .backend = text_of(file, "backend"),
                          .precision = text_of(file, "precision")};
  const std::string steps = text_of(file, "denoise_steps");
  const bool digits =
      !steps.empty() && steps.size() <= 4 && steps.find_first_not_of("0123456789") == std::string::npos;
  c.denoise_steps = digits ? std::stoi(steps) : 0;
  if (c.denoise_steps < 1 || c.denoise_steps > kMaxSteps)
    return Status::invalid(file.path() + ": metadata denoise_steps: is \"" + steps + "\", expected 1 to " +
                           std::to_string(kMaxSteps));
  SF_ASSIGN_OR_RETURN(c.cases, cases_of(file));
  SF_ASSIGN_OR_RETURN(c.moments, texts_of(file, "moments"));
  SF_ASSIGN_OR_RETURN(const std::vector<std::string> names, texts_of(file, "sites"));
  Reader reader(file);
  for (const std::string& name : names) {
    if (c.sites.contains(name)) return reader.error("metadata sites: names " + name + " twice");
    SF_ASSIGN_OR_RETURN(c.sites[name], read_site(reader, name, c.denoise_steps));
  }
  SF_RETURN_IF_ERROR(reader.check_all_taken());
  return c;
}

Result<CalibrationStatistics> read_calibration(const std::string& path) {
  SF_ASSIGN_OR_RETURN(const SafetensorsFile file, SafetensorsFile::open(path));
  SF_ASSIGN_OR_RETURN(CalibrationStatistics c, calibration_from_file(file));
  if (c.digest() != text_of(file, "sha256"))
    return Status::invalid(
        path + ": its SHA-256 does not agree with what it holds: damaged or edited; calibrate again");
  return c;
}

}  // namespace servoflow::toolkit
