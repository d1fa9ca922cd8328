// GPTQ (Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
// arXiv:2210.17323): columns are rounded one after the other, and what rounding one leaves is made up for by
// those not yet rounded, as the inputs' second moment says they can.
#pragma once

#include <span>
#include <vector>

#include "quant/methods/moments.h"
#include "quant/methods/weight_grid.h"

namespace servoflow::quant {

struct GptqOptions {
  double damping = 0.01;      // of the mean diagonal, added to it
  int block = 128;            // columns whose errors are handed on together
  bool order_by_size = true;  // channels with the largest inputs first ("act-order"); scales belong to the
                              // columns as stored, so a file needs no g_idx
};

// w [rows, cols] rounded to this grid (fixed beforehand, from the weights as they are). Memory: 8 · cols²
// bytes beside the moment, and 8 · rows · cols. Fails, naming the cause, where the damped moment is not
// positive definite.
Result<std::vector<float>> gptq(const Grid& grid, std::span<const float> w, const SecondMoment& moment,
                                const GptqOptions& options = {});

}  // namespace servoflow::quant
