#include "toolkit/writers.h"

#include <gtest/gtest.h>

#include <filesystem>

#include "core/file.h"
#include "toolkit/npy.h"

namespace servoflow::toolkit {
namespace {

ActionChunk chunk() {
  ActionChunk c;
  c.horizon = 2;
  c.action_dim = 3;
  c.actions = {1, 2, 1.0 / 3, -0.5, 1e-7, 6};
  c.model_dim = 4;
  c.normalized = {0, 1, 2, 3, 4, 5, 6, 7};
  c.precision = "fp32";
  return c;
}

TEST(Writers, CsvReadsBackExactly) {
  EXPECT_EQ(chunk_to_csv(chunk()), "step,a0,a1,a2\n0,1,2,0.3333333333333333\n1,-0.5,1e-07,6\n");
}

TEST(Writers, JsonKeepsRows) {
  const Json j = chunk_to_json(chunk());
  EXPECT_EQ(j["actions"], Json::parse("[[1, 2, 0.3333333333333333], [-0.5, 1e-7, 6]]"));
  EXPECT_EQ(j["normalized"].size(), 2u);
  EXPECT_EQ(j["times_ms"].size(), 7u);
}

TEST(Writers, TheEndingDecidesTheFormat) {
  const std::string path = testing::TempDir() + "chunk.npy";
  ASSERT_TRUE(write_chunk(chunk(), path).ok());
  const auto array = read_npy(path);
  ASSERT_TRUE(array.ok());
  EXPECT_EQ(array->shape, (Shape{2, 3}));
  EXPECT_EQ(array->values, chunk().actions);
  std::filesystem::remove(path);
  EXPECT_EQ(write_chunk(chunk(), "x.txt").code(), StatusCode::kInvalidInput);
  EXPECT_EQ(write_chunk(chunk(), "/nonexistent/x.npy").code(), StatusCode::kInvalidInput);
}

TEST(Writers, BytesThatAreNotUtf8DoNotThrow) {
  EXPECT_EQ(json_text(Json{{"prompt", "a\xff"}}), "{\n  \"prompt\": \"a\xEF\xBF\xBD\"\n}");
}

}  // namespace
}  // namespace servoflow::toolkit
