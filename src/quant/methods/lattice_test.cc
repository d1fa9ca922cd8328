#include "quant/methods/lattice.h"

#include <gtest/gtest.h>

#include <cmath>

#include "quant/methods/weight_grid.h"

namespace servoflow::quant {
namespace {

// The methods round with a Lattice, files with encode_element: both must mean the same number everywhere.
TEST(Lattice, AgreesWithTheCodecs) {
  for (const Code code : {Code::kE4M3, Code::kE5M2, Code::kE2M1, Code::kInt8, Code::kInt4}) {
    const Lattice lattice = lattice_of(code);
    QuantizedMatrix one;
    one.format.weight.code = code;
    const float top = lattice.max();
    for (int i = -4001; i <= 4001; ++i) {
      const float x = top * static_cast<float>(i) / 3600.0f;
      const LinearFormat format{{.code = code, .granularity = Granularity::kTensor}, {}};
      if (code == Code::kE2M1) break;  // only in groups; below
      const float w[1] = {x}, scale[1] = {1.0f};
      const Result<QuantizedMatrix> m = quantize_with_scales(w, 1, 1, format, scale);
      ASSERT_TRUE(m.ok()) << m.status().message();
      ASSERT_EQ(lattice.snap(x), dequantize(*m)[0]) << code_name(code) << " " << x;
    }
    for (const float v : lattice.magnitudes()) EXPECT_EQ(lattice.snap(v), v);
  }
  const Lattice e2m1 = Lattice::e2m1();
  std::vector<float> w(16), ones(1, 1.0f);
  for (int i = -120; i <= 120; ++i) {
    w[3] = static_cast<float>(i) / 16.0f;
    const Result<QuantizedMatrix> m =
        quantize_with_scales(w, 1, 16, *parse_format("nvfp4-w4a16"), ones, {}, 1.0f);
    ASSERT_TRUE(m.ok());
    ASSERT_EQ(e2m1.snap(w[3]), dequantize(*m)[3]) << w[3];
  }
}

TEST(Lattice, TiesGoToTheEvenCode) {
  const Lattice e2m1 = Lattice::e2m1();
  const float ties[][2] = {{.25f, 0}, {.75f, 1}, {1.25f, 1}, {1.75f, 2}, {2.5f, 2}, {3.5f, 4}, {5, 4}};
  for (const auto& [x, y] : ties) {
    EXPECT_EQ(e2m1.snap(x), y);
    EXPECT_EQ(e2m1.snap(-x), -y);
  }
  EXPECT_EQ(e2m1.snap(1e30f), 6);
  EXPECT_EQ(Lattice::integer(4).snap(-1e30f), -8);
  EXPECT_EQ(Lattice::integer(4).snap(1e30f), 7);
  EXPECT_EQ(Lattice::e4m3().magnitudes().size(), 127u);
  EXPECT_EQ(Lattice::e4m3().max(), 448);
  EXPECT_EQ(Lattice::e4m3().smallest(), std::ldexp(1.0f, -9));
}

}  // namespace
}  // namespace servoflow::quant
