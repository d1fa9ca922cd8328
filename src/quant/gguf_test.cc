#include "quant/gguf.h"

#include <gtest/gtest.h>

#include <random>

#include "quant/scalars.h"

namespace servoflow::quant {
namespace {

std::vector<float> normal(std::size_t n) {
  std::mt19937 generator(4);
  std::normal_distribution<float> distribution(0.0f, 0.02f);
  std::vector<float> values(n);
  for (float& v : values) v = distribution(generator);
  return values;
}

// ggml's dequantization, as published (gguf-py's quants.py): doubled values, half scales. make test-interop
// runs the original.
TEST(Gguf, BlocksDecodeByGgmlsRule) {
  for (const char* text : {"mxfp4-w4a16", "nvfp4-w4a16"}) {
    const bool nvfp4 = std::string(text) == "nvfp4-w4a16";
    const Result<QuantizedMatrix> m = quantize(normal(5 * 192), 5, 192, *parse_format(text));
    ASSERT_TRUE(m.ok());
    const Result<std::vector<std::uint8_t>> blocks = gguf_blocks(*m);
    ASSERT_TRUE(blocks.ok()) << blocks.status().message();
    EXPECT_EQ(blocks->size(), 5u * (nvfp4 ? 3 * 36 : 6 * 17));
    const std::vector<float> expected = dequantize(*m);
    for (std::size_t i = 0; i < expected.size(); ++i) {
      float value = 0;
      if (nvfp4) {
        const std::uint8_t* block = blocks->data() + i / 64 * 36;
        const std::size_t s = i % 64 / 16, j = i % 16;
        const unsigned code = block[4 + s * 8 + j % 8] >> (j / 8 * 4) & 15u;
        value = 2 * decode_e2m1(code) * (0.5f * decode_ue4m3(block[s])) * m->global_scale;
      } else {
        const std::uint8_t* block = blocks->data() + i / 32 * 17;
        const std::size_t j = i % 32;
        value = 2 * decode_e2m1(block[1 + j % 16] >> (j / 16 * 4) & 15u) * (0.5f * decode_e8m0(block[0]));
      }
      ASSERT_NEAR(value, expected[i], 1e-6f * std::abs(expected[i])) << text << " " << i;
    }
  }
}

// Trap: K must be a multiple of 64; 4304 is not.
TEST(Gguf, ShortBlocksAndOtherFormatsAreRefused) {
  const Result<QuantizedMatrix> siglip = quantize(normal(2 * 4304), 2, 4304, *parse_format("nvfp4-w4a16"));
  ASSERT_TRUE(siglip.ok());
  EXPECT_NE(gguf_blocks(*siglip).status().message().find("4304"), std::string::npos);
  EXPECT_FALSE(gguf_blocks(*quantize(normal(128), 2, 64, *parse_format("int8-w8a16"))).ok());
}

}  // namespace
}  // namespace servoflow::quant
