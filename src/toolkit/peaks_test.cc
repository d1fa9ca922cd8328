#include "toolkit/peaks.h"

#include <gtest/gtest.h>

namespace servoflow::toolkit {
namespace {

// Rates differ from machine to machine; what holds everywhere is that they are there and within physical
// bounds.
TEST(Peaks, AreMeasuredAndPlausible) {
  const Peaks p = measure_peaks(2, 0.002);
  for (const Peak& peak : {p.fp32, p.read}) {
    EXPECT_GT(peak.one, 0.05) << peak.instruction;
    EXPECT_GT(peak.all, 0.05) << peak.instruction;
    EXPECT_LT(peak.all, 1e6) << peak.instruction;
  }
  if (!p.bf16.instruction.empty()) {
    EXPECT_GT(p.bf16.one, 0.05);
  }
  EXPECT_EQ(peaks_to_json(p).size(), 5u);
}

}  // namespace
}  // namespace servoflow::toolkit
