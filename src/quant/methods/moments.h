// What a linear layer's inputs look like, as far as its weights need to know: Xᵀ X, and the error that
// changed weights leave in its outputs.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "servoflow/status.h"

namespace servoflow::quant {

// Sums of products of input channels over all rows seen, [k, k] float64. Rows add up in the order given.
class SecondMoment {
 public:
  SecondMoment() = default;
  explicit SecondMoment(int k) : k_(k), sums_(static_cast<std::size_t>(k) * static_cast<std::size_t>(k)) {}
  // rows [n, k], row-major without gaps.
  void add(std::span<const float> rows);
  int k() const { return k_; }
  std::uint64_t rows() const { return rows_; }
  std::span<const double> sums() const { return sums_; }  // symmetric
  double at(int i, int j) const {
    return sums_[static_cast<std::size_t>(i) * static_cast<std::size_t>(k_) + static_cast<std::size_t>(j)];
  }
  static Result<SecondMoment> restore(int k, std::uint64_t rows, std::vector<double> sums);
  // The same inputs multiplied by m [k], channel by channel.
  SecondMoment scaled(std::span<const float> m) const;

 private:
  int k_ = 0;
  std::uint64_t rows_ = 0;
  std::vector<double> sums_;
};

// ‖X Wᵀ‖² with w [n, k] on the inputs that the moment has seen: the outputs' squared size. With `mean` [k],
// the inputs' mean, each output's mean is taken out of it.
double output_square(const SecondMoment& moment, std::span<const float> w, std::span<const float> mean = {});

// ‖X (W' - W)ᵀ‖² / ‖X Wᵀ‖² with w and changed [n, k]: the relative squared error of the layer's outputs on
// the inputs that the moment has seen. This is the metric that AWQ and GPTQ minimise. With `mean` [k], the
// inputs' mean, it is the error that correct_bias() leaves: each output's mean error is taken out.
double output_error(const SecondMoment& moment, std::span<const float> w, std::span<const float> changed,
                    std::span<const float> mean = {});

}  // namespace servoflow::quant
