#include "toolkit/trace.h"

#include <gtest/gtest.h>

namespace servoflow::toolkit {
namespace {

// Two layers inside the prefix on thread 0, one task beside them on thread 1.
const std::vector<zones::Event> kEvents = {{"prefix", 0, 1'000'000, 11'000'000, 0, 0},
                                           {"prefix/mlp", 0, 1'000'000, 4'000'000, 6e9, 0},
                                           {"prefix/mlp", 0, 5'000'000, 9'000'000, 8e9, 0},
                                           {"host", 1, 2'000'000, 3'000'000, 0, 5e6}};

TEST(Trace, ChromeFindsEveryEvent) {
  const Json j = trace_to_json(kEvents);
  ASSERT_EQ(j["traceEvents"].size(), 4u);
  const Json& mlp = j["traceEvents"][1];
  EXPECT_EQ(mlp["ph"], "X");
  EXPECT_EQ(mlp["cat"], "prefix");
  EXPECT_EQ(mlp["ts"], 0.0);
  EXPECT_EQ(mlp["dur"], 3000.0);
  EXPECT_EQ(mlp["tid"], 0);
  EXPECT_DOUBLE_EQ(mlp["args"]["gflops"], 2000.0);
  EXPECT_TRUE(trace_to_json({})["traceEvents"].empty());
}

TEST(Trace, NestedZonesAreCountedOnce) {
  const auto table = component_table(kEvents);
  ASSERT_EQ(table.size(), 3u);
  EXPECT_EQ(table[0].name, "prefix/mlp");
  EXPECT_EQ(table[0].calls, 2);
  EXPECT_DOUBLE_EQ(table[0].ms, 7);
  EXPECT_DOUBLE_EQ(table[0].flops, 14e9);
  EXPECT_EQ(table[1].name, "prefix");
  EXPECT_DOUBLE_EQ(table[1].ms, 3) << "10 ms less the 7 of its children";
  EXPECT_DOUBLE_EQ(table[2].ms, 1) << "another thread's zone is nobody's child";
  EXPECT_NE(component_text(table).find("63.6%"), std::string::npos) << component_text(table);
}

}  // namespace
}  // namespace servoflow::toolkit
