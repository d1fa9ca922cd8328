// What a GPU can do at most, as far as this project's arithmetic is concerned: the ceilings that a stage's
// rates are printed next to. Measured in the same run, through the backend itself, or read from a file of
// earlier measurements (which may be another library's, and then says so).
#pragma once

#include <string>

#include "core/json.h"
#include "ops/backend.h"

namespace servoflow::toolkit {

struct DevicePeaks {
  double copy_gbs = 0;        // 1e9 bytes per second, read and written, within the device's memory
  double product_tflops = 0;  // 1e12 operations per second of one large product in the run's precision
  std::string source;         // "measured here: …" or the file
};

struct ProbeSizes {
  std::uint64_t copy_bytes = std::uint64_t{1} << 30;
  int rows = 712, columns = 32768, depth = 2048;  // the prefix's largest product
  int runs = 5;
};

// The best of a few short runs. Memory for it is taken from `backend` and goes with it.
Result<DevicePeaks> measure_device_peaks(ops::Backend& backend, const ProbeSizes& sizes = {});

// {"copy_gbs": …, "product_tflops": {"bf16": …, "fp32": …}, "about": "…"}; only the precision asked for must
// be there.
Result<DevicePeaks> read_device_peaks(const std::string& path, const std::string& precision);

Json device_peaks_to_json(const DevicePeaks& peaks);

}  // namespace servoflow::toolkit
