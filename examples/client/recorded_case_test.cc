#include "recorded_case.h"

#include <gtest/gtest.h>

#include <cstring>
#include <nlohmann/json.hpp>
#include <random>

namespace robot {
namespace {

using Json = nlohmann::ordered_json;

class File {
 public:
  Json header = Json::object();
  std::string body;

  template <class T>
  void add(const std::string& name, const char* dtype, const std::vector<std::size_t>& shape,
           std::vector<T> values) {
    const std::size_t bytes = values.size() * sizeof(T), begin = body.size();
    header[name] = {{"dtype", dtype}, {"shape", shape}, {"data_offsets", {begin, begin + bytes}}};
    body.append(reinterpret_cast<const char*>(values.data()), bytes);
  }
  std::string bytes() const {
    const std::string text = header.dump();
    const std::uint64_t size = text.size();
    std::string out(sizeof(size), '\0');
    std::memcpy(out.data(), &size, sizeof(size));
    return out + text + body;
  }
};

// Two cameras (one flat, one in the map `images`), a third that was not there, a state of two parts.
File recorded() {
  const Json contract = {
      {"prompt", {{"key", "task"}}},
      {"cameras",
       {{{"slot", "base"}, {"key", "observation/image"}},
        {{"slot", "left"}, {"key", "images/cam"}},
        {{"slot", "right"}, {"key", "images/none"}}}},
      {"state", {{"parts", {{{"key", "joints"}, {"width", 2}}, {{"key", "gripper"}, {"width", 1}}}}}}};
  File file;
  file.header["__metadata__"] = {{"contract", contract.dump()}, {"prompt", "go"}, {"steps", "4"}};
  file.add<double>("input/state", "F64", {3}, {1, 2, 3});
  file.add<double>("expect/actions", "F64", {2, 1}, {5, 6});
  file.add<float>("input/noise", "F32", {2, 2}, {1, 2, 3, 4});
  file.add<std::uint8_t>("input/image/base", "U8", {1, 2, 3}, {1, 2, 3, 4, 5, 6});
  file.add<std::uint8_t>("input/image/left", "U8", {1, 2, 3}, {1, 2, 3, 4, 5, 6});
  return file;
}

std::string refusal(const std::string& bytes) {
  try {
    parse_case(bytes);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "accepted";
}

TEST(RecordedCase, IsTheRequestItWasRecordedFrom) {
  const RecordedCase read = parse_case(recorded().bytes());
  const auto& fields = read.observation.fields;
  EXPECT_EQ(std::get<std::string>(fields.at("task")), "go");
  EXPECT_EQ(std::get<std::int64_t>(fields.at("num_steps")), 4);
  EXPECT_EQ(std::get<Array<double>>(fields.at("joints")).values, (std::vector<double>{1, 2}));
  EXPECT_EQ(std::get<Array<double>>(fields.at("gripper")).values, (std::vector<double>{3}));
  EXPECT_EQ(std::get<Array<float>>(fields.at("noise")).shape, (std::vector<std::size_t>{2, 2}));
  const auto& flat = std::get<Array<std::uint8_t>>(fields.at("observation/image"));
  EXPECT_EQ(flat.values, (std::vector<std::uint8_t>{1, 2, 3, 4, 5, 6}));
  ASSERT_EQ(read.observation.images.size(), 1u);
  const auto& planes = std::get<Array<std::uint8_t>>(read.observation.images.at("cam"));
  EXPECT_EQ(planes.shape, (std::vector<std::size_t>{3, 1, 2}));
  EXPECT_EQ(planes.values, (std::vector<std::uint8_t>{1, 4, 2, 5, 3, 6}));
  EXPECT_EQ(read.expected.horizon, 2u);
  EXPECT_EQ(read.expected.values, (std::vector<double>{5, 6}));
}

TEST(RecordedCase, NamesWhatIsWrong) {
  EXPECT_EQ(refusal("abc"), "too short for a safetensors file");
  EXPECT_EQ(refusal(std::string(8, '\xff')), "ends within its header");
  const auto with = [](auto change) {
    File file = recorded();
    change(file.header);
    return refusal(file.bytes());
  };
  EXPECT_EQ(with([](Json& h) { h["input/state"]["dtype"] = "F32"; }), "input/state: the type is not F64");
  EXPECT_EQ(with([](Json& h) { h["input/state"]["data_offsets"][1] = 1 << 30; }),
            "input/state: lies outside the file");
  EXPECT_EQ(with([](Json& h) { h["input/state"]["shape"] = {4}; }),
            "input/state: its data do not fill its shape");
  EXPECT_EQ(with([](Json& h) {
              h["input/noise"]["shape"] = {1ull << 63, 2};
            }),
            "input/noise: its shape does not fit into the file");
  EXPECT_EQ(with([](Json& h) { h["__metadata__"]["steps"] = "many"; }), "steps: is not a whole number");
  EXPECT_NE(with([](Json& h) { h["__metadata__"].erase("contract"); }).find("header"), std::string::npos);
  EXPECT_NE(with([](Json& h) { h.erase("expect/actions"); }).find("no tensor expect/actions"),
            std::string::npos);
}

TEST(RecordedCase, DamagedFilesAreRefusedOrRead) {
  std::mt19937 random(1);
  const std::string good = recorded().bytes();
  for (int i = 0; i < 5000; ++i) {
    std::string bad = good;
    bad[random() % bad.size()] = static_cast<char>(random());
    refusal(bad);  // nothing but std::runtime_error leaves it
  }
}

TEST(RecordedCase, AMissingFileIsNamed) {
  try {
    read_case("no/such/file");
    FAIL();
  } catch (const std::runtime_error& error) {
    EXPECT_STREQ(error.what(), "no/such/file: No such file or directory");
  }
}

}  // namespace
}  // namespace robot
