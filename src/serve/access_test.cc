#include "serve/access.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

namespace servoflow::serve {
namespace {

Result<KeyRing> keys(const std::string& text) {
  const std::string path = ::testing::TempDir() + "/servoflow_keys";
  std::ofstream(path) << text;
  return KeyRing::load(path);
}

TEST(KeyRing, AdmitsItsKeysInBothSchemes) {
  const auto ring = keys("# comment\n  alpha-key-1 \r\n\nbeta-key-22\n");
  ASSERT_TRUE(ring.ok()) << ring.status().message();
  for (const char* good :
       {"Api-Key alpha-key-1", "api-key beta-key-22", "Bearer  alpha-key-1", "BEARER beta-key-22 "})
    EXPECT_TRUE(ring->admits(good)) << good;
  for (const char* bad :
       {"", "alpha-key-1", "Api-Key", "Api-Key ", "Api-Key alpha-key-", "Api-Key alpha-key-11",
        "Api-Key # comment", "Basic alpha-key-1", "Api-Key alpha-key-1 beta-key-22"})
    EXPECT_FALSE(ring->admits(bad)) << bad;
}

TEST(KeyRing, WithoutKeysEverybodyIsAdmitted) {
  const auto ring = KeyRing::load("");
  ASSERT_TRUE(ring.ok());
  EXPECT_TRUE(ring->empty());
  EXPECT_TRUE(ring->admits(""));
}

TEST(KeyRing, TheEnvironmentAddsOne) {
  ::setenv("SERVOFLOW_API_KEY", "from-the-environment", 1);
  const auto ring = KeyRing::load("");
  ::unsetenv("SERVOFLOW_API_KEY");
  ASSERT_TRUE(ring.ok());
  EXPECT_TRUE(ring->admits("Api-Key from-the-environment"));
  EXPECT_FALSE(ring->admits(""));
}

TEST(KeyRing, RefusalsNeverShowAKey) {
  for (const char* bad : {"short\n", "has a space in it\n", "tab\tinside-key\n", "umlaut-\xc3\xbc-key\n"}) {
    const auto ring = keys(bad);
    ASSERT_FALSE(ring.ok()) << bad;
    EXPECT_NE(ring.status().message().find("line 1"), std::string::npos);
    EXPECT_EQ(ring.status().message().find("short"), std::string::npos);
    EXPECT_EQ(ring.status().message().find("inside"), std::string::npos);
  }
  EXPECT_FALSE(keys("# nothing\n").ok());
  EXPECT_FALSE(KeyRing::load("/no/such/file").ok());
}

TEST(RateLimit, LetsABurstPassAndThenItsRate) {
  RateLimit limit(10);
  RateLimit::Clock::time_point now{std::chrono::seconds(1)};
  int passed = 0;
  for (int i = 0; i < 30; ++i) passed += limit.take(now) ? 1 : 0;
  EXPECT_EQ(passed, 10);
  for (int i = 0; i < 30; ++i) passed += limit.take(now += std::chrono::milliseconds(50)) ? 1 : 0;
  EXPECT_EQ(passed, 25);
  RateLimit slow(0.5);
  EXPECT_TRUE(slow.take(now));
  EXPECT_FALSE(slow.take(now + std::chrono::seconds(1)));
  EXPECT_TRUE(slow.take(now + std::chrono::seconds(3)));
  RateLimit none(0);
  for (int i = 0; i < 1000; ++i) EXPECT_TRUE(none.take(now));
}

}  // namespace
}  // namespace servoflow::serve
