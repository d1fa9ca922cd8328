#include "toolkit/work.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace servoflow::toolkit {
namespace {

// pi0.5 as published, written out here so that the count is checked against the paper and not against itself.
weights::Architecture pi05() {
  weights::Architecture a;
  a.vision = {.width = 1152, .depth = 27, .heads = 16, .mlp = 4304, .patch = 14, .image = 224};
  a.prefix = {.width = 2048, .depth = 18, .mlp = 16384, .heads = 8, .kv_heads = 1, .head_dim = 256};
  a.expert = {.width = 1024, .depth = 18, .mlp = 4096, .heads = 8, .kv_heads = 1, .head_dim = 256};
  a.vocab = 257152;
  a.action_dim = 32;
  a.horizon = 50;
  return a;
}

double giga(double x) { return std::round(x / 1e9); }

TEST(Work, MatchesThePublishedTable) {
  const Work w = count_work(pi05(), {.views = 2, .tokens = 200, .horizon = 50, .steps = 10}, 2, 2);
  EXPECT_EQ(std::round(w.vision.weights / 1e6), 414);
  EXPECT_EQ(std::round(w.prefix.weights / 1e6), 1873);
  EXPECT_NEAR(w.step.weights / 1e6, 311.5, 0.05);
  EXPECT_NEAR(w.modulation_weights / 1e6, 118.5, 0.05);
  EXPECT_NEAR(w.vision.weight_bytes / 1e9, 0.83, 0.005);
  EXPECT_NEAR(w.prefix.weight_bytes / 1e9, 3.75, 0.005);
  EXPECT_NEAR(w.step.weight_bytes / 1e9, 0.62, 0.005);
  EXPECT_EQ(giga(w.vision.flops), 440);
  EXPECT_EQ(giga(w.prefix.flops), 2737);
  EXPECT_NEAR(w.step.flops / 1e9, 36.8, 0.05);
  EXPECT_EQ(giga(w.all.flops), 3545);
}

TEST(Work, FollowsViewsTokensHorizonAndSteps) {
  const Work three = count_work(pi05(), {.views = 3, .tokens = 200, .horizon = 50, .steps = 10}, 2, 2);
  EXPECT_NEAR(giga(three.vision.flops), 660, 1);
  EXPECT_EQ(giga(three.prefix.flops), 3756);
  EXPECT_EQ(giga(three.all.flops), 4803);
  const Work small = count_work(pi05(), {.views = 2, .tokens = 48, .horizon = 10, .steps = 10}, 2, 2);
  EXPECT_EQ(giga(small.prefix.flops), 2141);
  EXPECT_NEAR(small.step.flops / 1e9, 7.1, 0.05);
  EXPECT_EQ(giga(small.all.flops), 2652);
}

TEST(Work, ABatchSharesWeightsButNotArithmetic) {
  const Work one = count_work(pi05(), {}, 2, 2), four = count_work(pi05(), {.batch = 4}, 2, 2);
  EXPECT_DOUBLE_EQ(four.all.flops, 4 * one.all.flops);
  const std::vector<WorkShape> same(4), ragged = {{.tokens = 200}, {.views = 1, .tokens = 48}};
  EXPECT_DOUBLE_EQ(count_batch(pi05(), same, 2, 2).all.flops, four.all.flops);
  EXPECT_DOUBLE_EQ(count_batch(pi05(), same, 2, 2).all.weight_bytes, four.all.weight_bytes);
  const Work both = count_batch(pi05(), ragged, 2, 2), short_one = count_work(pi05(), ragged[1], 2, 2);
  EXPECT_DOUBLE_EQ(both.all.flops, one.all.flops + short_one.all.flops);
  EXPECT_DOUBLE_EQ(both.denoise.cache_bytes, one.denoise.cache_bytes + short_one.denoise.cache_bytes);
  EXPECT_DOUBLE_EQ(both.denoise.weight_bytes, one.denoise.weight_bytes);
  EXPECT_DOUBLE_EQ(four.all.weight_bytes, one.all.weight_bytes);
  EXPECT_DOUBLE_EQ(four.step.cache_bytes, 4 * one.step.cache_bytes);
  // 712 rows of K and V, one head of 256, 18 layers, two bytes each.
  EXPECT_DOUBLE_EQ(one.step.cache_bytes, 712.0 * 2 * 256 * 18 * 2);
}

}  // namespace
}  // namespace servoflow::toolkit
