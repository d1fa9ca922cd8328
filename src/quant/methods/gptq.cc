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

// The inverse of a lower triangle in its own place, halves first: K³ / 3 operations and no second matrix.
void invert_lower(Eigen::Ref<Dense> l) {
  constexpr Eigen::Index kSmall = 64;
  const Eigen::Index k = l.rows();
  if (k <= kSmall) {
    Dense inverse = Dense::Identity(k, k);
    l.triangularView<Eigen::Lower>().solveInPlace(inverse);
    l.triangularView<Eigen::Lower>() = inverse;
    return;
  }
  const Eigen::Index half = k / 2;
  auto below = l.bottomLeftCorner(k - half, half);
  l.bottomRightCorner(k - half, k - half).triangularView<Eigen::Lower>().solveInPlace(below);
  l.topLeftCorner(half, half).triangularView<Eigen::Lower>().solveInPlace<Eigen::OnTheRight>(below);
  below = -below;
  invert_lower(l.topLeftCorner(half, half));
  invert_lower(l.bottomRightCorner(k - half, k - half));
}

// The upper factor U of (H + damping)⁻¹ = Uᵀ U, channels in the order given; what lies below the diagonal
// means nothing. With the order reversed, H = L Lᵀ gives U = L⁻¹ read from the far end, so that H is neither
// inverted nor copied.
Result<Dense> inverse_factor(const SecondMoment& moment, const std::vector<int>& order, double damping) {
  const Eigen::Index k = moment.k();
  double diagonal = 0;
  for (Eigen::Index i = 0; i < k; ++i) diagonal += moment.at(static_cast<int>(i), static_cast<int>(i));
  diagonal /= static_cast<double>(k);
  if (!(diagonal > 0))
    return Status::invalid(
        "gptq: the layer's inputs were all zero; calibrate on other observations or leave it out");
  Dense h(k, k);
  for (Eigen::Index j = 0; j < k; ++j)
    for (Eigen::Index i = j; i < k; ++i)
      h(i, j) =
          moment.at(order[static_cast<std::size_t>(k - 1 - j)], order[static_cast<std::size_t>(k - 1 - i)]);
  // A channel that is always zero has no say; any positive number keeps it apart from the others.
  for (Eigen::Index i = 0; i < k; ++i) h(i, i) = (h(i, i) > 0 ? h(i, i) : diagonal) + damping * diagonal;
  Eigen::LLT<Eigen::Ref<Dense>> cholesky(h);
  if (cholesky.info() != Eigen::Success)
    return Status::invalid("gptq: the second moment of " + std::to_string(moment.rows()) + " rows in " +
                           std::to_string(k) + " channels is not positive definite; raise the damping of " +
                           std::to_string(damping) + " or calibrate on more observations");
  invert_lower(h);
  h.reverseInPlace();
  if (!h.diagonal().allFinite())
    return Status::invalid("gptq: the second moment of " + std::to_string(moment.rows()) +
                           " rows cannot be inverted; raise the damping of " + std::to_string(damping));
  return h;
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
