#include "action_timeline.h"

#include <gtest/gtest.h>

#include <limits>
#include <stdexcept>

namespace robot {
namespace {

constexpr Clock::time_point kBegin{std::chrono::hours(1)};

Clock::time_point after(double seconds) {
  return kBegin + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

TimelineOptions options(Stale stale) { return {.period_s = 0.1, .replan_every = 2, .stale = stale}; }

// Rows (0, 10), (1, 11), (4, 14): the last difference is 3.
Chunk chunk(Clock::time_point begin = kBegin) { return {{3, 2, {0, 10, 1, 11, 4, 14}}, begin}; }

ActionTimeline filled(Stale stale) {
  ActionTimeline timeline(options(stale));
  timeline.add(chunk());
  return timeline;
}

TEST(ActionTimeline, WaitsWithoutAChunk) {
  const ActionTimeline timeline(options(Stale::kHold));
  EXPECT_EQ(timeline.at(kBegin).state, State::kWaiting);
  EXPECT_TRUE(timeline.at(kBegin).action.empty());
  EXPECT_LE(timeline.next_observation(), kBegin);
}

TEST(ActionTimeline, EachRowHasItsPeriod) {
  const ActionTimeline timeline = filled(Stale::kStop);
  EXPECT_EQ(timeline.at(after(-5)).action, (std::vector<double>{0, 10}));
  EXPECT_EQ(timeline.at(after(0)).action, (std::vector<double>{0, 10}));
  EXPECT_EQ(timeline.at(after(0.05)).action, (std::vector<double>{0, 10}));
  EXPECT_EQ(timeline.at(after(0.15)).action, (std::vector<double>{1, 11}));
  const Step last = timeline.at(after(0.25));
  EXPECT_EQ(last.action, (std::vector<double>{4, 14}));
  EXPECT_EQ(last.state, State::kFresh);
  EXPECT_NEAR(last.age_s, 0.25, 1e-9);
}

TEST(ActionTimeline, HoldRepeatsTheLastAction) {
  const Step step = filled(Stale::kHold).at(after(1e6));
  EXPECT_EQ(step.state, State::kHold);
  EXPECT_EQ(step.action, (std::vector<double>{4, 14}));
}

TEST(ActionTimeline, StopGivesNone) {
  const Step step = filled(Stale::kStop).at(after(0.35));
  EXPECT_EQ(step.state, State::kStop);
  EXPECT_TRUE(step.action.empty());
}

TEST(ActionTimeline, ExtrapolateGoesOnAndThenStops) {
  const ActionTimeline timeline = filled(Stale::kExtrapolate);
  EXPECT_EQ(timeline.at(after(0.35)).action, (std::vector<double>{7, 17}));
  EXPECT_EQ(timeline.at(after(0.35)).state, State::kExtrapolate);
  EXPECT_EQ(timeline.at(after(0.55)).action, (std::vector<double>{13, 23}));
  EXPECT_EQ(timeline.at(after(0.65)).state, State::kStop);
  EXPECT_EQ(timeline.at(after(1e9)).state, State::kStop);
}

TEST(ActionTimeline, OneActionHasNoDifferenceToGoOnWith) {
  ActionTimeline timeline(options(Stale::kExtrapolate));
  timeline.add({{1, 2, {1, 2}}, kBegin});
  EXPECT_EQ(timeline.at(after(0.15)).state, State::kStop);
}

TEST(ActionTimeline, TheNextObservationIsDueAfterReplanActions) {
  ActionTimeline timeline = filled(Stale::kHold);
  EXPECT_EQ(timeline.next_observation(), after(0.2));
  TimelineOptions seldom = options(Stale::kHold);
  seldom.replan_every = 50;  // no chunk is that long: its end counts
  ActionTimeline other(seldom);
  other.add(chunk());
  EXPECT_NEAR(std::chrono::duration<double>(other.next_observation() - kBegin).count(), 0.3, 1e-6);
}

TEST(ActionTimeline, NewerChunksReplaceAndOlderOnesDoNot) {
  ActionTimeline timeline = filled(Stale::kHold);
  timeline.add({{1, 2, {-1, -2}}, after(0.2)});
  EXPECT_EQ(timeline.at(after(0.25)).action, (std::vector<double>{-1, -2}));
  timeline.add(chunk(after(0.1)));
  EXPECT_EQ(timeline.at(after(0.25)).action, (std::vector<double>{-1, -2}));
}

TEST(ActionTimeline, WhatMustNotReachAMotorIsRefused) {
  ActionTimeline timeline = filled(Stale::kHold);
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  constexpr std::size_t kHuge = std::numeric_limits<std::size_t>::max() / 2 + 1;  // twice it is 0
  EXPECT_THROW(timeline.add({{0, 0, {}}, after(1)}), std::invalid_argument);
  EXPECT_THROW(timeline.add({{2, 2, {1, 2, 3}}, after(1)}), std::invalid_argument);
  EXPECT_THROW(timeline.add({{kHuge, 2, {}}, after(1)}), std::invalid_argument);
  EXPECT_THROW(timeline.add({{1, 2, {1, kNan}}, after(1)}), std::invalid_argument);
  EXPECT_THROW(timeline.add({{1, 3, {1, 2, 3}}, after(1)}), std::invalid_argument);  // another width
  EXPECT_EQ(timeline.chunk().begin, kBegin);
}

TEST(ActionTimeline, OptionsAreChecked) {
  EXPECT_THROW(ActionTimeline(options(Stale{})), std::invalid_argument);
  for (double period : {0.0, -1.0, std::numeric_limits<double>::quiet_NaN(), 1e300}) {
    TimelineOptions wrong = options(Stale::kHold);
    wrong.period_s = period;
    EXPECT_THROW(ActionTimeline{wrong}, std::invalid_argument) << period;
  }
  TimelineOptions never = options(Stale::kHold);
  never.replan_every = 0;
  EXPECT_THROW(ActionTimeline{never}, std::invalid_argument);
}

TEST(ActionTimeline, Names) {
  EXPECT_EQ(parse_stale("hold"), Stale::kHold);
  EXPECT_EQ(parse_stale("stop"), Stale::kStop);
  EXPECT_EQ(parse_stale("extrapolate"), Stale::kExtrapolate);
  EXPECT_FALSE(parse_stale("hope"));
  EXPECT_STREQ(name_of(State::kWaiting), "waiting");
  EXPECT_STREQ(name_of(State::kFresh), "fresh");
  EXPECT_STREQ(name_of(State::kExtrapolate), "extrapolate");
}

}  // namespace
}  // namespace robot
