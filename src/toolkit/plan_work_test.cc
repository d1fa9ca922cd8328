#include "toolkit/plan_work.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "core/json.h"

namespace servoflow::toolkit {
namespace {

const weights::Architecture& pi05() {
  static const weights::Architecture a = weights::pi05_architecture();
  return a;
}

// Millions of parameters, 1e9 bytes in BF16 and 1e9 operations, as published for two and three views, 200
// prompt tokens and horizon 50, and for 48 tokens and horizon 10. Rounded there, so half a unit of the last
// digit is right.
TEST(PlanWork, MatchesThePublishedTable) {
  struct Row {
    WorkShape shape;
    double vision, prefix, step, all;
  };
  const Row rows[] = {{{2, 200, 50, 10}, 440, 2737, 36.8, 3545},
                      {{3, 200, 50, 10}, 660, 3756, NAN, 4803},
                      {{2, 48, 10, 10}, 440, 2141, 7.1, 2652}};
  for (const Row& r : rows) {
    const PlanWork w = count_components(pi05(), r.shape);
    const auto giga = [](const StageParts& s) { return (s.products() + s.attention()) / 1e9; };
    EXPECT_NEAR(giga(w.vision), r.vision, 0.6);
    EXPECT_NEAR(giga(w.prefix), r.prefix, 0.5);
    if (!std::isnan(r.step)) {
      EXPECT_NEAR(giga(w.step), r.step, 0.05);
    }
    EXPECT_NEAR(giga(w.vision) + giga(w.prefix) + 10 * giga(w.step), r.all, 0.6);
    EXPECT_NEAR(static_cast<double>(w.vision.weights()) / 1e6, 414, 0.5);
    EXPECT_NEAR(static_cast<double>(w.prefix.weights()) / 1e6, 1873, 0.5);
    EXPECT_NEAR(static_cast<double>(w.step.weights()) / 1e6, 311.5, 0.05);
    EXPECT_NEAR(static_cast<double>(w.modulation_weights) / 1e6, 118.5, 0.05);
    EXPECT_NEAR(static_cast<double>(w.vision.weights()) * 2e-9, 0.83, 0.005);
    EXPECT_NEAR(static_cast<double>(w.prefix.weights()) * 2e-9, 3.75, 0.005);
    EXPECT_NEAR(static_cast<double>(w.step.weights()) * 2e-9, 0.62, 0.005);
    EXPECT_NEAR(static_cast<double>(w.modulation_weights) * 2e-9, 0.24, 0.005);
  }
}

TEST(PlanWork, SumsToTheCountOfTheBenchmark) {
  for (const WorkShape& shape :
       {WorkShape{2, 200, 50, 10, 1}, WorkShape{1, 7, 3, 4, 5}, WorkShape{0, 1, 1, 1, 2}})
    for (const weights::Architecture& a : {weights::pi05_architecture(), weights::tiny_architecture()}) {
      const Work want = count_work(a, shape, 2, 2);
      const PlanWork got = count_components(a, shape);
      for (const auto& [parts, stage] :
           {std::pair(&got.vision, &want.vision), std::pair(&got.prefix, &want.prefix),
            std::pair(&got.step, &want.step)}) {
        EXPECT_EQ(parts->weights(), stage->weights) << parts->name;
        // The same integers in another order of doubles.
        EXPECT_NEAR(parts->products() + parts->attention(), stage->flops, 1e-12 * stage->flops)
            << parts->name;
        EXPECT_DOUBLE_EQ(parts->cached() * 2, stage->cache_bytes) << parts->name;
      }
      EXPECT_EQ(got.modulation_weights, want.modulation_weights);
    }
}

TEST(PlanWork, ABatchOfDifferentRequestsAddsRowsButNotWeights) {
  const std::vector<WorkShape> requests = {{2, 200, 50, 10}, {1, 100, 50, 10}};
  const PlanWork both = count_components(pi05(), requests), one = count_components(pi05(), requests[0]),
                 other = count_components(pi05(), requests[1]);
  EXPECT_EQ(both.prefix.weights(), one.prefix.weights());
  EXPECT_DOUBLE_EQ(both.prefix.products(), one.prefix.products() + other.prefix.products());
  EXPECT_DOUBLE_EQ(both.step.cached(), one.step.cached() + other.step.cached());
}

// What the engine's own trace zones counted, kernel by kernel, in a committed run: counted there by the calls
// that were made, here from the sizes.
TEST(PlanWork, AgreesWithTheTraceOfACommittedRun) {
  for (const char* name : {"v2-t200-h50", "v2-t48-h10"}) {
    const std::string path = std::string("bench/results/cpu-pi05-bf16-") + name + ".json";
    const Result<Json> file = read_json_file(path);
    ASSERT_TRUE(file.ok()) << file.status().message();
    const Json& work = (*file)["work"];
    const int steps = work["steps"];
    const PlanWork w = count_components(
        pi05(),
        {.views = work["views"], .tokens = work["tokens"], .horizon = work["horizon"], .steps = steps});
    std::map<std::string, double> traced;
    for (const Json& c : (*file)["components"]) traced[c["name"]] = c["gflop"];
    int compared = 0;
    for (const StageParts* stage : {&w.vision, &w.prefix, &w.step})
      for (const ComponentWork& c : stage->components) {
        if (traced.count(c.name) == 0) continue;
        const double passes = stage == &w.step ? steps : 1;
        const double have = (c.products + c.attention) * passes / 1e9;
        // The last layer may make its queries with K and V in one product, although nothing reads them.
        if (c.name == "prefix/qkv") {
          const weights::GemmaSizes& p = pi05().prefix;
          const double rows = 2.0 * 256 + static_cast<double>(work["tokens"]);
          const double dead = 2.0 * rows * p.width * p.heads * p.head_dim / 1e9;
          const double without = std::abs(have - traced[c.name]);
          EXPECT_LT(std::min(without, std::abs(have + dead - traced[c.name])), 1e-6 * have);
        } else {
          EXPECT_NEAR(have, traced[c.name], 1e-6 * have) << c.name;
        }
        ++compared;
      }
    EXPECT_GE(compared, 13) << path;
  }
}

}  // namespace
}  // namespace servoflow::toolkit
