#include "toolkit/linears.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "toolkit/case_runner.h"
#include "weights/manifest.h"

namespace servoflow::toolkit {
namespace {

constexpr char kTiny[] = "tests/golden/openpi-tiny";

weights::Checkpoint open_tiny() {
  Result<weights::Checkpoint> c = weights::open_checkpoint(kTiny);
  EXPECT_TRUE(c.ok()) << c.status().message();
  return std::move(*c);
}

std::vector<float> actions(std::shared_ptr<const weights::WeightSource> source, const std::string& device) {
  std::vector<CaseFile> cases;
  cases.push_back(std::move(*read_case(std::string(kTiny) + "/cases/libero.safetensors")));
  auto runner = CaseRunner::open(open_tiny(), cases, {.device = device, .source = std::move(source)});
  EXPECT_TRUE(runner.ok()) << runner.status().message();
  auto out = (*runner)->run(cases[0], nullptr);
  EXPECT_TRUE(out.ok()) << out.status().message();
  return out->normalized;
}

double largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double most = 0;
  for (std::size_t i = 0; i < a.size(); ++i)
    most = std::max(most, std::fabs(static_cast<double>(a[i]) - b[i]));
  return most;
}

TEST(Sites, EveryLinearLayerThatIsNotProtectedIsInExactlyOne) {
  const weights::Architecture a = weights::pi05_architecture();
  std::multiset<std::string> in_sites;
  std::map<std::string, std::int64_t> widths;
  for (const quant::Linear& l : linear_layers(a)) widths[l.name] = l.cols;
  for (const Site& s : sites(a))
    for (const std::string& l : s.linears) {
      in_sites.insert(l);
      ASSERT_TRUE(widths.contains(l)) << l;
      EXPECT_EQ(widths[l], s.width) << l;
    }
  // 27 x 6 + projector + 18 x 7 + 18 x 7.
  EXPECT_EQ(in_sites.size(), 27u * 6 + 1 + 2 * 18 * 7);
  EXPECT_EQ(std::set<std::string>(in_sites.begin(), in_sites.end()).size(), in_sites.size());
}

// quantization.md: "o_proj: divide v_proj rows, with s tied across the 8 query heads (1 KV head, 256
// values)".
TEST(Sites, QueryHeadsThatShareValuesShareMultipliers) {
  const weights::Architecture a = weights::pi05_architecture();
  for (const Site& s : sites(a)) {
    if (!s.linears.front().ends_with("o_proj")) continue;
    ASSERT_EQ(s.tie.size(), 2048u);
    EXPECT_EQ(s.tie[5], 5);
    EXPECT_EQ(s.tie[7 * 256 + 5], 5);
    std::vector<float> m(2048, 1.0f);
    m[5] = 2;  // without its seven companions
    EditedSource source(open_tiny().source);
    EXPECT_FALSE(source.fold(s, m).ok());
    return;
  }
  FAIL();
}

// quantization.md: "SigLIP fc2 cannot fold through GELU".
TEST(Sites, SiglipFc2CannotFold) {
  EditedSource source(open_tiny().source);
  const weights::Architecture a = open_tiny().architecture;
  for (const Site& s : sites(a))
    if (s.linears.front().ends_with("fc2")) {
      EXPECT_FALSE(source.fold(s, std::vector<float>(static_cast<std::size_t>(s.width), 2.0f)).ok());
    }
}

// Folding through Gemma's (1 + w), the expert's adaRMS, LayerNorm and rows of other layers changes nothing
// but rounding.
TEST(EditedSource, FoldingKeepsTheFunction) {
  const weights::Checkpoint tiny = open_tiny();
  const std::vector<float> before = actions(tiny.source, "cpu");
  for (const bool powers : {true, false}) {
    auto source = std::make_shared<EditedSource>(tiny.source);
    int folded = 0;
    for (const Site& s : sites(tiny.architecture)) {
      if (s.producer == Producer::kNone) continue;
      std::vector<float> m(static_cast<std::size_t>(s.width));
      for (std::size_t c = 0; c < m.size(); ++c) {
        const std::size_t row = s.tie.empty() ? c : static_cast<std::size_t>(s.tie[c]);
        m[c] = std::exp2(static_cast<float>(row % 5) - 2);
        if (!powers) m[c] *= 1.1f;
      }
      ASSERT_TRUE(source->fold(s, m).ok());
      ++folded;
    }
    EXPECT_GT(folded, 10);
    // Actions are of the order of 1; float32 rounding through some 100 products, and 1 + w - 1 loses bits.
    EXPECT_LT(largest_difference(before, actions(source, "cpu")), powers ? 3e-5 : 1e-4);
  }
  // And a multiplier on one side alone is seen.
  auto broken = std::make_shared<EditedSource>(tiny.source);
  const std::string up = std::string(weights::kExpertPrefix) + "layers.0.mlp.up_proj.weight";
  std::vector<float> w = *broken->values(up);
  for (float& v : w) v *= 1.5f;
  broken->replace(up, w);
  EXPECT_GT(largest_difference(before, actions(broken, "cpu")), 1e-4);
}

// Each attention's multiplier alone: the expert's reads the prefix's values, which must carry it as well.
TEST(EditedSource, AttentionOfTheExpertReadsThePrefixsValues) {
  const weights::Checkpoint tiny = open_tiny();
  const std::vector<float> before = actions(tiny.source, "cpu");
  for (const char* network : {weights::kLanguagePrefix, weights::kExpertPrefix}) {
    auto source = std::make_shared<EditedSource>(tiny.source);
    for (const Site& s : sites(tiny.architecture)) {
      if (!s.linears.front().starts_with(network) || !s.linears.front().ends_with("o_proj")) continue;
      std::vector<float> m(static_cast<std::size_t>(s.width));
      for (std::size_t c = 0; c < m.size(); ++c) m[c] = s.tie[c] % 3 == 0 ? 8.0f : 0.5f;
      ASSERT_TRUE(source->fold(s, m).ok());
    }
    EXPECT_EQ(before, actions(source, "cpu")) << network;
  }
}

TEST(EditedSource, PlantedOutliersKeepFp32OutputsToTheBit) {
  const weights::Checkpoint tiny = open_tiny();
  auto source = std::make_shared<EditedSource>(tiny.source);
  ASSERT_TRUE(plant_outliers(tiny.architecture, {.stride = 8}, *source).ok());
  EXPECT_TRUE(source->edits(std::string(weights::kLanguagePrefix) + "layers.0.mlp.down_proj.weight"));
  EXPECT_EQ(actions(tiny.source, "cpu"), actions(source, "cpu"));
  EXPECT_FALSE(plant_outliers(tiny.architecture, {.stride = 0}, *source).ok());
}

}  // namespace
}  // namespace servoflow::toolkit
