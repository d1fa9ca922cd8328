#include "toolkit/plan_toml.h"

#include <gtest/gtest.h>

namespace servoflow::toolkit {
namespace {

std::string error_of(const std::string& text) {
  const Result<Json> json = parse_toml(text, "f.toml");
  return json.ok() ? "" : json.status().message();
}

TEST(PlanToml, ReadsTablesAndArrays) {
  const Result<Json> json =
      parse_toml("# π\na = 1\nb = [1.5, true, 'x#y']\n[c]\nd = { e = \"f\\\"#\" }\n", "f");
  ASSERT_TRUE(json.ok()) << json.status().message();
  EXPECT_EQ(*json, Json::parse(R"({"a":1,"b":[1.5,true,"x#y"],"c":{"d":{"e":"f\"#"}}})"));
}

TEST(PlanToml, HostileTextIsAnError) {
  EXPECT_EQ(error_of("a = \"π\""), "");
  EXPECT_NE(error_of("a = nan").find("a: must be a finite number"), std::string::npos);
  EXPECT_NE(error_of("\n[%").find("line 2"), std::string::npos);
  EXPECT_NE(error_of("a = 1\na = 2").find("line 2"), std::string::npos);
  EXPECT_NE(error_of("a = 1979-05-27").find("dates and times"), std::string::npos);
  EXPECT_NE(error_of("a = \"\"\"x\"\"\"").find("multi-line"), std::string::npos);
  EXPECT_NE(error_of(std::string(2 << 20, '#')).find("1 MiB"), std::string::npos);
  EXPECT_FALSE(parse_toml("a = " + std::string(100000, '['), "f").ok());
  EXPECT_FALSE(parse_toml("a = \"\\", "f").ok());
  EXPECT_FALSE(parse_toml(std::string("a = \0", 5), "f").ok());
  EXPECT_FALSE(read_toml_file("/nowhere/f.toml").ok());
}

}  // namespace
}  // namespace servoflow::toolkit
