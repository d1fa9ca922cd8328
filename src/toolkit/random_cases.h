// Observations nobody recorded, for networks of random weights, which no robot ever met.
#pragma once

#include <cstdint>
#include <vector>

#include "toolkit/case_file.h"
#include "weights/checkpoint.h"

namespace servoflow::toolkit {

struct RandomCaseOptions {
  int count = 1, views = 2, tokens = 48;
  std::uint64_t seed = 0;
};

// `cases` look into `pixels`.
struct RandomCases {
  std::vector<std::vector<std::uint8_t>> pixels;
  std::vector<CaseFile> cases;
};

// Smooth random pictures (of noise alone a patch embedding sees little but its mean), random ids, normal
// noise.
RandomCases random_cases(const weights::Checkpoint& checkpoint, const RandomCaseOptions& options);

}  // namespace servoflow::toolkit
