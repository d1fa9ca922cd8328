#include "toolkit/random_cases.h"

#include <algorithm>
#include <cmath>
#include <random>

namespace servoflow::toolkit {

RandomCases random_cases(const weights::Checkpoint& checkpoint, const RandomCaseOptions& options) {
  const weights::Architecture& a = checkpoint.architecture;
  RandomCases out;
  std::mt19937_64 random(options.seed);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> unit;
  const int side = a.vision.image;
  for (int i = 0; i < options.count; ++i) {
    CaseFile c;
    c.name = "random" + std::to_string(i);
    c.format = weights::layout_name(checkpoint.layout);
    c.entry = CaseEntry::kTokens;
    c.steps = a.default_steps;
    c.max_tokens = a.max_tokens;
    c.horizon = a.horizon;
    c.action_dim = a.action_dim;
    for (int view = 0; view < options.views; ++view) {
      std::vector<std::uint8_t> rgb(static_cast<std::size_t>(side) * static_cast<std::size_t>(side) * 3);
      float wave[3][4];
      for (auto& channel : wave)
        for (float& w : channel) w = unit(random);
      for (int y = 0; y < side; ++y)
        for (int x = 0; x < side; ++x)
          for (int k = 0; k < 3; ++k) {
            const float phase =
                (wave[k][0] * static_cast<float>(x) + wave[k][1] * static_cast<float>(y)) * 0.5f;
            const float v =
                127.5f + 80 * std::sin(phase + 6.28f * wave[k][2]) * wave[k][3] + 20 * normal(random);
            rgb[static_cast<std::size_t>((y * side + x) * 3 + k)] =
                static_cast<std::uint8_t>(std::clamp(v, 0.0f, 255.0f));
          }
      out.pixels.push_back(std::move(rgb));
      const std::string slot = "view" + std::to_string(view);
      c.slots.push_back(slot);
      c.images.push_back({slot, side, side, out.pixels.back()});
    }
    const int tokens = std::min(options.tokens, a.max_tokens);
    std::uniform_int_distribution<std::int32_t> id(0, a.vocab - 1);
    for (int t = 0; t < tokens; ++t) c.tokens.push_back(id(random));
    for (int n = 0; n < a.horizon * a.action_dim; ++n) c.noise.push_back(normal(random));
    out.cases.push_back(std::move(c));
  }
  return out;
}

}  // namespace servoflow::toolkit
