#include "quant/methods/gptq.h"

#include <Eigen/Cholesky>
#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <numeric>

namespace servoflow::quant {
namespace {

using Dense = Eigen::MatrixXd;
// One row per input channel: rounding a column of the weights walks along a row here.
using Columns = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

// The upper factor U of (H + damping)⁻¹ = Uᵀ U, channels in the order given.
Result<Dense> inverse_factor(const SecondMoment& moment, const std::vector<int>& order, double damping) {
  const Eigen::Index k = moment.k();
  Dense h(k, k);
  double diagonal = 0;
  for (Eigen::Index i = 0; i < k; ++i) diagonal += moment.at(static_cast<int>(i), static_cast<int>(i));
  diagonal /= static_cast<double>(k);
  if (!(diagonal > 0))
    return Status::invalid(
        "gptq: the layer's inputs were all zero; calibrate on other observations or leave it out");
  for (Eigen::Index i = 0; i < k; ++i)
    for (Eigen::Index j = 0; j < k; ++j)
      h(i, j) = moment.at(order[static_cast<std::size_t>(i)], order[static_cast<std::size_t>(j)]);
  // A channel that is always zero has no say; any positive number keeps it apart from the others.
  for (Eigen::Index i = 0; i < k; ++i) h(i, i) = (h(i, i) > 0 ? h(i, i) : diagonal) + damping * diagonal;
  Eigen::LLT<Eigen::Ref<Dense>> cholesky(h);
  if (cholesky.info() != Eigen::Success)
    return Status::invalid("gptq: the second moment of " + std::to_string(moment.rows()) + " rows in " +
                           std::to_string(k) + " channels is not positive definite; raise the damping of " +
                           std::to_string(damping) + " or calibrate on more observations");
  Dense inverse = Dense::Identity(k, k);
  cholesky.solveInPlace(inverse);
  Eigen::LLT<Eigen::Ref<Dense>, Eigen::Upper> upper(inverse);
  if (upper.info() != Eigen::Success)
    return Status::invalid("gptq: the inverse second moment is not positive definite; raise the damping of " +
                           std::to_string(damping));
  return Dense(upper.matrixU());
}

}  // namespace

Result<std::vector<float>> gptq(const Grid& grid, std::span<const float> w, const SecondMoment& moment,
                                const GptqOptions& options) {
  const int k = grid.cols, n = grid.rows;
  if (moment.k() != k || w.size() != static_cast<std::size_t>(n) * static_cast<std::size_t>(k))
    return Status::invalid("gptq: the second moment has " + std::to_string(moment.k()) +
                           " channels, the weight has " + std::to_string(k) + " columns");
  std::vector<int> order(static_cast<std::size_t>(k));
  std::iota(order.begin(), order.end(), 0);
  if (options.order_by_size)
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return moment.at(a, a) > moment.at(b, b); });
  Result<Dense> factor = inverse_factor(moment, order, options.damping);
  if (!factor.ok()) return factor.status();
  const Dense& u = *factor;

  Columns left(k, n);  // what is still to be represented
  for (int i = 0; i < k; ++i)
    for (int r = 0; r < n; ++r)
      left(i, r) = static_cast<double>(w[static_cast<std::size_t>(r) * static_cast<std::size_t>(k) +
                                         static_cast<std::size_t>(order[static_cast<std::size_t>(i)])]);
  std::vector<float> out(w.size());
  Columns errors(std::max(1, options.block), n);
  for (int begin = 0; begin < k; begin += static_cast<int>(errors.rows())) {
    const int size = std::min(static_cast<int>(errors.rows()), k - begin), end = begin + size;
    for (int i = begin; i < end; ++i) {
      const int col = order[static_cast<std::size_t>(i)];
      const double pivot = u(i, i);
      for (int r = 0; r < n; ++r) {
        const float rounded = grid.round(grid.at(r, col), static_cast<float>(left(i, r)));
        out[static_cast<std::size_t>(r) * static_cast<std::size_t>(k) + static_cast<std::size_t>(col)] =
            rounded;
        errors(i - begin, r) = (left(i, r) - static_cast<double>(rounded)) / pivot;
      }
      for (int j = i + 1; j < end; ++j) left.row(j) -= u(i, j) * errors.row(i - begin);
    }
    if (end < k)
      left.bottomRows(k - end).noalias() -=
          u.block(begin, end, size, k - end).transpose() * errors.topRows(size);
  }
  return out;
}

}  // namespace servoflow::quant
