#include "quant/scalars.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "core/safetensors.h"

namespace servoflow::quant {
namespace {

// Made by tests/interop/make_golden.py with PyTorch, compressed-tensors and ModelOpt.
constexpr char kGolden[] = "tests/golden/quant/scalars.safetensors";

class Scalars : public testing::Test {
 protected:
  void SetUp() override {
    Result<SafetensorsFile> file = SafetensorsFile::open(kGolden);
    ASSERT_TRUE(file.ok()) << file.status().message();
    file_ = std::move(*file);
  }
  std::vector<float> floats(const std::string& name) const { return *to_floats(*file_.find(name)); }
  SafetensorsFile file_;
};

struct Fp8 {
  const char* name;
  float (*decode)(std::uint8_t);
  std::uint8_t (*encode)(float);
  float max;
};
const Fp8 kFp8[] = {{"e4m3", decode_e4m3, encode_e4m3, kE4M3Max},
                    {"e5m2", decode_e5m2, encode_e5m2, kE5M2Max}};

TEST_F(Scalars, AllFp8CodesDecodeAsPyTorchDoes) {
  for (const Fp8& type : kFp8) {
    const std::vector<float> expected = floats(std::string(type.name) + ".values");
    ASSERT_EQ(expected.size(), 256u);
    for (int code = 0; code < 256; ++code) {
      const float value = type.decode(static_cast<std::uint8_t>(code));
      if (std::isnan(expected[code])) {
        EXPECT_TRUE(std::isnan(value)) << type.name << " " << code;
      } else {
        EXPECT_EQ(std::bit_cast<std::uint32_t>(value), std::bit_cast<std::uint32_t>(expected[code]))
            << type.name << " " << code;
      }
    }
  }
}

TEST_F(Scalars, Fp8CastsAreThoseOfPyTorchOverValuesMidpointsAndTheirNeighbours) {
  for (const Fp8& type : kFp8) {
    const std::vector<float> x = floats(std::string(type.name) + ".x");
    const std::vector<float> code = floats(std::string(type.name) + ".code");
    ASSERT_GT(x.size(), 1500u);
    for (std::size_t i = 0; i < x.size(); ++i) {
      // PyTorch keeps NaN's sign or not, by version and machine.
      const int mask = std::isnan(x[i]) ? 0x7f : 0xff;
      EXPECT_EQ(type.encode(x[i]) & mask, static_cast<int>(code[i]) & mask) << type.name << " of " << x[i];
    }
  }
}

TEST(Fp8, EveryFiniteCodeComesBack) {
  for (const Fp8& type : kFp8)
    for (int code = 0; code < 256; ++code) {
      const float value = type.decode(static_cast<std::uint8_t>(code));
      if (std::isfinite(value)) {
        EXPECT_EQ(type.encode(value), code) << type.name;
      }
    }
}

// An overflowing cast of PyTorch gives NaN (E4M3) or infinity (E5M2); a weight must saturate instead.
TEST(Fp8, OverflowSaturatesInsteadOfBecomingNan) {
  for (const Fp8& type : kFp8)
    for (const float large :
         {type.max * 1.001f, type.max * 2, 1e30f, std::numeric_limits<float>::infinity()}) {
      EXPECT_EQ(type.decode(type.encode(large)), type.max) << type.name;
      EXPECT_EQ(type.decode(type.encode(-large)), -type.max) << type.name;
    }
  EXPECT_EQ(encode_e4m3(std::numeric_limits<float>::quiet_NaN()) & 0x7f, 0x7f);
  EXPECT_EQ(encode_e4m3(-0.0f), 0x80);
  EXPECT_EQ(encode_e5m2(-0.0f), 0x80);
}

TEST_F(Scalars, E2M1RoundsAsBothLibrariesDo) {
  const std::vector<float> x = floats("e2m1.x"), value = floats("e2m1.value"), code = floats("e2m1.code");
  for (std::size_t i = 0; i < x.size(); ++i) {
    EXPECT_EQ(decode_e2m1(encode_e2m1(x[i])), value[i]) << x[i];
    EXPECT_EQ(encode_e2m1(x[i]), static_cast<int>(code[i])) << x[i];
  }
}

TEST(E2M1, AllCodesInOrderAndBack) {
  const float magnitudes[] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
  for (unsigned code = 0; code < 16; ++code) {
    const float expected = (code & 8 ? -1.0f : 1.0f) * magnitudes[code & 7];
    EXPECT_EQ(decode_e2m1(code), expected);
    EXPECT_EQ(std::signbit(decode_e2m1(code)), code >= 8);
    if (code != 8) {
      EXPECT_EQ(encode_e2m1(expected), code);
    }
  }
}

// The nearest value, by exhaustive search, at distances between 0 and 8; ties go to even mantissas.
TEST(E2M1, IsTheNearestValue) {
  for (int i = -8 * 512; i <= 8 * 512; ++i) {
    const float x = static_cast<float>(i) / 512;
    float best = std::numeric_limits<float>::infinity();
    for (const float v : kE2M1Values) best = std::min(best, std::fabs(x - v));
    const unsigned code = encode_e2m1(x);
    EXPECT_EQ(std::fabs(x - decode_e2m1(code)), best) << x;
  }
  for (const auto& [tie, even] : {std::pair{0.25f, 0.0f},
                                  {0.75f, 1.0f},
                                  {1.25f, 1.0f},
                                  {1.75f, 2.0f},
                                  {2.5f, 2.0f},
                                  {3.5f, 4.0f},
                                  {5.0f, 4.0f}})
    EXPECT_EQ(decode_e2m1(encode_e2m1(tie)), even) << tie;
}

TEST(E2M1, NegativeThatRoundsToZeroIsMinusZeroAndNanIsZero) {
  EXPECT_EQ(encode_e2m1(-0.1f), 8);
  EXPECT_EQ(encode_e2m1(0.1f), 0);
  EXPECT_EQ(encode_e2m1(-0.0f), 0);
  EXPECT_TRUE(std::signbit(decode_e2m1(8)));
  EXPECT_EQ(encode_e2m1(std::numeric_limits<float>::quiet_NaN()), 0);
  EXPECT_EQ(encode_e2m1(std::numeric_limits<float>::infinity()), 7);
  EXPECT_EQ(encode_e2m1(-1e30f), 15);
}

TEST(UE4M3, IgnoresTheSignAndNeverWritesIt) {
  for (int code = 0; code < 127; ++code) {
    EXPECT_EQ(decode_ue4m3(static_cast<std::uint8_t>(code)),
              decode_ue4m3(static_cast<std::uint8_t>(code | 0x80)));
    EXPECT_EQ(encode_ue4m3(decode_ue4m3(static_cast<std::uint8_t>(code))), code);
  }
  EXPECT_EQ(encode_ue4m3(-1.0f), 0);
  EXPECT_EQ(encode_ue4m3(1e9f), 0x7e);
  EXPECT_EQ(decode_ue4m3(0x7e), 448.0f);
  EXPECT_EQ(decode_ue4m3(0x01), 0x1p-9f);
}

TEST(E8M0, AllCodesArePowersOfTwoAndComeBack) {
  for (int code = 0; code < 255; ++code) {
    const float value = decode_e8m0(static_cast<std::uint8_t>(code));
    EXPECT_EQ(value, std::ldexp(1.0f, code - 127)) << code;
    EXPECT_EQ(encode_e8m0(value), code);
    if (code > 0 && code < 254) {
      EXPECT_EQ(encode_e8m0(value * 1.999f), code) << "rounds down";
    }
  }
  EXPECT_TRUE(std::isnan(decode_e8m0(255)));
  EXPECT_EQ(encode_e8m0(0.0f), 0);
}

// Every product of an E2M1 and an E4M3 value fits bfloat16: NVFP4 widened to BF16 adds no error.
TEST(Nvfp4, ProductsOfCodeAndBlockScaleAreExactInBfloat16) {
  int rounded = 0, beyond = 0;
  for (int code = 0; code < 8; ++code)
    for (int scale = 1; scale < 127; ++scale) {
      const float product =
          decode_e2m1(static_cast<unsigned>(code)) * decode_ue4m3(static_cast<std::uint8_t>(scale));
      EXPECT_EQ(std::bit_cast<std::uint32_t>(product) & 0xffffu, 0u);
      rounded += product <= kE4M3Max && decode_e4m3(encode_e4m3(product)) != product;
      beyond += product > kE4M3Max;
    }
  // Folding scales into FP8 codes does round, so 8-bit kernels must not.
  EXPECT_EQ(rounded, 212);
  EXPECT_EQ(beyond, 63);
}

}  // namespace
}  // namespace servoflow::quant
