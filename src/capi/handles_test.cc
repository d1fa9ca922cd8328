#include "capi/handles.h"

#include <gtest/gtest.h>

#include <array>
#include <thread>
#include <vector>

#include "capi/versioned.h"

namespace servoflow::capi {
namespace {

struct Thing;
struct Other;

TEST(HandleTable, FindsWhatIsThereAndNamesWhatIsNot) {
  HandleTable<Thing, int> things("thing");
  HandleTable<Other, int> others("other");
  Thing* const handle = things.add(std::make_shared<int>(7));
  Other* const other = others.add(std::make_shared<int>(8));
  const auto found = things.find(handle);
  ASSERT_TRUE(found.ok());
  EXPECT_EQ(**found, 7);

  EXPECT_EQ(things.find(nullptr).status().message(), "thing: is NULL");
  EXPECT_FALSE(things.find(reinterpret_cast<Thing*>(other)).ok());
  EXPECT_FALSE(others.remove(reinterpret_cast<Other*>(handle)).ok());

  EXPECT_TRUE(things.remove(handle).ok());
  EXPECT_FALSE(things.find(handle).ok());
  EXPECT_NE(things.remove(handle).message().find("not a live handle"), std::string::npos);
  EXPECT_TRUE(things.remove(nullptr).ok());
  EXPECT_EQ(**found, 7) << "an object in use outlives its handle";
  EXPECT_NE(things.add(std::make_shared<int>(9)), handle) << "numbers are never used again";
}

TEST(HandleTable, ManyThreadsAddFindAndRemove) {
  HandleTable<Thing, int> things("thing");
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&things, t] {
      for (int i = 0; i < 500; ++i) {
        Thing* const handle = things.add(std::make_shared<int>(t * 1000 + i));
        const auto found = things.find(handle);
        ASSERT_TRUE(found.ok());
        EXPECT_EQ(**found, t * 1000 + i);
        EXPECT_TRUE(things.remove(handle).ok());
      }
    });
  for (std::thread& thread : threads) thread.join();
}

// What a program compiled against another version would hand over.
struct Ours {
  std::size_t struct_size;
  std::int64_t a, b;
};
struct Newer {
  std::size_t struct_size;
  std::int64_t a, b, c;
};
constexpr std::size_t kFirst = offsetof(Ours, b);  // b came later

TEST(VersionedStruct, AnOlderCallersMissingFieldsKeepTheirDefaults) {
  const std::array<std::int64_t, 2> older{kFirst, 5};
  Ours out{sizeof(Ours), 1, 2};
  ASSERT_TRUE(read_struct(older.data(), kFirst, "s", out).ok());
  EXPECT_EQ(out.a, 5);
  EXPECT_EQ(out.b, 2);
}

TEST(VersionedStruct, ANewerCallersFieldsMustBeZero) {
  Newer newer{sizeof(Newer), 5, 6, 0};
  Ours out{};
  ASSERT_TRUE(read_struct(&newer, kFirst, "s", out).ok());
  EXPECT_EQ(out.b, 6);
  newer.c = 1;
  EXPECT_NE(read_struct(&newer, kFirst, "s", out).message().find("does not know"), std::string::npos);
}

TEST(VersionedStruct, FillsAsFarAsTheCallersVersionGoes) {
  std::array<std::int64_t, 3> older{kFirst, 0, -1};
  const Ours value{0, 5, 6};
  ASSERT_TRUE(write_struct(value, kFirst, "s", reinterpret_cast<Ours*>(older.data())).ok());
  EXPECT_EQ(older, (std::array<std::int64_t, 3>{kFirst, 5, -1})) << "nothing beyond its size is touched";

  Newer newer{sizeof(Newer), 0, 0, 7};
  ASSERT_TRUE(write_struct(value, kFirst, "s", reinterpret_cast<Ours*>(&newer)).ok());
  EXPECT_EQ(newer.struct_size, sizeof(Newer));
  EXPECT_EQ(newer.b, 6);
  EXPECT_EQ(newer.c, 0);
}

TEST(VersionedStruct, RefusesSizesThatCannotBe) {
  Ours out{};
  for (const std::size_t size : {std::size_t{0}, kFirst - 1, kMaxStructSize + 1, ~std::size_t{0}}) {
    Ours given{size, 0, 0};
    EXPECT_NE(read_struct(&given, kFirst, "s", out).message().find("s.struct_size"), std::string::npos)
        << size;
    EXPECT_FALSE(write_struct(out, kFirst, "s", &given).ok()) << size;
  }
  EXPECT_FALSE(read_struct(nullptr, kFirst, "s", out).ok());
  EXPECT_FALSE(write_struct<Ours>(out, kFirst, "s", nullptr).ok());
}

}  // namespace
}  // namespace servoflow::capi
