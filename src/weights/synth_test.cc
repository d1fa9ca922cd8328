#include "weights/synth.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstring>

#include "weights/manifest.h"

namespace servoflow::weights {
namespace {

std::uint32_t crc32(std::span<const std::byte> bytes) {
  std::uint32_t crc = ~0u;
  for (const std::byte b : bytes) {
    crc ^= static_cast<std::uint32_t>(b);
    for (int i = 0; i < 8; ++i) crc = (crc >> 1) ^ (0xedb88320u & (0u - (crc & 1u)));
  }
  return ~crc;
}

struct Expected {
  const char* name;
  std::uint64_t seed;
  std::uint32_t fp32, bf16;  // CRC-32 of the bytes, from tests/golden/tools/synth.py
};

#define V "paligemma_with_expert.paligemma.model.vision_tower.vision_model."
#define L "paligemma_with_expert.paligemma.model.language_model."
#define E "paligemma_with_expert.gemma_expert.model."
// One or more of every rule.
constexpr Expected kExpected[] = {
    {"action_in_proj.weight", 0, 0xb15ea006u, 0x3cbd7306u},
    {"action_in_proj.weight", 7, 0x865f4fd8u, 0xd5c3d77fu},
    {"action_in_proj.weight", 9223372036854775813u, 0x4d1d4f6du, 0x26bf84d0u},
    {"time_mlp_in.bias", 0, 0x14d5545cu, 0x6658a7c8u},
    {E "layers.17.mlp.down_proj.weight", 0, 0xa635c96eu, 0xdfa04d6bu},
    {V "embeddings.patch_embedding.weight", 0, 0x300149e6u, 0x0a80a0e0u},
    {V "embeddings.position_embedding.weight", 0, 0x3a67c1ffu, 0x7c2d8f36u},
    {V "encoder.layers.3.layer_norm1.weight", 0, 0xfd1c468cu, 0xf566bc64u},
    {V "encoder.layers.26.mlp.fc2.weight", 0, 0x440c3f0fu, 0x34b953b7u},
    {V "post_layernorm.weight", 0, 0xdbfceaceu, 0x16bab7ccu},
    {"paligemma_with_expert.paligemma.model.multi_modal_projector.linear.weight", 0, 0x638da6e7u,
     0x9300e4feu},
    {L "layers.0.input_layernorm.weight", 0, 0xcf55d3e3u, 0x2127922du},
    {L "layers.5.post_attention_layernorm.weight", 0, 0x4f1b1f20u, 0x12157977u},
    {L "norm.weight", 0, 0x3ff6b87du, 0x8739be89u},
    {L "layers.11.self_attn.k_proj.weight", 0, 0x6e94d8fdu, 0x1c05b9deu},
    {E "layers.2.input_layernorm.dense.weight", 0, 0x6bf81561u, 0x876d118eu},
    {E "norm.dense.weight", 0, 0x36564209u, 0xf6b9be7fu},
    {E "layers.9.self_attn.q_proj.weight", 0, 0x6f211c49u, 0xbf15c5beu},
    {"time_mlp_out.weight", 0, 0x0ed7336eu, 0x1627d388u},
    {"action_out_proj.bias", 0, 0xfcc90f1au, 0x36a00a35u},
};
#undef V
#undef L
#undef E

TEST(Synth, BytesAreThoseOfTheDefinition) {
  for (const Expected& e : kExpected) {
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      const SyntheticSource source(pi05_architecture(), e.seed, dtype);
      const Result<TensorData> data = source.get(e.name);
      ASSERT_TRUE(data.ok()) << data.status().message();
      EXPECT_EQ(data->dtype, dtype);
      EXPECT_EQ(data->bytes.size(), static_cast<std::size_t>(data->shape.elements()) * dtype_size(dtype));
      EXPECT_EQ(crc32(data->bytes), dtype == DType::kF32 ? e.fp32 : e.bf16) << e.name;
    }
  }
}

TEST(Synth, FirstValues) {
  std::array<float, 3> values;
  synthetic_values("action_in_proj.weight", {1024, 32}, 0, 0, values);
  const float expected[] = {0.23333229f, -0.30609819f,
                            -0.01110363f};  // to eight decimals; the bits are checked above
  for (std::size_t i = 0; i < 3; ++i) EXPECT_NEAR(values[i], expected[i], 5e-9);
}

TEST(Synth, TokenRowsAreRowsOfTheTable) {
  const std::pair<std::int32_t, std::array<std::uint32_t, 2>> rows[] = {{0, {0x13cce570u, 0x0938784fu}},
                                                                        {2, {0xac54031bu, 0x1d0dbea2u}},
                                                                        {1000, {0xea917dc1u, 0x40095ae3u}},
                                                                        {257151, {0xd996b386u, 0x78639249u}}};
  const SyntheticSource exact(pi05_architecture(), 0, DType::kF32),
      rounded(pi05_architecture(), 0, DType::kBF16);
  std::vector<float> out(4 * 2048);
  const std::int32_t ids[] = {0, 2, 1000, 257151};
  ASSERT_TRUE(exact.token_rows(ids, out).ok());
  for (std::size_t i = 0; i < 4; ++i)
    EXPECT_EQ(crc32(std::as_bytes(std::span(out).subspan(i * 2048, 2048))), rows[i].second[0])
        << rows[i].first;
  ASSERT_TRUE(rounded.token_rows(ids, out).ok());
  for (std::size_t i = 0; i < 4; ++i) {
    std::vector<bf16> row(2048);
    for (std::size_t j = 0; j < 2048; ++j) {
      row[j] = to_bf16(out[i * 2048 + j]);
      ASSERT_EQ(to_float(row[j]), out[i * 2048 + j]);  // already rounded
    }
    EXPECT_EQ(crc32(std::as_bytes(std::span(row))), rows[i].second[1]) << rows[i].first;
  }
  const std::int32_t outside[] = {257152}, negative[] = {-1};
  EXPECT_FALSE(exact.token_rows(outside, std::span(out).first(2048)).ok());
  EXPECT_FALSE(exact.token_rows(negative, std::span(out).first(2048)).ok());
  EXPECT_FALSE(exact.token_rows(ids, std::span(out).first(2048)).ok());
}

// Any piece of a tensor is the same as the piece cut out of the whole, whatever its start and length.
TEST(Synth, PiecesFitTogether) {
  const Shape shape{37, 53};
  std::vector<float> whole(37 * 53);
  synthetic_values("a.weight", shape, 3, 0, whole);
  for (const std::size_t start : {0, 1, 7, 16, 1000, 1960})
    for (const std::size_t count : {0, 1, 2, 15, 16, 17, 1}) {
      std::vector<float> piece(std::min(count, whole.size() - start));
      synthetic_values("a.weight", shape, 3, start, piece);
      EXPECT_TRUE(std::equal(piece.begin(), piece.end(), whole.begin() + static_cast<std::ptrdiff_t>(start)));
    }
}

// The vector loop against the definition, one element at a time; both roundings.
TEST(Synth, MatchesTheScalarDefinition) {
  const std::string name = "time_mlp_in.weight";
  const Shape shape{999, 3};
  std::uint64_t key = 0xcbf29ce484222325u;
  for (const char c : name) key = (key ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  key ^= 99;
  std::vector<float> got(2997);
  std::vector<bf16> got_bf16(2997);
  synthetic_values(name, shape, 99, 0, got);
  synthetic_values(name, shape, 99, 0, got_bf16);
  for (std::uint64_t i = 0; i < got.size(); ++i) {
    std::uint64_t z = key + (i + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    const volatile float u = static_cast<float>(z >> 40) * 0x1p-24f;
    const volatile float unit = 2.0f * u - 1.0f;
    const volatile float product = 1.0f * unit;  // amp = sqrt(3 / 3)
    const float value = 0.0f + product;
    ASSERT_EQ(got[i], value) << i;
    ASSERT_EQ(got_bf16[i].bits, to_bf16(value).bits) << i;
  }
}

TEST(Synth, SourceKnowsTheManifest) {
  const SyntheticSource source(tiny_architecture(), 0, DType::kBF16);
  EXPECT_EQ(source.parameters(), 520220u);
  EXPECT_EQ(source.stored_dtype(), "BF16");
  for (const TensorSpec& spec : manifest(tiny_architecture())) {
    ASSERT_TRUE(source.has(spec.name));
    const Result<TensorData> data = source.get(spec.name);
    ASSERT_TRUE(data.ok());
    EXPECT_EQ(data->shape, spec.shape);
  }
  EXPECT_FALSE(source.has("state_proj.weight"));
  EXPECT_FALSE(source.get("state_proj.weight").ok());
}

TEST(Synthetic, DescribesWhatItWouldMake) {
  const SyntheticSource source(tiny_architecture(), 9, DType::kF32);
  const std::string name = kTokenTable;
  const auto made = source.get(name), described = source.describe(name);
  ASSERT_TRUE(made.ok() && described.ok());
  EXPECT_TRUE(described->bytes.empty());
  EXPECT_EQ(described->shape, made->shape);
  ASSERT_TRUE(described->sequence);
  const ops::Sequence s = *described->sequence;
  const auto* values = reinterpret_cast<const float*>(made->bytes.data());
  for (std::uint64_t i = 0; i < 1000; ++i) {
    std::uint64_t z = s.state + (i + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    const float u = static_cast<float>(z >> 40) * 0x1p-24f;
    EXPECT_EQ(values[i], s.offset + s.amp * (2 * u - 1));
  }
  EXPECT_FALSE(source.describe("no such tensor").ok());
}

}  // namespace
}  // namespace servoflow::weights
