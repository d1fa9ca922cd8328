// Multipliers that move difficulty between a layer's inputs and its weights: x · m and W / m give the same
// product.
//
// SmoothQuant (Xiao et al., arXiv:2211.10438) levels the inputs' largest magnitudes, so that 8-bit inputs
// lose less; AWQ (Lin et al., arXiv:2306.00978) gives channels with large inputs a finer place in the
// weights' grid.
#pragma once

#include <functional>
#include <span>
#include <string>
#include <vector>

#include "quant/methods/moments.h"
#include "servoflow/status.h"

namespace servoflow::quant {

// Channels that must share one multiplier: because several of them come from one channel of what makes them
// (keys and values shared by query heads), `tie[c]` is the producer's channel of column c. Empty: each
// channel for itself.
using Tie = std::vector<int>;

struct Smoothing {
  std::vector<float> input;  // [cols] multiplies the inputs; the weights' columns are divided by it
  double alpha = 0;
  double loss = 0, loss_unchanged = 0;  // of a search: with these multipliers, and with none
};

// 1 / s with s[c] = max|x[c]|^alpha / max|w[:, c]|^(1 - alpha), scaled so that the geometric mean of s is 1.
// A channel whose inputs or weights are all zero keeps 1; none is beyond 2^8 or below 2^-8. Each s is rounded
// to a power of two where `powers_of_two` is set: then folding it is exact in any floating-point format.
Smoothing smoothquant(std::span<const float> input_amax, std::span<const float> weight_amax, double alpha,
                      const Tie& tie = {}, bool powers_of_two = false);

// What the whole layer (all weights that read the same inputs) loses with the given input multipliers; the
// caller quantizes inside.
using Loss = std::function<double(std::span<const float> input)>;

// The best of alpha = 0, 1/steps … 1 by `loss`, among SmoothQuant's or AWQ's multipliers. Alpha 0 of AWQ is
// "nothing changed", and "nothing changed" is always a candidate: the result never loses more than without.
Smoothing search_smoothquant(std::span<const float> input_amax, std::span<const float> weight_amax,
                             const Loss& loss, const Tie& tie = {}, int steps = 20);
// AWQ: s[c] = mean|x[c]|^alpha, scaled by 1 / sqrt(max s · min s) as the published code does.
Smoothing search_awq(std::span<const float> input_mean, const Loss& loss, const Tie& tie = {},
                     int steps = 20);

// max|w[:, c]| of [rows, cols], and the larger of it and what is there already.
void raise_column_amax(std::span<const float> w, std::span<float> amax);
// Divides each column of w [rows, cols] by m[col].
std::vector<float> divide_columns(std::span<const float> w, std::span<const float> m);

}  // namespace servoflow::quant
