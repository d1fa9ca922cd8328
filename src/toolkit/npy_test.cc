#include "toolkit/npy.h"

#include <gtest/gtest.h>

#include <cstring>

namespace servoflow::toolkit {
namespace {

std::vector<std::byte> file(const std::string& header, std::size_t data_bytes, int major = 1) {
  std::string out = "\x93NUMPY";
  out += static_cast<char>(major);
  out += '\0';
  for (int i = 0; i < (major == 1 ? 2 : 4); ++i) out += static_cast<char>(header.size() >> (8 * i) & 0xff);
  out += header + std::string(data_bytes, '\0');
  const auto bytes = std::as_bytes(std::span(out.data(), out.size()));
  return {bytes.begin(), bytes.end()};
}

std::string error(const std::vector<std::byte>& bytes) {
  const Result<NpyArray> result = parse_npy(bytes, "x.npy");
  return result.ok() ? "" : result.status().message();
}

TEST(Npy, ValuesSurviveWritingAndReading) {
  const std::vector<double> doubles = {1.0 / 3, -0.0, 1e-310, 5e300, 2, 3};
  const Result<NpyArray> wide = parse_npy(npy_bytes({2, 3}, doubles), "x.npy");
  ASSERT_TRUE(wide.ok()) << wide.status().message();
  EXPECT_EQ(wide->shape, (Shape{2, 3}));
  EXPECT_EQ(0, std::memcmp(wide->values.data(), doubles.data(), 48));

  const std::vector<float> floats = {0.1f, -7};
  const Result<NpyArray> narrow = parse_npy(npy_bytes({2}, floats), "x.npy");
  ASSERT_TRUE(narrow.ok()) << narrow.status().message();
  EXPECT_EQ(narrow->values, (std::vector<double>{0.1f, -7}));
}

TEST(Npy, DataStartsAtAMultipleOf64BytesAsNumpyWrites) {
  const std::vector<std::byte> bytes = npy_bytes({7, 9}, std::vector<double>(63));
  EXPECT_EQ((bytes.size() - 63 * 8) % 64, 0u);
}

TEST(Npy, AllThreeVersionsScalarsAndEmptyArraysAreRead) {
  for (int major : {1, 2, 3})
    EXPECT_EQ(error(file("{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }\n", 12, major)), "")
        << major;
  EXPECT_EQ(error(file("{'descr': '<f8', 'fortran_order': True, 'shape': ()}", 8)), "");
  EXPECT_EQ(error(file("{'descr': '<f8', 'fortran_order': False, 'shape': (0, 7)}", 0)), "");
}

TEST(Npy, ErrorsNameFileFieldAndCause) {
  struct Case {
    std::vector<std::byte> bytes;
    const char* expected;
  };
  const std::string good = "{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }";
  const Case cases[] = {
      {{}, "x.npy: not a .npy file"},
      {file(good, 12, 4), "x.npy: .npy version 4"},
      {file(good, 11), "x.npy: data: 11 bytes, shape [3] needs 12"},
      {file(good, 13), "x.npy: data: 13 bytes"},
      {file("{'descr': '>f4', 'fortran_order': False, 'shape': (3,)}", 12), "x.npy: descr: type '>f4'"},
      {file("{'descr': '|O', 'fortran_order': False, 'shape': (3,)}", 12), "x.npy: descr: type '|O'"},
      {file("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3,)}", 12), "x.npy: header: descr"},
      {file("{'descr': '<f4', 'fortran_order': True, 'shape': (3, 1)}", 12), "x.npy: fortran_order"},
      {file("{'descr': '<f4', 'fortran_order': False}", 12), "x.npy: header: descr, fortran_order or shape"},
      {file("{'descr': '<f4', 'shape': (-3,)}", 12), "x.npy: header: shape"},
      {file("{'shape': (3,), 'shape': (3,)}", 12), "x.npy: header: shape appears twice"},
      {file("{'shape': (999999999999, 999999999999), 'descr': '<f4', 'fortran_order': False}", 12),
       "too large"},
      {file("{'shape': (1,1,1,1,1,1,1,1,1), 'descr': '<f4', 'fortran_order': False}", 4), "more than 8"},
      {file("{'color': 'red'}", 12), "unknown key 'color'"},
      {file(good + "x", 12), "text after the closing"},
      {file("{'descr", 0), "x.npy: header"},
      {file("", 0), "x.npy: header: does not start"},
  };
  for (const Case& c : cases) EXPECT_NE(error(c.bytes).find(c.expected), std::string::npos) << error(c.bytes);
}

TEST(Npy, EveryTruncationIsAnError) {
  const std::vector<std::byte> bytes = npy_bytes({2, 2}, std::vector<float>{1, 2, 3, 4});
  for (std::size_t n = 0; n < bytes.size(); ++n)
    EXPECT_NE(error({bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(n)}), "") << n;
}

}  // namespace
}  // namespace servoflow::toolkit
