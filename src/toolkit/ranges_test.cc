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
