#include "serve/metrics.h"

#include <gtest/gtest.h>

#include <set>
#include <sstream>

namespace servoflow::serve {
namespace {

TEST(Metrics, HistogramsAreCumulative) {
  Histogram histogram({1, 2, 4});
  for (const double x : {0.5, 1.0, 1.5, 3.0, 100.0}) histogram.observe(x);
  std::string text;
  histogram.write(text, "h", "stage=\"x\"");
  EXPECT_EQ(
      text,
      "h_bucket{stage=\"x\",le=\"1\"} 2\nh_bucket{stage=\"x\",le=\"2\"} 3\nh_bucket{stage=\"x\",le=\"4\"} 4\n"
      "h_bucket{stage=\"x\",le=\"+Inf\"} 5\nh_sum{stage=\"x\"} 106\nh_count{stage=\"x\"} 5\n");
  EXPECT_EQ(histogram.count(), 5u);
}

// The exposition format, 0.0.4: every sample's family has its HELP and TYPE before it, once.
TEST(Metrics, ThePageIsWellFormed) {
  Metrics metrics;
  metrics.fail(Cause::kQueueFull);
  metrics.observe_ms(Stage::kDenoise, 12);
  std::istringstream page(metrics.text("robot=\"" + escape_label("a\"b\\c\nd") + "\""));
  std::set<std::string> families;
  std::string line, family;
  bool queue_full = false, denoise = false;
  while (std::getline(page, line)) {
    if (line.starts_with("# TYPE ")) {
      family = line.substr(7, line.find(' ', 7) - 7);
      EXPECT_TRUE(families.insert(family).second) << line;
    } else if (!line.starts_with("# HELP ")) {
      EXPECT_TRUE(line.starts_with(family)) << line << " under " << family;
      EXPECT_NE(line.find_last_of(' '), std::string::npos);
    }
    queue_full = queue_full || line == "servoflow_errors_total{cause=\"queue_full\"} 1";
    denoise = denoise || line == "servoflow_stage_seconds_bucket{stage=\"denoise\",le=\"0.015\"} 1";
  }
  EXPECT_TRUE(queue_full);
  EXPECT_TRUE(denoise);
  EXPECT_TRUE(families.contains("process_resident_memory_bytes"));
  EXPECT_NE(
      metrics.text("robot=\"" + escape_label("a\"b\\c\nd") + "\"").find("{robot=\"a\\\"b\\\\c\\nd\"} 1"),
      std::string::npos);
}

}  // namespace
}  // namespace servoflow::serve
