// The seeded noise a flow starts from, the same on every device and in every language.
#pragma once

#include <cstdint>
#include <span>

namespace servoflow::policy {

// Philox4x32-10 with key = (low, high 32 bits of seed) and counter = (low, high of block, low, high of
// request); block b gives elements 4b … 4b+3 by Box-Muller in float64, rounded to float32. (Salmon et al.,
// "Parallel random numbers: as easy as 1, 2, 3", 2011.) Allocates nothing.
void fill_noise(std::uint64_t seed, std::uint64_t request, std::span<float> out);

}  // namespace servoflow::policy
