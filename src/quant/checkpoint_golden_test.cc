// Against files that compressed-tensors and ModelOpt wrote: the same numbers read, the same bytes written.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/bf16.h"
#include "core/json.h"
#include "quant/checkpoint.h"
#include "quant/golden_for_tests.h"
#include "quant/layouts.h"

namespace servoflow::quant {
namespace {

constexpr std::int64_t kRows = 12, kCols = 256;

// Trap: -0 and +0 are the same number. compressed-tensors adds a zero point of +0, which turns an FP8 -0 into
// +0.
std::byte canonical(const StoredTensor& tensor, std::byte code) {
  const bool fp8_codes = tensor.dtype == DType::kF8E4M3 && tensor.name.ends_with(".weight");
  return fp8_codes && code == std::byte{0x80} ? std::byte{0} : code;
}

void expect_bytes(const StoredTensor& ours, const SafeTensor& theirs) {
  EXPECT_EQ(ours.dtype, theirs.dtype) << ours.name;
  EXPECT_EQ(ours.shape, theirs.shape) << ours.name << " " << ours.shape.to_string();
  ASSERT_EQ(ours.bytes.size(), theirs.bytes.size()) << ours.name;
  int different = 0;
  for (std::size_t i = 0; i < ours.bytes.size(); ++i)
    different += canonical(ours, ours.bytes[i]) != canonical(ours, theirs.bytes[i]);
  EXPECT_EQ(different, 0) << ours.name << " of " << ours.bytes.size();
}

QuantConfig golden_config() {
  const Result<Json> json = read_json_file("tests/golden/quant/compressed_tensors.json");
  EXPECT_TRUE(json.ok());
  Result<std::optional<QuantConfig>> config = find_quant_config(*json, "config.json");
  EXPECT_TRUE(config.ok()) << config.status().message();
  EXPECT_TRUE(config->has_value());
  return **config;
}

const std::pair<const char*, const char*> kLayers[] = {
    {"nvfp4", "nvfp4-w4a16"},
    {"nvfp4_a4", "nvfp4-w4a4"},
    {"int4_sym", "int4-g128-sym-w4a16"},
    {"int4_asym", "int4-g128-w4a16"},
    {"int4_asym_bf16", "int4-g128-w4a16"},
    {"int8_group", "int8-g128/none"},
    {"int8_channel", "int8-w8a16"},
    {"fp8_tensor", "fp8-w8a8-static"},
    {"fp8_channel", "fp8-w8a8"},
    {"fp8_block", "fp8-block"},
    {"int8_w8a8", "int8-w8a8"},
    {"int8_static", "int8-channel/int8-tensor-static-asym"},
    {"fp8_w8a16", "fp8-w8a16"},
    {"mxfp4", "mxfp4-w4a16"},
    {"mxfp8", "mxfp8-w8a8"},
};

TEST(CompressedTensors, TheLibrarysConfigNamesTheFormats) {
  const QuantConfig config = golden_config();
  for (const auto& [layer, format] : kLayers) {
    const ConfigGroup* group = config.group_of(layer);
    ASSERT_NE(group, nullptr) << layer;
    EXPECT_EQ(name(group->format), format) << layer;
  }
  EXPECT_EQ(config.group_of("lm_head"), nullptr);
  EXPECT_EQ(config.group_of("other"), nullptr);
}

TEST(CompressedTensors, DecodesWhatTheLibraryDecodes) {
  const GoldenFile golden("compressed_tensors");
  const QuantConfig config = golden_config();
  for (const auto& [layer, format] : kLayers) {
    const Result<QuantizedMatrix> m =
        read_linear(layer, *config.group_of(layer), config.convention, kRows, kCols, golden.lookup());
    ASSERT_TRUE(m.ok()) << m.status().message();
    const std::vector<float> ours = dequantize(*m), theirs = golden.floats(std::string(layer) + ".decoded");
    // The library divides by the global scale where we multiply by its inverse, and multiplies BF16 scales in
    // BF16: two roundings of binary32, or one of BF16.
    const float relative = std::string(layer) == "int4_asym_bf16" ? 0x1p-8f : 0x1p-22f;
    for (std::size_t i = 0; i < ours.size(); ++i)
      ASSERT_LE(std::fabs(ours[i] - theirs[i]), relative * std::fabs(theirs[i])) << layer << " " << i;
  }
}

TEST(CompressedTensors, ReadAndWrittenAgainNoByteChanges) {
  const GoldenFile golden("compressed_tensors");
  const QuantConfig config = golden_config();
  for (const auto& [layer, format] : kLayers) {
    const Result<QuantizedMatrix> m =
        read_linear(layer, *config.group_of(layer), config.convention, kRows, kCols, golden.lookup());
    ASSERT_TRUE(m.ok()) << m.status().message();
    const Result<std::vector<StoredTensor>> written = write_linear(layer, *m, Convention::kCompressedTensors);
    ASSERT_TRUE(written.ok()) << written.status().message();
    const auto theirs = golden.layer(layer);
    EXPECT_EQ(written->size(), theirs.size()) << layer;
    for (const StoredTensor& tensor : *written) {
      ASSERT_TRUE(theirs.count(tensor.name)) << tensor.name;
      expect_bytes(tensor, *theirs.at(tensor.name));
    }
    const LayerTensors names = layer_tensors(layer, *config.group_of(layer), config.convention);
    EXPECT_EQ(names.required.size(), theirs.size()) << layer;
    for (const std::string& required : names.required) EXPECT_TRUE(theirs.count(required)) << required;
  }
}

// The weights contain a group of zeros (scale 0.125, epsilon), a group far below the smallest block scale,
// outliers, ties and -0.
TEST(CompressedTensors, QuantizesFloat32WeightsToTheLibrarysBytes) {
  const GoldenFile golden("compressed_tensors");
  const std::vector<float> source = golden.floats("source");
  for (const auto& [layer, text] : kLayers) {
    if (std::string(layer) == "int4_asym_bf16") continue;
    LinearFormat format = *parse_format(text);
    if (format.weight.code == Code::kInt4) format.weight.scale = ScaleCode::kFloat32;  // the module's type
    Result<QuantizedMatrix> m = quantize(source, kRows, kCols, format);
    ASSERT_TRUE(m.ok()) << m.status().message();
    if (format.input.needs_calibration()) m->input_scale = 1.0f;
    const Result<std::vector<StoredTensor>> written = write_linear(layer, *m, Convention::kCompressedTensors);
    ASSERT_TRUE(written.ok()) << written.status().message();
    const auto theirs = golden.layer(layer);
    for (const StoredTensor& tensor : *written)
      if (tensor.name.find("input") == std::string::npos) expect_bytes(tensor, *theirs.at(tensor.name));
  }
}

// In bfloat16 modules the library rounds to bfloat16 after every operation; ours computes in binary32. Its
// arithmetic, done here, gives its bytes, so nothing but that rounding differs.
TEST(CompressedTensors, Bfloat16ModulesDifferByTheLibrarysRoundingsOnly) {
  const GoldenFile golden("compressed_tensors");
  const QuantConfig config = golden_config();
  const std::vector<float> w = golden.floats("source_bf16");
  const Result<QuantizedMatrix> ours = quantize(w, kRows, kCols, *parse_format("int4-g128-w4a16"));
  const Result<QuantizedMatrix> theirs = read_linear("int4_asym_bf16", *config.group_of("int4_asym_bf16"),
                                                     config.convention, kRows, kCols, golden.lookup());
  ASSERT_TRUE(ours.ok() && theirs.ok());
  const auto round = [](float x) { return to_float(to_bf16(x)); };
  for (std::int64_t r = 0; r < kRows; ++r)
    for (std::int64_t begin = 0; begin < kCols; begin += 128) {
      const float* x = w.data() + r * kCols + begin;
      const float low = std::min(0.0f, *std::min_element(x, x + 128));
      const float high = std::max(0.0f, *std::max_element(x, x + 128));
      float scale = round(round(high - low) / 15), zero = 0;
      if (scale != 0) {
        zero = std::nearbyint(std::clamp(round(-8 - round(low / scale)), -8.0f, 7.0f));
      } else {
        scale = 0x1p-7f;
      }
      ASSERT_EQ(theirs->scale(r, begin), scale);
      ASSERT_EQ(theirs->zero_points[static_cast<std::size_t>(theirs->scale_index(r, begin))], zero);
      EXPECT_LE(std::fabs(ours->scale(r, begin) - scale), 0x1p-7f * scale);
      for (std::int64_t i = 0; i < 128; ++i) {
        const float code = std::nearbyint(std::clamp(round(round(x[i] / scale) + zero), -8.0f, 7.0f));
        ASSERT_EQ(theirs->code(r, begin + i), code);
        EXPECT_LE(std::abs(ours->code(r, begin + i) - theirs->code(r, begin + i)), 1);
      }
    }
}

struct ModeloptLayer {
  const char* layer;
  const char* algorithm;
  const char* format;
};
const ModeloptLayer kModelopt[] = {
    {"nvfp4", "NVFP4", "nvfp4-w4a4"},
    {"w4a8", "W4A8_NVFP4_FP8", "nvfp4-w4a8-static"},
    {"fp8", "FP8", "fp8-w8a8-static"},
    {"int8_sq", "W8A8_SQ_PER_CHANNEL", "int8-w8a8-static"},
    {"int4_awq", "W4A16_AWQ", "int4-g128-sf32/none"},
    {"mxfp8", "MXFP8", "mxfp8-w8a8"},
};

TEST(ModelOpt, DecodesRewritesAndQuantizesToTheLibrarysBytes) {
  const GoldenFile golden("modelopt");
  const std::vector<float> source = golden.floats("source");
  for (const ModeloptLayer& layer : kModelopt) {
    const ConfigGroup group{.name = layer.algorithm,
                            .targets = {"Linear"},
                            .layout = layer.algorithm,
                            .format = *parse_format(layer.format)};
    const std::string name = layer.layer;
    const Result<QuantizedMatrix> m =
        read_linear(name, group, Convention::kModelOpt, kRows, kCols, golden.lookup());
    ASSERT_TRUE(m.ok()) << m.status().message();
    const std::vector<float> ours = dequantize(*m), theirs = golden.floats(name + ".decoded");
    for (std::size_t i = 0; i < ours.size(); ++i) ASSERT_EQ(ours[i], theirs[i]) << name << " " << i;

    const auto tensors = golden.layer(name);
    const Result<std::vector<StoredTensor>> rewritten = write_linear(name, *m, Convention::kModelOpt);
    ASSERT_TRUE(rewritten.ok()) << rewritten.status().message();
    EXPECT_EQ(rewritten->size(), tensors.size()) << name;
    for (const StoredTensor& tensor : *rewritten) expect_bytes(tensor, *tensors.at(tensor.name));

    Result<QuantizedMatrix> made =
        quantize(source, kRows, kCols, group.format, {.convention = Convention::kModelOpt});
    ASSERT_TRUE(made.ok()) << made.status().message();
    made->input_scale = m->input_scale;
    made->input_multiplier = m->input_multiplier;
    const Result<std::vector<StoredTensor>> written = write_linear(name, *made, Convention::kModelOpt);
    ASSERT_TRUE(written.ok()) << written.status().message();
    for (const StoredTensor& tensor : *written) expect_bytes(tensor, *tensors.at(tensor.name));
  }
}

TEST(ModelOpt, StaticScalesAndInputMultipliersAreRead) {
  const GoldenFile golden("modelopt");
  const ConfigGroup nvfp4{.layout = "NVFP4", .format = *parse_format("nvfp4-w4a4")};
  const Result<QuantizedMatrix> m =
      read_linear("nvfp4", nvfp4, Convention::kModelOpt, kRows, kCols, golden.lookup());
  ASSERT_TRUE(m.ok());
  EXPECT_FLOAT_EQ(*m->input_scale, 7.5f / 2688);
  EXPECT_TRUE(m->input_multiplier.empty());
  const ConfigGroup awq{.layout = "W4A16_AWQ", .format = *parse_format("int4-g128-sf32/none")};
  const Result<QuantizedMatrix> a =
      read_linear("int4_awq", awq, Convention::kModelOpt, kRows, kCols, golden.lookup());
  ASSERT_TRUE(a.ok());
  ASSERT_EQ(a->input_multiplier.size(), static_cast<std::size_t>(kCols));
  EXPECT_EQ(a->input_multiplier.front(), 0.5f);
  EXPECT_EQ(a->input_multiplier.back(), 2.0f);
}

// Conversion between the libraries is renaming and a reciprocal: codes and block scales stay.
TEST(Conversion, CompressedTensorsToModelOptAndBackKeepsCodesAndInvertsTheGlobalScale) {
  const GoldenFile golden("compressed_tensors");
  const QuantConfig config = golden_config();
  const Result<QuantizedMatrix> m =
      read_linear("nvfp4_a4", *config.group_of("nvfp4_a4"), config.convention, kRows, kCols, golden.lookup());
  ASSERT_TRUE(m.ok());
  const Result<std::vector<StoredTensor>> modelopt = write_linear("x", *m, Convention::kModelOpt);
  ASSERT_TRUE(modelopt.ok()) << modelopt.status().message();
  FakeTensors tensors(*modelopt);
  EXPECT_EQ(tensors["x.weight"].bytes.size(), static_cast<std::size_t>(kRows * kCols / 2));
  float scale2 = 0, input = 0;
  std::memcpy(&scale2, tensors["x.weight_scale_2"].bytes.data(), 4);
  std::memcpy(&input, tensors["x.input_scale"].bytes.data(), 4);
  EXPECT_EQ(scale2, 1.0f / m->file_global_scale);
  EXPECT_EQ(input, 1.0f / m->file_input_scale);
  const ConfigGroup group{.layout = "NVFP4", .format = *parse_format("nvfp4-w4a4")};
  const Result<QuantizedMatrix> back =
      read_linear("x", group, Convention::kModelOpt, kRows, kCols, tensors.lookup());
  ASSERT_TRUE(back.ok()) << back.status().message();
  EXPECT_EQ(dequantize(*back), dequantize(*m));
}

}  // namespace
}  // namespace servoflow::quant
