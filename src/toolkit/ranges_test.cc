#include "toolkit/ranges.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "toolkit/e2m1_study.h"

namespace servoflow::toolkit {
namespace {

CalibrationStatistics two_sites() {
  CalibrationStatistics s{.denoise_steps = 3};
  std::mt19937 random(1);
  std::normal_distribution<float> draw;
  SiteStatistics &calm = s.sites["calm"], &wild = s.sites["wild"];
  calm.width = wild.width = 32;
  for (int step = 0; step < 3; ++step) {
    std::vector<float> x(32 * 400);
    for (float& v : x) v = draw(random);
    calm.add(step, x);
    for (std::size_t i = 0; i < x.size(); i += 32)
      x[i] *= step == 2 ? 2000.0f : 1.0f;  // one channel, one step
    wild.add(step, x);
  }
  return s;
}

// quantization.md: ranges drift with the denoise step, and |x| > 448 * 6 does not fit.
TEST(Ranges, FlagsWhatNvfp4CannotHoldInTheStepWhereItHappens) {
  const Result<RangeReport> r = ranges(two_sites(), {.code = quant::Code::kE2M1});
  ASSERT_TRUE(r.ok()) << r.status().message();
  const SiteRange &calm = r->sites[0], &wild = r->sites[1];
  EXPECT_FALSE(calm.flagged);
  EXPECT_TRUE(wild.flagged);
  EXPECT_EQ(r->flagged, 1);
  EXPECT_EQ(wild.step_beyond[0], 0u);
  EXPECT_EQ(wild.step_beyond[1], 0u);
  EXPECT_GT(wild.step_beyond[2], 20u);
  EXPECT_EQ(wild.beyond, wild.step_beyond[2]);
  EXPECT_GT(wild.drift, 500);
  EXPECT_LT(calm.drift, 2);
  EXPECT_GT(wild.channel_ratio, 500);
  EXPECT_NE(ranges_text(*r, false).find("wild"), std::string::npos);
  EXPECT_EQ(ranges_text(*r, false).find("calm"), std::string::npos);
}

// The command names what has values beyond the limit and what clipping changes, nothing else; layers of a
// kind together where all of them need it.
TEST(Ranges, SaysHowToClipWhatSaturates) {
  CalibrationStatistics s{.checkpoint = "my policies/tiny/", .denoise_steps = 1};
  std::mt19937 random(2);
  std::normal_distribution<float> draw;
  const auto add = [&](const std::string& name, bool wild) {
    SiteStatistics& site = s.sites[name];
    site.width = 8;
    std::vector<float> x(8 * 4000);
    for (float& v : x) v = draw(random);
    if (wild) x[5] = 5000;
    site.add(0, x);
  };
  for (const char* layer : {"0", "1"}) {
    add(std::string("a.layers.") + layer + ".mlp.down_proj", true);
    add(std::string("a.layers.") + layer + ".self_attn.o_proj", layer[0] == '1');
    add(std::string("a.layers.") + layer + ".mlp.gate_proj", false);
  }
  const Result<RangeReport> r = ranges(s, {.statistics = "it's.stats"});
  ASSERT_TRUE(r.ok()) << r.status().message();
  EXPECT_EQ(r->advice.beyond, 3);
  const std::string command =
      "servoflow quantize 'my policies/tiny/' tiny-fp8-w8a8-static --recipe fp8-w8a8-static --statistics "
      "'it'\\''s.stats' --calibrator percentile --percentile 0.999 --clip 'a.layers.*.mlp.down_proj' --clip "
      "a.layers.1.self_attn.o_proj";
  const Result<RangeReport> by_share =
      ranges(s, {.calibrator = {quant::Calibrator::kPercentile, 0.999}, .statistics = "it's.stats"});
  ASSERT_TRUE(by_share.ok());
  EXPECT_EQ(by_share->advice.sites, 3);
  EXPECT_EQ(by_share->advice.command, command);
  EXPECT_NE(ranges_text(*by_share, false).find("\n  " + command + "\n"), std::string::npos);
  EXPECT_EQ(ranges_to_json(*by_share)["clip"]["command"], command);
  // INT8 inputs are smoothed unless that is forbidden, and then they are not what was measured.
  const Result<RangeReport> int8 = ranges(s, {.code = quant::Code::kInt8});
  ASSERT_TRUE(int8.ok());
  for (const std::string part : {"--recipe int8-w8a8-static", "--smooth none",
                                 "--calibrator percentile --percentile 0.9999", "STATISTICS"})
    EXPECT_NE(int8->advice.command.find(part), std::string::npos) << int8->advice.command;
  // A folder without a name of its own, and one that looks like an option.
  s.checkpoint = "/";
  EXPECT_NE(ranges(s, {})->advice.command.find("quantize / policy-fp8-w8a8-static "), std::string::npos);
  s.checkpoint = "-odd";
  EXPECT_NE(ranges(s, {})->advice.command.find("quantize ./-odd ./-odd-fp8-w8a8-static "), std::string::npos);
  s.checkpoint = ".";
  EXPECT_EQ(ranges(s, {})->advice.command.find("quantize . .-"), std::string::npos);
  const Result<RangeReport> no_share = ranges(s, {.calibrator = {.percentile = 99.99}});
  ASSERT_FALSE(no_share.ok());
  EXPECT_NE(no_share.status().message().find("a share between 0 and 1"), std::string::npos);
  // Nothing beyond the limit: nothing to clip.
  const Result<RangeReport> calm = ranges(s, {.limit = 10000});
  ASSERT_TRUE(calm.ok());
  EXPECT_EQ(calm->advice.command, "");
  EXPECT_EQ(ranges_to_json(*calm)["clip"]["command"], nullptr);
  EXPECT_EQ(ranges_text(*calm, false).find("--clip"), std::string::npos);
}

// A single large value among few: the least squared error is that of the whole range, and it says so.
TEST(Ranges, ACalibratorThatKeepsTheWholeRangeIsNoAdvice) {
  CalibrationStatistics s{.checkpoint = "tiny", .denoise_steps = 1};
  SiteStatistics& site = s.sites["a"];
  site.width = 2;
  site.add(0, std::vector<float>{1, 5000});
  const Result<RangeReport> r = ranges(s, {});
  ASSERT_TRUE(r.ok()) << r.status().message();
  EXPECT_EQ(r->advice.beyond, 1);
  EXPECT_EQ(r->advice.sites, 0);
  EXPECT_EQ(r->advice.command, "");
  EXPECT_TRUE(r->advice.too_few);
  EXPECT_NE(ranges_text(*r, false).find("too few values for percentile 0.9999"), std::string::npos);
  EXPECT_NE(
      ranges_text(*r, false).find("1 of the 1 sites with values beyond 2688 keep their whole range by mse"),
      std::string::npos)
      << ranges_text(*r, false);
}

TEST(Ranges, ClippingByLeastSquaresNeverLosesToTheWholeRange) {
  for (const quant::Code code : {quant::Code::kInt8, quant::Code::kE4M3, quant::Code::kE2M1}) {
    const Result<RangeReport> r =
        ranges(two_sites(), {.code = code, .calibrator = {quant::Calibrator::kMse}});
    ASSERT_TRUE(r.ok());
    for (const SiteRange& s : r->sites) EXPECT_GE(s.snr_db, s.snr_full_db) << s.name;
    EXPECT_GT(r->sites[0].snr_full_db, code == quant::Code::kE2M1 ? 10 : 25);
  }
}

TEST(E2m1Study, FindsWhatIsKnownOfTheFormat) {
  const weights::Checkpoint tiny = *weights::open_checkpoint("tests/golden/openpi-tiny");
  const Result<StudyReport> r = e2m1_study(tiny, {});
  ASSERT_TRUE(r.ok()) << r.status().message();
  std::map<std::string, StudyRow> rows;
  for (const StudyRow& row : r->rows) rows[row.variant] = row;
  // The study's own rounding and the format's agree: the same numbers by two ways.
  EXPECT_NEAR(rows["E2M1"].snr_db, rows["nvfp4-w4a16"].snr_db, 0.15);
  EXPECT_GT(rows["subnormal 0.5 kept"].snr_db, rows["subnormal 0.5 flushed to zero"].snr_db + 0.5);
  EXPECT_GT(rows["nvfp4-w4a16"].snr_db, rows["mxfp4-w4a16"].snr_db);
  EXPECT_GT(rows["int8-w8a16"].snr_db, rows["nvfp4-w4a16"].snr_db + 10);
  EXPECT_NEAR(rows["bias 1, E4M3 scales"].snr_db, rows["bias 2, E4M3 scales"].snr_db, 1e-6)
      << "the scales absorb it";
  EXPECT_GT(rows["float32 with Kahan's compensation"].snr_db, rows["float32, one by one"].snr_db);
  EXPECT_EQ(
      rows["integers from a 16 x 16 table per group"].note.find("differs from the float group sum in 0 of"),
      0u);
  EXPECT_FALSE(e2m1_study(tiny, {.layers = {"nothing"}}).ok());
}

}  // namespace
}  // namespace servoflow::toolkit
