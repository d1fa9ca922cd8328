#include "toolkit/device_peaks.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <vector>

#include "core/bf16.h"
#include "core/status_macros.h"

namespace servoflow::toolkit {
namespace {

using Clock = std::chrono::steady_clock;
// Uniform in [-1, 1): what a product of zeros draws of power, and therefore of clock, is not what work draws.
std::vector<bf16> noise(std::size_t count, std::uint32_t seed) {
  std::vector<bf16> out(count);
  for (bf16& value : out) {
    seed = seed * 1664525u + 1013904223u;
    value = to_bf16(static_cast<float>(static_cast<std::int32_t>(seed)) * 0x1p-31f);
  }
  return out;
}

// Milliseconds of the best run; by the device's clock, or the wall's where it has none. Nothing is recorded:
// a recorded copy within a GPU's memory is left to its copy engines, which are slower than its processors.
Result<double> best(ops::Backend& b, int runs, const std::function<void()>& body) {
  double least = 0;
  for (int run = 0; run <= runs; ++run) {  // the first one warms up
    const Clock::time_point begin = Clock::now();
    b.mark(0);
    body();
    b.mark(1);
    SF_RETURN_IF_ERROR(b.finish());
    const double wall = std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
    const double device = b.elapsed(0, 1), ms = device > 0 ? device : wall;
    if (run > 0 && (least == 0 || ms < least)) least = ms;
  }
  return least;
}

}  // namespace

Result<DevicePeaks> measure_device_peaks(ops::Backend& b, const ProbeSizes& s) {
  constexpr int kCopies = 4, kProducts = 10;
  DevicePeaks out;
  SF_ASSIGN_OR_RETURN(void* const from, b.allocate(s.copy_bytes));
  SF_ASSIGN_OR_RETURN(void* const to, b.allocate(s.copy_bytes));
  SF_ASSIGN_OR_RETURN(const double copied, best(b, s.runs, [&] {
                        for (int i = 0; i < kCopies; ++i) b.copy(to, from, s.copy_bytes);
                      }));
  if (copied > 0) out.copy_gbs = 2.0 * kCopies * static_cast<double>(s.copy_bytes) / copied / 1e6;

  const auto weights = noise(static_cast<std::size_t>(s.columns) * static_cast<std::size_t>(s.depth), 1);
  const ops::HostMatrix host{DType::kBF16, s.columns, s.depth, std::as_bytes(std::span(weights)), "probe"};
  SF_ASSIGN_OR_RETURN(const ops::Weight w, b.pack({&host, 1}, {}));
  const DType act = b.activation_dtype();
  const auto matrix = [&](int cols) -> Result<ops::Matrix> {
    ops::Matrix m{.dtype = act, .rows = s.rows, .cols = cols, .pitch = b.pitch(cols, act)};
    SF_ASSIGN_OR_RETURN(m.data, b.allocate(static_cast<std::uint64_t>(s.rows * m.pitch) * dtype_size(act)));
    return m;
  };
  SF_ASSIGN_OR_RETURN(const ops::Matrix x, matrix(s.depth));
  SF_ASSIGN_OR_RETURN(const ops::Matrix y, matrix(s.columns));
  const std::vector<bf16> rows = noise(static_cast<std::size_t>(s.rows * x.pitch), 2);
  std::vector<float> wide(act == DType::kF32 ? rows.size() : 0);
  std::transform(rows.begin(), rows.begin() + static_cast<std::ptrdiff_t>(wide.size()), wide.begin(),
                 [](bf16 v) { return to_float(v); });
  b.upload(x.data, wide.empty() ? static_cast<const void*>(rows.data()) : wide.data(),
           rows.size() * dtype_size(act));
  SF_RETURN_IF_ERROR(b.finish());
  SF_ASSIGN_OR_RETURN(const double multiplied, best(b, s.runs, [&] {
                        for (int i = 0; i < kProducts; ++i)
                          b.matmul({.x = x, .w = &w, .y = y, .rows = {s.rows, nullptr, s.rows}});
                      }));
  if (multiplied > 0) out.product_tflops = 2.0 * kProducts * s.rows * s.columns * s.depth / multiplied / 1e9;
  out.source =
      fmt::format("measured here: copies of {} MiB, {} products of {} x {} x {} in a row, best of {}",
                  s.copy_bytes >> 20, kProducts, s.rows, s.columns, s.depth, s.runs);
  return out;
}

Result<DevicePeaks> read_device_peaks(const std::string& path, const std::string& precision) {
  SF_ASSIGN_OR_RETURN(const Json json, read_json_file(path));
  std::string problems;
  const auto number = [&](const Json& object, const std::string& key, const std::string& name) {
    const auto it = object.is_object() ? object.find(key) : object.end();
    if (object.is_object() && it != object.end() && it->is_number() && it->get<double>() > 0)
      return it->get<double>();
    problems += (problems.empty() ? "" : "\n") + path + ": " + name + ": a number above 0 must stand here";
    return 0.0;
  };
  DevicePeaks out;
  out.copy_gbs = number(json, "copy_gbs", "copy_gbs");
  out.product_tflops = number(json.is_object() ? json.value("product_tflops", Json()) : Json(), precision,
                              "product_tflops." + precision);
  if (json.is_object())
    for (const auto& [key, value] : json.items())
      if (key != "copy_gbs" && key != "product_tflops" && key != "about")
        problems += (problems.empty() ? "" : "\n") + path + ": " + key + ": is not known here";
  if (!problems.empty()) return Status::invalid(problems);
  out.source = path;
  return out;
}

Json device_peaks_to_json(const DevicePeaks& p) {
  return {{"copy_gbs", p.copy_gbs}, {"product_tflops", p.product_tflops}, {"source", p.source}};
}

}  // namespace servoflow::toolkit
