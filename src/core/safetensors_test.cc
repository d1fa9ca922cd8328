#include "core/safetensors.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>

#include "core/bf16.h"
#include "core/json.h"

namespace servoflow {
namespace {

namespace fs = std::filesystem;

// The bytes of a file with this header and so many bytes of data.
std::string file_of(const std::string& header, std::size_t data) {
  std::string out(8, '\0');
  const std::uint64_t length = header.size();
  std::memcpy(out.data(), &length, 8);
  return out + header + std::string(data, '\0');
}

std::string failure_of_bytes(const std::string& bytes) {
  const Result<SafetensorsFile> file =
      SafetensorsFile::parse(std::as_bytes(std::span(bytes)), "x.safetensors");
  return file.ok() ? "" : file.status().message();
}
std::string failure(const std::string& header, std::size_t data) {
  return failure_of_bytes(file_of(header, data));
}

TEST(Safetensors, ReadsWhatIsRight) {
  const std::string bytes = file_of(
      R"({"b":{"dtype":"F32","shape":[2,3],"data_offsets":[2,26]},"a":{"dtype":"I8","shape":[2],"data_offsets":[0,2]},
          "empty":{"dtype":"F64","shape":[0,7],"data_offsets":[26,26]},"one":{"dtype":"U8","shape":[],"data_offsets":[26,27]},
          "__metadata__":{"format":"pt"}}   )",
      27);
  const Result<SafetensorsFile> file =
      SafetensorsFile::parse(std::as_bytes(std::span(bytes)), "x.safetensors");
  ASSERT_TRUE(file.ok()) << file.status().message();
  ASSERT_EQ(file->tensors().size(), 4u);
  EXPECT_EQ(file->tensors()[0].name, "a");  // file order, not header order
  EXPECT_EQ(file->tensors()[1].name, "b");
  EXPECT_EQ(file->find("b")->shape, (Shape{2, 3}));
  EXPECT_EQ(file->find("b")->bytes.size(), 24u);
  EXPECT_EQ(file->find("one")->shape.rank(), 0);
  EXPECT_TRUE(file->find("empty")->bytes.empty());
  EXPECT_EQ(file->find("c"), nullptr);
  EXPECT_EQ(file->metadata().at("format"), "pt");
  EXPECT_EQ(file->path(), "x.safetensors");
  EXPECT_EQ(failure("{}", 0), "");
}

struct Broken {
  const char* header;
  std::size_t data;
  const char* expected;  // part of the message
};

TEST(Safetensors, NamesEveryFaultOfTheHeader) {
  const Broken cases[] = {
      {"[]", 0, "header is not a JSON object"},
      {" {}", 0, "header is not a JSON object"},
      {"{\"a\":", 0, "header: not valid JSON"},
      {"{} x", 0, "header: not valid JSON"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
       2, "duplicate key \"a\""},
      {R"({"a":3})", 0, "tensor \"a\": expected an object, found number"},
      {R"({"a":{"shape":[1],"data_offsets":[0,1]}})", 1, "tensor \"a\": dtype is missing"},
      {R"({"a":{"dtype":"U8","data_offsets":[0,1]}})", 1, "tensor \"a\": shape is missing"},
      {R"({"a":{"dtype":"U8","shape":[1]}})", 1, "tensor \"a\": data_offsets is missing"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"more":1}})", 1,
       "tensor \"a\": unknown key \"more\""},
      {R"({"a":{"dtype":"F4","shape":[1],"data_offsets":[0,1]}})", 1, "dtype: unknown name \"F4\""},
      {R"({"a":{"dtype":8,"shape":[1],"data_offsets":[0,1]}})", 1, "dtype: expected a string"},
      {R"({"a":{"dtype":"U8","shape":1,"data_offsets":[0,1]}})", 1, "shape: expected an array"},
      {R"({"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}})", 1, "shape: -1 is not a valid dimension"},
      {R"({"a":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}})", 1,
       "shape: 1.0 is not a valid dimension"},
      {R"({"a":{"dtype":"U8","shape":[1e3],"data_offsets":[0,1]}})", 1, "is not a valid dimension"},
      {R"({"a":{"dtype":"U8","shape":["1"],"data_offsets":[0,1]}})", 1, "is not a valid dimension"},
      {R"({"a":{"dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,1]}})", 1,
       "is not a valid dimension"},
      {R"({"a":{"dtype":"U8","shape":[99999999999999999999999],"data_offsets":[0,1]}})", 1,
       "is not a valid dimension"},
      {R"({"a":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]}})", 1, "9 dimensions"},
      {R"({"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", 0, "overflows"},
      {R"({"a":{"dtype":"F64","shape":[1152921504606846976],"data_offsets":[0,0]}})", 0, "overflows"},
      {R"({"a":{"dtype":"U8","shape":[4611686018427387904,4,0],"data_offsets":[0,0]}})", 0, "overflows"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[1,0]}})", 1, "end before they begin"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0]}})", 1, "expected two non-negative integers"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,-1]}})", 1, "expected two non-negative integers"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":{"0":1}}})", 1, "expected two non-negative integers"},
      {R"({"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}})", 8,
       "reach beyond the file, which holds 8 bytes"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", 4,
       "F32 [2] needs 8 bytes, data_offsets [0, 4] hold 4"},
      {R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
       3, "tensor \"b\": overlaps \"a\" by 1 bytes"},
      {R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
       4, "tensor \"b\": overlaps \"a\""},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}})",
       3, "tensor \"b\": starts at byte 2, leaving a hole after byte 1"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})", 2, "leaving a hole after byte 0"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 5,
       "4 bytes after the last tensor belong to none"},
      {"{}", 1, "1 bytes after the last tensor"},
      {R"({"__metadata__":[]})", 0, "__metadata__: expected an object, found array"},
      {R"({"__metadata__":{"n":1}})", 0, "__metadata__ \"n\": expected a string, found number"},
  };
  for (const Broken& broken : cases) {
    const std::string message = failure(broken.header, broken.data);
    EXPECT_TRUE(message.starts_with("x.safetensors: ")) << broken.header << " -> " << message;
    EXPECT_NE(message.find(broken.expected), std::string::npos) << broken.header << " -> " << message;
  }
}

TEST(Safetensors, ListsSeveralFaultsAtOnce) {
  const std::string message = failure(
      R"({"a":{"dtype":"U9","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[-4],"data_offsets":[0,1]},
          "__metadata__":{"n":1}})",
      1);
  EXPECT_NE(message.find("3 problems"), std::string::npos) << message;
  EXPECT_NE(message.find("\"a\""), std::string::npos);
  EXPECT_NE(message.find("\"b\""), std::string::npos);
}

TEST(Safetensors, RefusesHostileLengthsWithoutAllocating) {
  EXPECT_NE(failure_of_bytes("").find("too few"), std::string::npos);
  EXPECT_NE(failure_of_bytes("1234567").find("too few"), std::string::npos);
  const auto with_length = [](std::uint64_t length) {
    std::string bytes = file_of("{}", 0);
    std::memcpy(bytes.data(), &length, 8);
    return failure_of_bytes(bytes);
  };
  EXPECT_NE(with_length(3).find("beyond the file's 10 bytes"), std::string::npos);
  EXPECT_NE(with_length(100'000'000).find("beyond the file's"), std::string::npos);
  EXPECT_NE(with_length(100'000'001).find("above the limit"), std::string::npos);
  EXPECT_NE(with_length(~std::uint64_t{0}).find("above the limit"), std::string::npos);
  EXPECT_NE(with_length(0).find("not a JSON object"), std::string::npos);
  EXPECT_NE(
      failure_of_bytes("version https://git-lfs.github.com/spec/v1\noid sha256:0\n").find("Git LFS pointer"),
      std::string::npos);
}

TEST(Safetensors, KeepsMessagesShortAndOnOneLinePerFault) {
  const std::string message = failure("{\"" + std::string(1 << 20, 'n') + "\\n\\u0007\":3}", 0);
  EXPECT_LT(message.size(), 1000u);
  EXPECT_EQ(message.find('\n'), std::string::npos);
  // A cut must not leave half a character: messages go into JSON reports.
  for (std::size_t pad = 0; pad < 4; ++pad) {
    std::string name(pad, 'n');
    for (int i = 0; i < 100; ++i) name += "\xe2\x82\xac";
    EXPECT_NO_THROW(Json(failure("{\"" + name + "\":3}", 0)).dump());
  }
  EXPECT_LT(failure("{\"a\": " + std::string(1 << 20, 'n') + "}", 0).size(), 1000u);
}

// Cutting or flipping a valid file anywhere must give an error or a valid file, never a crash.
TEST(Safetensors, SurvivesMutations) {
  const std::string good = file_of(
      R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[3],"data_offsets":[8,11]}})",
      11);
  ASSERT_EQ(failure_of_bytes(good), "");
  for (std::size_t n = 0; n < good.size(); ++n) EXPECT_NE(failure_of_bytes(good.substr(0, n)), "") << n;
  for (std::size_t i = 0; i < good.size(); ++i) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string bad = good;
      bad[i] = static_cast<char>(bad[i] ^ (1 << bit));
      const Result<SafetensorsFile> file = SafetensorsFile::parse(std::as_bytes(std::span(bad)), "x");
      if (!file.ok()) continue;
      for (const SafeTensor& tensor : file->tensors())
        ASSERT_EQ(tensor.bytes.size(),
                  static_cast<std::size_t>(tensor.shape.elements()) * dtype_size(tensor.dtype));
    }
  }
}

class SafetensorsFiles : public testing::Test {
 protected:
  SafetensorsFiles() : dir_(testing::TempDir() + "/safetensors_test_" + std::to_string(::getpid())) {
    fs::remove_all(dir_);
    fs::create_directories(dir_);
  }
  ~SafetensorsFiles() override { fs::remove_all(dir_); }
  std::size_t entries() const {
    return static_cast<std::size_t>(std::distance(fs::directory_iterator(dir_), fs::directory_iterator()));
  }
  std::string dir_;
};

TEST_F(SafetensorsFiles, WriterRoundTrips) {
  const std::string path = dir_ + "/a.safetensors";
  auto writer = SafetensorsWriter::create(
      path, {{"x\"\n", DType::kF32, {3}}, {"none", DType::kI64, {0}}, {"y", DType::kU8, {2, 2}}},
      {{"k", "v"}});
  ASSERT_TRUE(writer.ok()) << writer.status().message();
  const float x[] = {1.5f, -2.0f, 3.25f};
  const std::uint8_t y[] = {1, 2, 3, 4};
  const std::span<const std::byte> x_bytes = std::as_bytes(std::span(x));
  ASSERT_TRUE((*writer)->write(x_bytes.first(5)).ok());  // pieces of any size
  ASSERT_TRUE((*writer)->write(x_bytes.subspan(5)).ok());
  ASSERT_TRUE((*writer)->write(std::as_bytes(std::span(y))).ok());
  EXPECT_FALSE(fs::exists(path));  // only a finished file has the name
  ASSERT_TRUE((*writer)->finish().ok());
  EXPECT_EQ(entries(), 1u);

  const Result<SafetensorsFile> file = SafetensorsFile::open(path);
  ASSERT_TRUE(file.ok()) << file.status().message();
  EXPECT_EQ(file->metadata().at("k"), "v");
  EXPECT_EQ(*to_floats(*file->find("x\"\n")), (std::vector<float>{1.5f, -2.0f, 3.25f}));
  EXPECT_EQ(*to_doubles(*file->find("y")), (std::vector<double>{1, 2, 3, 4}));
  file->release(*file->find("y"));
  EXPECT_EQ(*to_doubles(*file->find("y")), (std::vector<double>{1, 2, 3, 4}));
  const auto copy_of = [](SafetensorsFile original) { return original; };  // shares the mapping
  const SafetensorsFile copy = copy_of(*file);
  EXPECT_EQ(copy.find("y")->bytes.data(), file->find("y")->bytes.data());
}

TEST_F(SafetensorsFiles, WriterCountsBytesAndCleansUp) {
  const std::string path = dir_ + "/a.safetensors";
  const std::byte four[4] = {};
  {
    auto writer = SafetensorsWriter::create(path, {{"x", DType::kU8, {6}}}, {});
    ASSERT_TRUE((*writer)->write(four).ok());
    EXPECT_FALSE((*writer)->finish().ok());     // two bytes short
    EXPECT_FALSE((*writer)->write(four).ok());  // two too many
  }
  EXPECT_EQ(entries(), 0u);  // abandoned
  EXPECT_FALSE(SafetensorsWriter::create(path, {{"x", DType::kU8, {1}}, {"x", DType::kU8, {1}}}, {}).ok());
  EXPECT_FALSE(SafetensorsWriter::create(path, {{"x", DType::kU8, {-1}}}, {}).ok());
  EXPECT_FALSE(SafetensorsWriter::create(path, {{"__metadata__", DType::kU8, {1}}}, {}).ok());
  EXPECT_FALSE(SafetensorsWriter::create(path, {{"x", DType::kF64, {std::int64_t{1} << 62}}}, {}).ok());
  EXPECT_FALSE(SafetensorsWriter::create(path, {{"\xff", DType::kU8, {1}}}, {}).ok());
  EXPECT_FALSE(SafetensorsWriter::create(dir_ + "/no/a.safetensors", {{"x", DType::kU8, {1}}}, {}).ok());
  EXPECT_EQ(entries(), 0u);
}

TEST_F(SafetensorsFiles, OpenNamesThePath) {
  for (const std::string& path : {dir_ + "/missing", dir_}) {
    const Result<SafetensorsFile> file = SafetensorsFile::open(path);
    ASSERT_FALSE(file.ok());
    EXPECT_NE(file.status().message().find(path), std::string::npos);
  }
}

// Releasing a tensor of parsed memory must not touch that memory.
TEST(Safetensors, ReleaseLeavesParsedMemoryAlone) {
  std::string bytes = file_of(R"({"a":{"dtype":"U8","shape":[65536],"data_offsets":[0,65536]}})", 65536);
  std::fill(bytes.end() - 65536, bytes.end(), '\x07');
  const Result<SafetensorsFile> file = SafetensorsFile::parse(std::as_bytes(std::span(bytes)), "x");
  ASSERT_TRUE(file.ok());
  file->release(*file->find("a"));
  EXPECT_EQ(*to_floats(*file->find("a")), std::vector<float>(65536, 7.0f));
}

TEST(Safetensors, ConvertsEveryDtype) {
  const auto tensor = [](DType dtype, const auto& values) {
    return SafeTensor{
        "t", dtype, {static_cast<std::int64_t>(std::size(values))}, std::as_bytes(std::span(values))};
  };
  const double f64[] = {0.1, -2};
  const std::uint16_t f16[] = {0x3c00, 0xc000}, b16[] = {0x3f80, 0xc000};
  const std::int64_t i64[] = {-3, 9007199254740991};
  const std::int32_t i32[] = {-3, 7};
  const std::int16_t i16[] = {-3, 7};
  const std::int8_t i8[] = {-3, 7};
  const std::uint64_t u64[] = {3, 7};
  const std::uint32_t u32[] = {3, 4294967295u};
  const std::uint16_t u16[] = {3, 65535};
  const std::uint8_t u8[] = {0, 2};
  EXPECT_EQ(*to_doubles(tensor(DType::kF64, f64)), (std::vector<double>{0.1, -2}));
  EXPECT_EQ(*to_floats(tensor(DType::kF64, f64)), (std::vector<float>{0.1f, -2}));
  EXPECT_EQ(*to_floats(tensor(DType::kF16, f16)), (std::vector<float>{1, -2}));
  EXPECT_EQ(*to_floats(tensor(DType::kBF16, b16)), (std::vector<float>{1, -2}));
  EXPECT_EQ(*to_doubles(tensor(DType::kI64, i64)), (std::vector<double>{-3, 9007199254740991.0}));
  EXPECT_EQ(*to_doubles(tensor(DType::kI32, i32)), (std::vector<double>{-3, 7}));
  EXPECT_EQ(*to_doubles(tensor(DType::kI16, i16)), (std::vector<double>{-3, 7}));
  EXPECT_EQ(*to_doubles(tensor(DType::kI8, i8)), (std::vector<double>{-3, 7}));
  EXPECT_EQ(*to_doubles(tensor(DType::kU64, u64)), (std::vector<double>{3, 7}));
  EXPECT_EQ(*to_doubles(tensor(DType::kU32, u32)), (std::vector<double>{3, 4294967295.0}));
  EXPECT_EQ(*to_doubles(tensor(DType::kU16, u16)), (std::vector<double>{3, 65535}));
  EXPECT_EQ(*to_doubles(tensor(DType::kU8, u8)), (std::vector<double>{0, 2}));
  EXPECT_EQ(*to_doubles(tensor(DType::kBool, u8)), (std::vector<double>{0, 1}));
  EXPECT_FALSE(to_floats(tensor(DType::kF8E4M3, u8)).ok());
  EXPECT_FALSE(to_doubles(tensor(DType::kF8E5M2, u8)).ok());
}

}  // namespace
}  // namespace servoflow
