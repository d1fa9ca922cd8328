#include "toolkit/plot.h"

#include <gtest/gtest.h>

#include <cmath>

namespace servoflow::toolkit {
namespace {

TEST(Plot, TicksAreRoundAndCoverTheRange) {
  const std::vector<double> t = axis_ticks(-0.13, 0.92);
  EXPECT_LE(t.front(), -0.13);
  EXPECT_GE(t.back(), 0.92);
  EXPECT_GE(t.size(), 3u);
  EXPECT_LE(t.size(), 7u);
  for (const auto& [low, high] : {std::pair{5.0, 5.0}, {0.0, 0.0}, {1e-9, 3e-9}, {-1e6, 1e6}}) {
    const std::vector<double> ticks = axis_ticks(low, high);
    EXPECT_LE(ticks.front(), low);
    EXPECT_GE(ticks.back(), high);
    EXPECT_LT(ticks.front(), ticks.back());
  }
}

TEST(Plot, HasOneLinePerDimensionAndSurvivesAnything) {
  ActionChunk c;
  c.horizon = 5;
  c.action_dim = 4;
  c.actions.assign(20, 0.5);
  c.actions[6] = std::nan("");
  const std::string svg = plot_actions_svg(c, {.title = "a <b> & \"c\" \xff", .labels = {"x"}});
  std::size_t lines = 0;
  for (std::size_t at = svg.find("<polyline"); at != std::string::npos; at = svg.find("<polyline", at + 1))
    ++lines;
  EXPECT_EQ(lines, 5u) << "the gap splits one line in two";
  EXPECT_NE(svg.find("a &lt;b&gt; &amp; &quot;c&quot; ?"), std::string::npos);
  EXPECT_NE(svg.find(">x [robot units]<"), std::string::npos);
  EXPECT_EQ(svg.find("nan"), std::string::npos);
  EXPECT_NE(plot_actions_svg({}, {}).find("</svg>"), std::string::npos);
}

}  // namespace
}  // namespace servoflow::toolkit
