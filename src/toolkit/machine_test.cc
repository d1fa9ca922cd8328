#include "toolkit/machine.h"

#include <gtest/gtest.h>

namespace servoflow::toolkit {
namespace {

TEST(Machine, SaysWhereNumbersComeFrom) {
  const Json machine = machine_json();
  for (const char* key : {"cpu", "flags", "cores", "governor", "mhz", "kernel", "memory_bytes",
                          "available_bytes", "load_average"})
    EXPECT_TRUE(machine.contains(key)) << key;
  EXPECT_GE(machine["cores"], 1);
  EXPECT_EQ(machine["load_average"].size(), 3u);
}

TEST(Machine, TheBuildIsNamed) {
  const Json build = build_json();
  EXPECT_FALSE(build["version"].get<std::string>().empty());
  EXPECT_NE(build["compiler"].get<std::string>(), " ");
}

TEST(Machine, ResidentSetsAreRead) {
  EXPECT_GT(resident_bytes(), 1u << 20);
  EXPECT_GE(peak_resident_bytes(), resident_bytes());
}

}  // namespace
}  // namespace servoflow::toolkit
