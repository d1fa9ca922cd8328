#include "weights/loader.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "core/bf16.h"

namespace servoflow::weights {
namespace {

// One tensor in one dtype.
class OneTensor : public WeightSource {
 public:
  OneTensor(DType dtype, int rows, int cols, std::vector<std::byte> bytes)
      : dtype_(dtype), shape_{rows, cols}, bytes_(std::move(bytes)) {}
  bool has(const std::string&) const override { return true; }
  Result<TensorData> get(const std::string&) const override {
    return TensorData{dtype_, shape_, bytes_, nullptr};
  }
  void release(const std::string&) const override {}
  Status token_rows(std::span<const std::int32_t>, std::span<float>) const override { return {}; }
  std::string stored_dtype() const override { return ""; }

 private:
  DType dtype_;
  Shape shape_;
  std::vector<std::byte> bytes_;
};

template <typename T>
std::vector<std::byte> bytes_of(const std::vector<T>& values) {
  std::vector<std::byte> out(values.size() * sizeof(T));
  std::memcpy(out.data(), values.data(), out.size());
  return out;
}

TEST(Loader, TablesKeepTheirValuesInTheSmallestType) {
  const int rows = 4099, cols = 3;  // more than are copied at once
  std::vector<float> round, exact;
  std::vector<bf16> halves;
  std::vector<double> doubles;
  for (int i = 0; i < rows * cols; ++i) {
    halves.push_back(to_bf16(0.37f * static_cast<float>(i)));
    round.push_back(to_float(halves.back()));
    exact.push_back(0.37f * static_cast<float>(i));
    doubles.push_back(exact.back());
  }
  struct Row {
    DType stored, kept;
    std::vector<std::byte> bytes;
    const std::vector<float>* want;
  };
  const Row table[] = {{DType::kBF16, DType::kBF16, bytes_of(halves), &round},
                       {DType::kF32, DType::kBF16, bytes_of(round), &round},
                       {DType::kF32, DType::kF32, bytes_of(exact), &exact},
                       {DType::kF64, DType::kF32, bytes_of(doubles), &exact}};
  for (const Row& row : table) {
    auto backend = *ops::make_reference_backend();
    const OneTensor source(row.stored, rows, cols, row.bytes);
    Loader loader(*backend, source, 1, {});
    const auto made = loader.table("t");
    ASSERT_TRUE(made.ok()) << made.status().message();
    EXPECT_EQ(made->dtype, row.kept);
    EXPECT_EQ(loader.packed_bytes(), static_cast<std::uint64_t>(rows) * cols * dtype_size(row.kept));
    for (int i = 0; i < rows * cols; ++i) {
      const auto at = static_cast<std::size_t>(i);
      const float got = row.kept == DType::kBF16 ? to_float(static_cast<const bf16*>(made->data)[at])
                                                 : static_cast<const float*>(made->data)[at];
      ASSERT_EQ(got, (*row.want)[at]) << i;
    }
  }
}

TEST(Loader, PartsAddUpToTheMatrix) {
  const int rows = 5, cols = 6;
  std::vector<float> exact, round;
  for (int i = 0; i < rows * cols; ++i) {
    exact.push_back(0.37f * static_cast<float>(i) - 3);
    round.push_back(to_float(to_bf16(exact.back())));
  }
  for (const std::vector<float>* values : {&round, &exact}) {
    auto backend = *ops::make_reference_backend();
    const OneTensor source(DType::kF32, rows, cols, bytes_of(*values));
    Loader loader(*backend, source, 1, {});
    int parts = 0;
    const auto made = loader.matrix_in_parts("t", parts);
    ASSERT_TRUE(made.ok()) << made.status().message();
    EXPECT_EQ(parts, values == &round ? 2 : 3);
    EXPECT_EQ(made->k, parts * cols);
    const auto* w = static_cast<const float*>(made->data);
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < cols; ++c) {
        const float *at = w + r * parts * cols + c, want = (*values)[static_cast<std::size_t>(r * cols + c)];
        EXPECT_EQ(at[0], at[cols]);
        EXPECT_NEAR(at[0] + (parts == 3 ? at[2 * cols] : 0), want, std::abs(want) * 0x1p-16);
      }
  }
}

}  // namespace
}  // namespace servoflow::weights
