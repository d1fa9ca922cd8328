#include "quant/formats.h"

#include <gtest/gtest.h>

#include <set>

namespace servoflow::quant {
namespace {

TEST(Formats, EveryShortNameComesBackAndIsValid) {
  const std::vector<std::string> names = format_names();
  EXPECT_EQ(std::set<std::string>(names.begin(), names.end()).size(), names.size());
  for (const std::string& text : names) {
    const Result<LinearFormat> format = parse_format(text);
    ASSERT_TRUE(format.ok()) << text;
    EXPECT_EQ(name(*format), text);
    EXPECT_TRUE(validate(*format).ok()) << text;
    // The long form of the same.
    const Result<LinearFormat> again = parse_format(name(format->weight) + "/" + name(format->input));
    ASSERT_TRUE(again.ok()) << text << ": " << again.status().message();
    EXPECT_EQ(*again, *format) << text;
  }
}

TEST(Formats, LongNamesComeBack) {
  for (const char* text :
       {"int8-g64-asym/int8-token", "int4-channel/none", "int4-g32-sf32/none", "int8-channel-sbf16/none",
        "fp8e5m2-channel/none", "fp8-block64/fp8-g64", "int8-channel/int8-tensor-static-asym",
        "nvfp4/int8-token", "fp8-tensor/fp8-tensor", "mxfp4/mxfp8", "int8-tensor/none"}) {
    const Result<LinearFormat> format = parse_format(text);
    ASSERT_TRUE(format.ok()) << format.status().message();
    EXPECT_EQ(name(*format), text);
  }
}

TEST(Formats, RefusedNamesSayWhatIsKnown) {
  for (const char* text : {"", "int3-w3a16", "int4-g0/none", "int4-g-5/none", "int4-g128", "nvfp4/", "/none",
                           "int8-channel-sf32/none", "fp8-token/none", "int4-g99999999999/none",
                           "int8-channel/int8-token-static", "bf16/int8-token", "fp8-channel-asym/none",
                           "int4-block128/none", "mxfp4/mxfp4-static", "int8-channel/int8-token-asym",
                           "int8-g70000/none", "int8-channel/fp8e5m2-token"}) {
    const Result<LinearFormat> format = parse_format(text);
    ASSERT_FALSE(format.ok()) << text;
    EXPECT_FALSE(format.status().message().empty());
  }
  EXPECT_NE(parse_format("nonsense").status().message().find("nvfp4-w4a16"), std::string::npos);
}

TEST(Formats, BitsPerWeightCountEverything) {
  const auto bits = [](const char* text, std::int64_t rows, std::int64_t cols) {
    return bits_per_weight(parse_format(text)->weight, rows, cols);
  };
  EXPECT_DOUBLE_EQ(bits("bf16", 8, 8), 16.0);
  EXPECT_DOUBLE_EQ(bits("nvfp4-w4a16", 64, 1024), 4.5 + 32.0 / (64 * 1024));
  EXPECT_DOUBLE_EQ(bits("mxfp4-w4a16", 64, 1024), 4.25);
  EXPECT_DOUBLE_EQ(bits("int4-g128-w4a16", 64, 1024), 4 + (16.0 + 4.0) / 128);
  EXPECT_DOUBLE_EQ(bits("int8-w8a16", 64, 1024), 8 + 32.0 / 1024);
  // 4304 columns are 33 groups and one of 80.
  EXPECT_DOUBLE_EQ(bits("int4-g128-sym-w4a16", 10, 4304), 4 + 34 * 16.0 / 4304);
}

TEST(Formats, CalibrationIsNeededForStaticInputsOnly) {
  for (const char* text : {"fp8-w8a8-static", "int8-w8a8-static", "nvfp4-w4a4", "nvfp4-w4a8-static"})
    EXPECT_TRUE(parse_format(text)->input.needs_calibration()) << text;
  for (const char* text : {"fp8-w8a8", "int8-w8a8", "nvfp4-w4a4-dynamic", "mxfp8-w8a8", "int8-w8a16", "bf16"})
    EXPECT_FALSE(parse_format(text)->input.needs_calibration()) << text;
}

}  // namespace
}  // namespace servoflow::quant
