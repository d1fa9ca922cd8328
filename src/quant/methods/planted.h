// Layers with outliers in known places, for the tests of this folder.
#pragma once

#include <random>
#include <span>
#include <vector>

namespace servoflow::quant {

struct Planted {
  int rows = 0, cols = 0;
  std::vector<float> w;  // [rows, cols]
  std::vector<float> x;  // [inputs, cols], channels correlated; every 16th is `outlier` times as large
  int inputs = 0;
};

inline Planted planted(int rows, int cols, int inputs, float outlier, unsigned seed) {
  Planted p{.rows = rows, .cols = cols, .inputs = inputs};
  std::mt19937 random(seed);
  std::normal_distribution<float> draw;
  p.w.resize(static_cast<std::size_t>(rows) * static_cast<std::size_t>(cols));
  for (float& v : p.w) v = draw(random) * 0.05f;
  const std::size_t n = static_cast<std::size_t>(cols), hidden = n / 4;
  std::vector<float> mixing(hidden * n), cause(hidden);
  for (float& v : mixing) v = draw(random);
  for (int i = 0; i < inputs; ++i) {
    for (float& v : cause) v = draw(random);
    for (std::size_t c = 0; c < n; ++c) {
      float sum = 0.3f * draw(random);
      for (std::size_t h = 0; h < hidden; ++h) sum += cause[h] * mixing[h * n + c] / 8;
      p.x.push_back(c % 16 == 5 ? sum * outlier : sum);
    }
  }
  return p;
}

}  // namespace servoflow::quant
