// What a set of timings looks like: the order statistics people compare latency by.
#pragma once

#include <vector>

#include "core/json.h"

namespace servoflow::toolkit {

struct Distribution {
  double min = 0, p50 = 0, mean = 0, std = 0, p95 = 0, p99 = 0;
  std::vector<double> samples;  // in the order they were taken
};

// Percentiles interpolate linearly between order statistics (NumPy's default); std is of the sample (n - 1),
// 0 for one.
Distribution describe(std::vector<double> samples);

// {min, p50, mean, std, p95, p99, samples}
Json distribution_to_json(const Distribution& d);

}  // namespace servoflow::toolkit
