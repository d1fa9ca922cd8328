// Checkpoints that are incomplete, contradictory or hostile, and layouts that golden files do not show.
#include "quant/checkpoint.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <random>

#include "quant/golden_for_tests.h"
#include "quant/layouts.h"
#include "quant/pack.h"

namespace servoflow::quant {
namespace {

std::vector<float> normal(std::size_t n, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> distribution(0.0f, 0.02f);
  std::vector<float> values(n);
  for (float& v : values) v = distribution(generator);
  return values;
}

constexpr Convention kBoth[] = {Convention::kCompressedTensors, Convention::kModelOpt};

std::optional<std::string> layout_of(const LinearFormat& format, Convention convention) {
  const auto layout = convention == Convention::kModelOpt ? modelopt_algorithm(format, false)
                                                          : compressed_tensors_layout(format);
  return layout ? std::optional<std::string>(*layout) : std::nullopt;
}

struct Written {
  QuantizedMatrix matrix;
  ConfigGroup group;
  FakeTensors tensors;
};

Written written(const char* text, Convention convention, std::int64_t rows = 6, std::int64_t cols = 64) {
  const LinearFormat format = *parse_format(text);
  Result<QuantizedMatrix> m = quantize(normal(static_cast<std::size_t>(rows * cols), 3), rows, cols, format,
                                       {.convention = convention});
  EXPECT_TRUE(m.ok()) << m.status().message();
  if (format.input.needs_calibration()) m->input_scale = 0.0125f;
  Result<std::vector<StoredTensor>> tensors = write_linear("m", *m, convention);
  EXPECT_TRUE(tensors.ok()) << tensors.status().message();
  const std::string layout = *layout_of(format, convention);
  return {
      *m, {.name = "g", .targets = {"Linear"}, .layout = layout, .format = format}, FakeTensors(*tensors)};
}

std::vector<std::string> writable(Convention convention) {
  std::vector<std::string> names = format_names();
  for (const char* more :
       {"int8-g128/none", "int8-channel-asym/none", "int4-channel/none", "fp8-g64/none",
        "int4-g32-sf32/int8-token", "nvfp4/int8-token", "int8-channel/int8-tensor-static-asym"})
    names.push_back(more);
  std::erase_if(names, [&](const std::string& name) { return !layout_of(*parse_format(name), convention); });
  return names;
}

// Every format that a library has a layout for, on shapes with short groups and odd sides.
TEST(Checkpoint, WhatIsWrittenReadsBackTheSame) {
  for (const Convention convention : kBoth) {
    const std::vector<std::string> formats = writable(convention);
    EXPECT_GE(formats.size(), convention == Convention::kModelOpt ? 7u : 20u);
    for (const std::string& format : formats)
      for (const auto& [rows, cols] :
           {std::pair<std::int64_t, std::int64_t>{6, 64}, {4, 4304}, {2, 130}, {18, 48}}) {
        Written w = written(format.c_str(), convention, rows, cols);
        const Result<QuantizedMatrix> back =
            read_linear("m", w.group, convention, rows, cols, w.tensors.lookup());
        ASSERT_TRUE(back.ok()) << format << ": " << back.status().message();
        EXPECT_EQ(dequantize(*back), dequantize(w.matrix)) << format << " " << cols;
        EXPECT_EQ(back->input_scale.has_value(), w.matrix.input_scale.has_value()) << format;
        const LayerTensors names = layer_tensors("m", w.group, convention);
        for (const std::string& name : names.required)
          EXPECT_TRUE(w.tensors.lookup()(name).has_value()) << name;
      }
  }
}

// Trap: K = 4304 is no multiple of 128. Files hold whole groups; what is beyond K decodes to zero.
TEST(Checkpoint, ShortGroupsArePaddedWithZerosInFiles) {
  for (const char* format : {"int4-g128-w4a16", "int4-g128-sym-w4a16", "mxfp4-w4a16", "mxfp8-w8a16"}) {
    Written w = written(format, Convention::kCompressedTensors, 2, 4304);
    const std::int64_t padded = stored_cols(w.group.format.weight, 4304);
    EXPECT_GT(padded, 4304);
    const Result<QuantizedMatrix> wide =
        read_linear("m", w.group, Convention::kCompressedTensors, 2, padded, w.tensors.lookup());
    ASSERT_TRUE(wide.ok()) << format << ": " << wide.status().message();
    std::vector<float> row(static_cast<std::size_t>(padded));
    dequantize_row(*wide, 1, row);
    for (std::int64_t k = 4304; k < padded; ++k) EXPECT_EQ(row[static_cast<std::size_t>(k)], 0.0f) << format;
  }
}

// Trap: zero points are packed along the rows, weights along the columns.
TEST(Checkpoint, ZeroPointsArePackedAlongRows) {
  Written w = written("int4-g32-asym-sf32/none", Convention::kCompressedTensors, 9, 64);
  EXPECT_EQ(w.tensors["m.weight_zero_point"].shape, (Shape{2, 2}));
  std::uint32_t words[4];
  std::memcpy(words, w.tensors["m.weight_zero_point"].bytes.data(), sizeof(words));
  for (int r = 0; r < 9; ++r)
    for (int g = 0; g < 2; ++g)
      EXPECT_EQ(static_cast<int>(words[r / 8 * 2 + g] >> (r % 8 * 4) & 15) - 8,
                w.matrix.zero_points[static_cast<std::size_t>(r * 2 + g)]);
}

// Trap: ModelOpt's INT4 packs two output rows a byte, in two's complement.
TEST(Checkpoint, ModelOptInt4PacksAlongRows) {
  Written w = written("int4-g128-sf32/none", Convention::kModelOpt, 4, 128);
  const StoredTensor& weight = w.tensors["m.weight"];
  EXPECT_EQ(weight.shape, (Shape{2, 128}));
  for (std::int64_t r = 0; r < 4; ++r)
    for (std::int64_t k = 0; k < 128; ++k) {
      const auto byte = static_cast<unsigned>(weight.bytes[static_cast<std::size_t>(r / 2 * 128 + k)]);
      EXPECT_EQ(sign_extend_int4(byte >> (r % 2 * 4)), w.matrix.code(r, k));
    }
}

TEST(Checkpoint, GroupIndicesAreReadAndNotWritten) {
  Written w = written("int4-g32-sf32/none", Convention::kCompressedTensors, 2, 64);
  std::vector<std::int32_t> order(64);
  for (std::size_t k = 0; k < 64; ++k) order[k] = static_cast<std::int32_t>(k % 2);
  StoredTensor index{"m.weight_g_idx", DType::kI32, Shape{64}, {}};
  const auto set = [&] {
    const auto bytes = std::as_bytes(std::span(order));
    index.bytes.assign(bytes.begin(), bytes.end());
    w.tensors["m.weight_g_idx"] = index;
  };
  set();
  const auto read = [&] {
    return read_linear("m", w.group, Convention::kCompressedTensors, 2, 64, w.tensors.lookup());
  };
  Result<QuantizedMatrix> m = read();
  ASSERT_TRUE(m.ok()) << m.status().message();
  EXPECT_EQ(m->group_of_column, order);
  EXPECT_EQ(m->scale(1, 5), m->scale_at(3));
  EXPECT_FALSE(write_linear("m", *m, Convention::kCompressedTensors).ok());
  for (std::size_t k = 0; k < 64; ++k) order[k] = static_cast<std::int32_t>(k / 32);
  set();
  EXPECT_TRUE(read()->group_of_column.empty()) << "in order: nothing to remember";
  order[9] = 2;
  set();
  EXPECT_NE(read().status().message().find("weight_g_idx"), std::string::npos);
}

// Each spoiled tensor must be named.
TEST(Checkpoint, BrokenTensorsAreNamed) {
  struct Case {
    const char* format;
    const char* tensor;
    std::function<void(StoredTensor&)> spoil;
  };
  const auto dtype = [](DType d) { return [d](StoredTensor& t) { t.dtype = d; }; };
  const auto shape = [](Shape s) { return [s](StoredTensor& t) { t.shape = s; }; };
  const auto number = [](float v) { return [v](StoredTensor& t) { std::memcpy(t.bytes.data(), &v, 4); }; };
  const auto cut = [](StoredTensor& t) { t.bytes.pop_back(); };
  const auto byte = [](int v) { return [v](StoredTensor& t) { t.bytes[0] = static_cast<std::byte>(v); }; };
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const Case cases[] = {
      {"nvfp4-w4a16", "weight_packed", dtype(DType::kI8)},
      {"nvfp4-w4a16", "weight_packed", shape({6, 33})},
      {"nvfp4-w4a16", "weight_packed", shape({std::numeric_limits<std::int64_t>::max(), 4})},
      {"nvfp4-w4a16", "weight_packed", cut},
      {"nvfp4-w4a16", "weight_scale", byte(0x7f)},
      {"nvfp4-w4a16", "weight_scale", byte(0xff)},
      {"nvfp4-w4a16", "weight_scale", byte(0x90)},
      {"nvfp4-w4a16", "weight_global_scale", number(nan)},
      {"nvfp4-w4a16", "weight_global_scale", number(0.0f)},
      {"nvfp4-w4a16", "weight_global_scale", number(-3.0f)},
      {"nvfp4-w4a16", "weight_global_scale", number(1e-45f)},
      {"nvfp4-w4a16", "weight_global_scale", shape({2})},
      {"nvfp4-w4a4", "input_global_scale", number(nan)},
      {"int4-g128-w4a16", "weight_shape", byte(7)},
      {"int4-g128-w4a16", "weight_shape", dtype(DType::kF32)},
      {"int4-g128-w4a16", "weight_packed", shape({6, 9})},
      {"int4-g128-w4a16", "weight_zero_point", shape({1, 2})},
      {"int8-w8a8", "weight", dtype(DType::kU8)},
      {"int8-w8a8", "weight_scale", number(nan)},
      {"int8-w8a8", "weight_scale", number(-1.0f)},
      {"fp8-w8a8", "weight", byte(0x7f)},
      {"fp8-w8a8-static", "input_scale", number(std::numeric_limits<float>::infinity())},
      {"mxfp4-w4a16", "weight_scale", byte(0xff)},
  };
  for (const Case& c : cases) {
    Written w = written(c.format, Convention::kCompressedTensors);
    const auto read = [&] {
      return read_linear("m", w.group, Convention::kCompressedTensors, 6, 64, w.tensors.lookup());
    };
    ASSERT_TRUE(read().ok()) << c.format << read().status().message();
    c.spoil(w.tensors[std::string("m.") + c.tensor]);
    const Result<QuantizedMatrix> spoiled = read();
    ASSERT_FALSE(spoiled.ok()) << c.format << " " << c.tensor;
    EXPECT_NE(spoiled.status().message().find(std::string("m.") + c.tensor), std::string::npos)
        << spoiled.status().message();
    w.tensors.erase(std::string("m.") + c.tensor);
    EXPECT_NE(read().status().message().find("missing"), std::string::npos);
  }
}

TEST(Checkpoint, SizesThatAreNoMatrixAreRefused) {
  Written w = written("int8-w8a8", Convention::kCompressedTensors);
  for (const auto& [rows, cols] :
       {std::pair<std::int64_t, std::int64_t>{0, 64}, {6, -1}, {std::int64_t{1} << 40, 64}})
    EXPECT_FALSE(
        read_linear("m", w.group, Convention::kCompressedTensors, rows, cols, w.tensors.lookup()).ok());
}

TEST(Checkpoint, WhatALibraryCannotHoldIsRefused) {
  const auto refused = [](const char* format, Convention convention, const char* part) {
    Result<QuantizedMatrix> m = quantize(normal(5 * 64, 3), 5, 64, *parse_format(format));
    const auto tensors = write_linear("m", *m, convention);
    ASSERT_FALSE(tensors.ok()) << format;
    EXPECT_NE(tensors.status().message().find(part), std::string::npos) << tensors.status().message();
  };
  refused("int4-g128-w4a16", Convention::kModelOpt, "no layout");
  refused("int8-w8a8", Convention::kModelOpt, "no layout");
  refused("fp8e5m2-channel/none", Convention::kCompressedTensors, "no layout");
  refused("fp8-w8a8-static", Convention::kCompressedTensors, "calibrate");
  refused("int4-g128-sf32/none", Convention::kModelOpt, "odd number");
  Result<QuantizedMatrix> m = quantize(normal(64, 3), 1, 64, *parse_format("int8-w8a8"));
  m->input_multiplier.assign(64, 1.0f);
  EXPECT_NE(write_linear("m", *m, Convention::kCompressedTensors).status().message().find("pre_quant_scale"),
            std::string::npos);
}

}  // namespace
}  // namespace servoflow::quant
