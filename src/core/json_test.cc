#include "core/json.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include "core/file.h"

namespace servoflow {
namespace {

std::string failure(std::string_view text) {
  const Result<Json> result = parse_json(text, "here.json");
  return result.ok() ? "" : result.status().message();
}

TEST(Json, ParsesDocuments) {
  const Result<Json> result = parse_json(R"({"a": [1, -2, 2.5, true, null, "x"], "b": {}})", "here.json");
  ASSERT_TRUE(result.ok()) << result.status().message();
  EXPECT_EQ((*result)["a"][1], -2);
  EXPECT_EQ((*result)["a"][5], "x");
}

TEST(Json, ErrorsNameTheFileAndTheCause) {
  for (const char* text :
       {"", "{", "{\"a\":}", "[1,]", "nul", "{\"a\": 1} x", "\"\\ud800\"", "{'a': 1}", "\x80"}) {
    const std::string message = failure(text);
    EXPECT_TRUE(message.starts_with("here.json: not valid JSON")) << text << " -> " << message;
  }
}

TEST(Json, RefusesDuplicateKeysAtAnyDepth) {
  EXPECT_EQ(failure(R"({"a": 1, "a": 1})"), "here.json: duplicate key \"a\"");
  EXPECT_EQ(failure(R"([{"x": {"b": 1, "c": 2, "b": 3}}])"), "here.json: duplicate key \"b\"");
  EXPECT_EQ(failure(R"({"a": {"b": 1}, "c": {"b": 1}})"), "");  // the same key in two objects
}

TEST(Json, RefusesDeepNesting) {
  EXPECT_EQ(failure(std::string(64, '[') + std::string(64, ']')), "");
  EXPECT_NE(failure(std::string(65, '[') + std::string(65, ']')).find("nested deeper"), std::string::npos);
  EXPECT_NE(failure(std::string(1000000, '[')).find("nested deeper"), std::string::npos);
}

TEST(Json, ReadsFilesUnderALimit) {
  const std::string path = testing::TempDir() + "/json_test_" + std::to_string(::getpid()) + ".json";
  ASSERT_TRUE(write_file_atomically(path, std::string("{\"a\": 1}")).ok());
  EXPECT_TRUE(read_json_file(path).ok());
  const Result<Json> result = read_json_file(path, 4);
  ASSERT_FALSE(result.ok());
  EXPECT_NE(result.status().message().find(path), std::string::npos);
  EXPECT_FALSE(read_json_file(path + ".missing").ok());
  ::unlink(path.c_str());
}

TEST(Json, NamesKinds) {
  EXPECT_EQ(json_kind(Json::object()), "object");
  EXPECT_EQ(json_kind(Json::array()), "array");
  EXPECT_EQ(json_kind(Json("x")), "string");
  EXPECT_EQ(json_kind(Json(1)), "number");
  EXPECT_EQ(json_kind(Json(nullptr)), "null");
}

}  // namespace
}  // namespace servoflow
