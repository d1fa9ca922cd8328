#include "toolkit/device_peaks.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

namespace servoflow::toolkit {
namespace {

TEST(DevicePeaks, AreMeasuredThroughAnyBackend) {
  for (const char* precision : {"bf16", "fp32"}) {
    auto choice = ops::make_backend({.device = "cpu", .precision = precision, .threads = 1});
    ASSERT_TRUE(choice.ok()) << choice.status().message();
    const auto peaks = measure_device_peaks(
        *choice->backend, {.copy_bytes = 1 << 20, .rows = 16, .columns = 64, .depth = 128, .runs = 2});
    ASSERT_TRUE(peaks.ok()) << peaks.status().message();
    EXPECT_GT(peaks->copy_gbs, 0);
    EXPECT_GT(peaks->product_tflops, 0);
    EXPECT_NE(peaks->source.find("16 x 64 x 128"), std::string::npos) << peaks->source;
  }
}

TEST(DevicePeaks, AFileTakesTheirPlace) {
  const auto h200 = read_device_peaks("bench/ceilings/h200.json", "bf16");
  ASSERT_TRUE(h200.ok()) << h200.status().message();
  EXPECT_EQ(h200->copy_gbs, 4286);
  EXPECT_EQ(h200->product_tflops, 723);
  EXPECT_EQ(h200->source, "bench/ceilings/h200.json");

  const std::string path = (std::filesystem::temp_directory_path() / "servoflow_peaks_test.json").string();
  std::ofstream(path) << R"({"copy_gbs": -1, "product_tflops": {"fp32": 40}, "clock": 3})";
  const std::string message = read_device_peaks(path, "bf16").status().message();
  for (const char* part : {"copy_gbs", "product_tflops.bf16", "clock"})
    EXPECT_NE(message.find(part), std::string::npos) << message;
  std::ofstream(path) << "[]";
  EXPECT_FALSE(read_device_peaks(path, "bf16").ok());
  std::filesystem::remove(path);
}

}  // namespace
}  // namespace servoflow::toolkit
