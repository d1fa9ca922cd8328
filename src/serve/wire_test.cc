#include "serve/wire.h"

#include <gtest/gtest.h>

#include <cmath>

#include "serve/messages_for_tests.h"

namespace servoflow::serve {
namespace {

using namespace testing;  // NOLINT: Part, map, array, …

std::string refusal(const Part& part, const WireLimits& limits = {}) {
  const auto bytes = message(part);
  const Result<WireValue> value = parse_message(bytes, limits);
  return value.ok() ? "accepted" : value.status().message();
}

TEST(Wire, ReadsArraysScalarsAndNestedMaps) {
  const auto bytes = message(
      map({{"a", array_of<float>("<f4", {2, 1}, {1.5f, -2})},
           {"scalar",
            map({{"__npgeneric__", boolean(true)}, {"data", number(0.5)}, {"dtype", text("<f4")}}, true)},
           {"nested", map({{"x", whole(-3)}, {"list", list({whole(1), nil()})}})},
           {"flag", boolean(true)}}));
  const Result<WireValue> root = parse_message(bytes, {});
  ASSERT_TRUE(root.ok()) << root.status().message();
  const WireArray& a = root->find("a")->array;
  EXPECT_EQ(a.shape, (std::vector<std::size_t>{2, 1}));
  EXPECT_EQ(a.number(0), 1.5);
  EXPECT_EQ(a.number(1), -2);
  EXPECT_EQ(root->find("scalar")->number(), 0.5);
  EXPECT_EQ(root->find("nested")->find("x")->number(), -3);
  EXPECT_EQ(root->find("nested")->find("list")->items.size(), 2u);
  EXPECT_TRUE(root->find("flag")->boolean);
  EXPECT_EQ(root->find("none"), nullptr);
}

TEST(Wire, MarkersAndTheirValuesMayBeStringsOrBytes) {
  for (const bool byte_keys : {false, true})
    for (const bool byte_dtype : {false, true}) {
      const Part a = map({{"__ndarray__", boolean(true)},
                          {"data", bytes("\x01\x02")},
                          {"dtype", byte_dtype ? bytes("|u1") : text("|u1")},
                          {"shape", whole(2)}},
                         byte_keys);
      const auto packed = message(map({{"a", a}}));
      const auto root = parse_message(packed, {});
      ASSERT_TRUE(root.ok()) << root.status().message();
      EXPECT_EQ(root->find("a")->array.number(1), 2);
    }
}

TEST(Wire, EveryNumericTypeInBothByteOrders) {
  const struct {
    const char* dtype;
    std::string data;
    double value;
  } kCases[] = {{"|b1", std::string("\x01", 1), 1},
                {"|i1", std::string("\xfe", 1), -2},
                {"<i2", std::string("\xfe\xff", 2), -2},
                {">i2", std::string("\xff\xfe", 2), -2},
                {"<u4", std::string("\x01\x01\0\0", 4), 257},
                {">u4", std::string("\0\0\x01\x01", 4), 257},
                {"<i8", std::string("\xff\xff\xff\xff\xff\xff\xff\xff", 8), -1},
                {"<f2", std::string("\x00\xc1", 2), -2.5},
                {"<f2", std::string("\x01\x00", 2), std::ldexp(1.0, -24)},
                {"float32", std::string("\0\0\xc0\x3f", 4), 1.5},
                {">f4", std::string("\x3f\xc0\0\0", 4), 1.5},
                {">f8", std::string("\x3f\xf8\0\0\0\0\0\0", 8), 1.5}};
  for (const auto& c : kCases) {
    const auto packed = message(map({{"a", array(c.dtype, {}, c.data)}}));
    const auto root = parse_message(packed, {});
    ASSERT_TRUE(root.ok()) << c.dtype << ": " << root.status().message();
    EXPECT_EQ(root->find("a")->array.number(0), c.value) << c.dtype;
  }
}

TEST(Wire, OfEqualKeysTheLastWins) {
  const auto packed = message(map({{"a", whole(1)}, {"b", whole(2)}, {"a", whole(3)}}));
  const auto root = parse_message(packed, {});
  ASSERT_TRUE(root.ok());
  EXPECT_EQ(root->keys.size(), 2u);
  EXPECT_EQ(root->find("a")->number(), 3);
}

TEST(Wire, RefusesWithTheFieldAndTheCause) {
  const auto field = [](const Part& value) { return refusal(map({{"x", map({{"y", value}})}})); };
  const auto broken = [&](const std::string& key, const Part& value) {
    return field(map(with({{"__ndarray__", boolean(true)},
                           {"data", bytes("ab")},
                           {"dtype", text("|u1")},
                           {"shape", shape_of({2})}},
                          key, value),
                     true));
  };
  for (const char* dtype : {"|O", "|O8", "|V8", "<c8", "<M8[us]", "<f16", "<f3", "f", "", "<U2000000", "<i-4",
                            "garbage", "[('a', '<f4')]"})
    EXPECT_SAYS(broken("dtype", text(dtype)), ("x/y: dtype: \"" + std::string(dtype) + "\" is not accepted"))
        << dtype;
  EXPECT_SAYS(broken("dtype", nil()), "x/y: dtype: is nil");
  EXPECT_EQ(broken("data", nil()), "x/y: data: is nil; expected bytes");
  EXPECT_EQ(broken("data", text("ab")), "x/y: data: is a string; expected bytes");
  EXPECT_EQ(broken("data", bytes("abc")), "x/y: data: 3 bytes; shape [2] of \"|u1\" needs 2");
  EXPECT_SAYS(broken("shape", shape_of({-1})), "x/y: shape: a side is not a whole number");
  EXPECT_SAYS(broken("shape", nil()), "x/y: shape: is nil");
  EXPECT_SAYS(broken("shape", shape_of(std::vector<std::int64_t>(9, 1))), "x/y: shape: 9 dimensions");
  const std::int64_t big = std::int64_t{1} << 33;
  EXPECT_SAYS(broken("shape", shape_of({big, big})), "x/y: shape: more than");
  EXPECT_SAYS(broken("shape", shape_of({0, big})), "x/y: shape: more than");
  EXPECT_SAYS(broken("shape", shape_of({1 << 27, 1 << 27, 1 << 27})), "x/y: shape: more than");
  EXPECT_EQ(field(map({{"__ndarray__", boolean(true)}}, true)), "x/y: array without dtype");
  EXPECT_EQ(field(map({{"__npgeneric__", boolean(true)}, {"dtype", text("<f4")}, {"data", nil()}})),
            "x/y: data: is nil; expected a number for a scalar");
  EXPECT_SAYS(refusal(list({})), "message: is a list; expected a map");
  EXPECT_SAYS(refusal(whole(1)), "message: is a whole number; expected a map");
}

TEST(Wire, RefusesWhatIsNotOneMap) {
  const auto refusal_of = [](std::vector<std::uint8_t> raw, const WireLimits& limits = {}) {
    const auto value = parse_message(raw, limits);
    return value.ok() ? "accepted" : value.status().message();
  };
  EXPECT_SAYS(refusal_of({}), "is empty");
  EXPECT_SAYS(refusal_of({0xc1}), "byte 0 begins no msgpack value");
  EXPECT_SAYS(refusal_of({0x81, 0xa1, 'a'}), "ends in the middle");
  EXPECT_SAYS(refusal_of({0x80, 0x00}), "1 bytes behind the end");
  EXPECT_SAYS(refusal_of({0x81, 0x01, 0x02}), "a key is a whole number");
  EXPECT_SAYS(refusal_of({0x81, 0x90, 0x02}), "a key is a list or a map");
  EXPECT_SAYS(refusal_of({0x81, 0xa1, 'a', 0xd4, 0x01, 0x00}), "a: msgpack extension types");
  EXPECT_SAYS(refusal_of({0xdf, 0xff, 0xff, 0xff, 0xff}), "more than 65536 values");
  EXPECT_SAYS(refusal_of({0x81, 0xa1, 'a', 0xdd, 0xff, 0xff, 0xff, 0xff}), "a: more than 65536 values");
  EXPECT_SAYS(refusal_of({0x81, 0xa1, 'a', 0xc6, 0xff, 0xff, 0xff, 0xff, 0x00}), "ends in the middle");
  EXPECT_SAYS(refusal_of({0x80}, {.max_bytes = 0}), "1 bytes; at most 0");
}

TEST(Wire, CountsAllValuesOfAMessage) {
  // 300 lists of 300 numbers: no single one is over the limit, together they are.
  std::vector<Part> outer(300, list(std::vector<Part>(300, whole(1))));
  EXPECT_SAYS(refusal(map({{"a", list(outer)}})), "more than 65536 values");
  Part deep = whole(1);
  for (int i = 0; i < 17; ++i) deep = list({deep});
  EXPECT_SAYS(refusal(map({{"a", deep}})), "nested deeper than 16");
  EXPECT_SAYS(refusal(map({{std::string(2000, 'k'), nil()}})), "a key of 2000 bytes");
}

TEST(Wire, NamesInMessagesArePrintableAndShort) {
  EXPECT_EQ(serve::quoted("a\nb"), "\"a?b\"");
  EXPECT_EQ(serve::quoted(std::string(300, 'x')).size(), 100 + 2 + 3u);
  EXPECT_EQ(serve::quoted("\xff"), "\"?\"");
}

TEST(Wire, WritesWhatItReads) {
  WireWriter writer;
  const std::vector<double> values = {1, -0.5, 3e300, 4, 5, 6};
  const std::size_t shape[] = {2, 3};
  writer.map(2).text("actions").array(std::span<const double>(values), shape).text("n").whole(7);
  const std::string packed = writer.take();
  const auto root = parse_message({reinterpret_cast<const std::uint8_t*>(packed.data()), packed.size()}, {});
  ASSERT_TRUE(root.ok()) << root.status().message();
  const WireArray& array = root->find("actions")->array;
  EXPECT_EQ(array.dtype, "<f8");
  EXPECT_EQ(array.shape_text(), "[2, 3]");
  for (std::size_t i = 0; i < values.size(); ++i) EXPECT_EQ(array.number(i), values[i]);
  // Python's unpacker looks for byte-string keys.
  EXPECT_NE(packed.find("\xc4\x0b__ndarray__"), std::string::npos);
}

}  // namespace
}  // namespace servoflow::serve
