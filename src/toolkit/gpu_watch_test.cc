#include "toolkit/gpu_watch.h"

#include <gtest/gtest.h>

namespace servoflow::toolkit {
namespace {

TEST(GpuWatch, ReadsWhatTheDriverTells) {
  const GpuWatch watch("0000:3b:00.0", SF_FAKE_NVML);
  ASSERT_EQ(watch.problem(), "");
  EXPECT_EQ(reading_to_json(watch.read()), (Json{{"sm_mhz", 1980},
                                                 {"memory_mhz", 3201},
                                                 {"power_w", 412.5},
                                                 {"temperature_c", 54},
                                                 {"held_down", {"power_cap", "thermal_sw"}}}));
  const Json limits = watch.limits();
  EXPECT_EQ(limits["driver"], "580.1");
  EXPECT_TRUE(limits["max_sm_mhz"].is_null()) << "the driver refuses it";
  EXPECT_TRUE(limits["power_limit_w"].is_null()) << "the library lacks the function";
}

TEST(GpuWatch, AbsenceIsNamedAndReadsAsNull) {
  const GpuWatch no_library("0000:3b:00.0", "libno-such-nvml.so.9");
  EXPECT_NE(no_library.problem().find("libno-such-nvml.so.9"), std::string::npos) << no_library.problem();
  const Json nothing = reading_to_json(no_library.read());
  EXPECT_EQ(nothing.size(), 5u);
  for (const auto& [key, value] : nothing.items()) EXPECT_TRUE(value.is_null()) << key;
  EXPECT_TRUE(no_library.limits()["driver"].is_null());
  const GpuWatch no_gpu("0000:00:00.0", SF_FAKE_NVML);
  EXPECT_NE(no_gpu.problem().find("Not Found"), std::string::npos) << no_gpu.problem();
  const GpuWatch other_library("0000:3b:00.0", "libc.so.6");
  EXPECT_NE(other_library.problem().find("functions"), std::string::npos) << other_library.problem();
}

TEST(GpuWatch, ReasonsHaveNames) {
  EXPECT_TRUE(reasons_text(0).empty());
  EXPECT_EQ(reasons_text(1 | 8), (std::vector<std::string>{"idle", "hardware_slowdown"}));
  EXPECT_EQ(reasons_text(std::uint64_t{1} << 40), (std::vector<std::string>{"bit_40"}));
}

}  // namespace
}  // namespace servoflow::toolkit
