#include "quant/methods/moments.h"

#include <Eigen/Core>
#include <algorithm>
#include <cmath>

namespace servoflow::quant {
namespace {
using RowMajor = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using RowMajorF = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
}  // namespace

void SecondMoment::add(std::span<const float> rows) {
  const Eigen::Index n = static_cast<Eigen::Index>(rows.size()) / k_;
  const Eigen::Map<const RowMajorF> x(rows.data(), n, k_);
  Eigen::Map<RowMajor> sums(sums_.data(), k_, k_);
  const RowMajor wide = x.cast<double>();
  sums.selfadjointView<Eigen::Lower>().rankUpdate(wide.transpose());
  sums.triangularView<Eigen::StrictlyUpper>() = sums.transpose();
  rows_ += static_cast<std::uint64_t>(n);
}

Result<SecondMoment> SecondMoment::restore(int k, std::uint64_t rows, std::vector<double> sums) {
  if (k < 1 || sums.size() != static_cast<std::size_t>(k) * static_cast<std::size_t>(k))
    return Status::invalid("second moment: " + std::to_string(sums.size()) + " values for " +
                           std::to_string(k) + " channels");
  SecondMoment out;
  out.k_ = k;
  out.rows_ = rows;
  out.sums_ = std::move(sums);
  for (int i = 0; i < k; ++i)
    for (int j = 0; j <= i; ++j)
      if (!std::isfinite(out.at(i, j)) || out.at(i, j) != out.at(j, i) || out.at(i, i) < 0)
        return Status::invalid("second moment: not symmetric, negative or not finite at " +
                               std::to_string(i) + ", " + std::to_string(j));
  return out;
}

SecondMoment SecondMoment::scaled(std::span<const float> m) const {
  SecondMoment out = *this;
  const auto k = static_cast<std::size_t>(k_);
  for (std::size_t i = 0; i < k; ++i)
    for (std::size_t j = 0; j < k; ++j)
      out.sums_[i * k + j] *= static_cast<double>(m[i]) * static_cast<double>(m[j]);
  return out;
}

double output_square(const SecondMoment& moment, std::span<const float> w, std::span<const float> mean) {
  constexpr Eigen::Index kRows = 512;  // at a time: a large layer in float64 is not held whole
  const Eigen::Index k = moment.k(), n = static_cast<Eigen::Index>(w.size()) / k;
  const Eigen::Map<const RowMajor> h(moment.sums().data(), k, k);
  double sum = 0;
  for (Eigen::Index begin = 0; begin < n; begin += kRows) {
    const Eigen::Index rows = std::min(kRows, n - begin);
    const RowMajor x = Eigen::Map<const RowMajorF>(w.data() + begin * k, rows, k).cast<double>();
    sum += (x * h).cwiseProduct(x).sum();
    if (mean.empty()) continue;
    const Eigen::Map<const Eigen::VectorXf> mu(mean.data(), k);
    sum -= static_cast<double>(moment.rows()) * (x * mu.cast<double>()).squaredNorm();
  }
  return std::max(0.0, sum);
}

double output_error(const SecondMoment& moment, std::span<const float> w, std::span<const float> changed,
                    std::span<const float> mean) {
  std::vector<float> difference(w.size());
  for (std::size_t i = 0; i < w.size(); ++i) difference[i] = changed[i] - w[i];
  const double error = output_square(moment, difference, mean), whole = output_square(moment, w);
  if (whole > 0) return error / whole;
  return error > 0 ? INFINITY : 0;
}

}  // namespace servoflow::quant
