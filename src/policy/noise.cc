#include "policy/noise.h"

#include <array>
#include <cmath>
#include <numbers>

namespace servoflow::policy {
namespace {

std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53u} * counter[0],
                        b = std::uint64_t{0xCD9E8D57u} * counter[2];
    counter = {static_cast<std::uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<std::uint32_t>(b),
               static_cast<std::uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<std::uint32_t>(a)};
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return counter;
}

}  // namespace

void fill_noise(std::uint64_t seed, std::uint64_t request, std::span<float> out) {
  const auto low = [](std::uint64_t x) { return static_cast<std::uint32_t>(x); };
  const auto high = [](std::uint64_t x) { return static_cast<std::uint32_t>(x >> 32); };
  for (std::size_t i = 0; i < out.size(); i += 4) {
    const std::uint64_t block = i / 4;
    const auto x = philox({low(block), high(block), low(request), high(request)}, {low(seed), high(seed)});
    for (std::size_t pair = 0; pair < 2; ++pair) {
      const double u0 = (x[2 * pair] + 0.5) * 0x1p-32, u1 = (x[2 * pair + 1] + 0.5) * 0x1p-32;
      const double r = std::sqrt(-2 * std::log(u0)), angle = 2 * std::numbers::pi * u1;
      if (i + 2 * pair < out.size()) out[i + 2 * pair] = static_cast<float>(r * std::cos(angle));
      if (i + 2 * pair + 1 < out.size()) out[i + 2 * pair + 1] = static_cast<float>(r * std::sin(angle));
    }
  }
}

}  // namespace servoflow::policy
