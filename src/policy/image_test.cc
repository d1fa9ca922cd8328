#include "servoflow/image.h"

#include <gtest/gtest.h>

#include <fstream>
#include <iterator>

namespace servoflow {
namespace {

TEST(DecodeImage, GivesThePixelsOfAFile) {
  std::ifstream file("tests/golden/images/gradient_500x300.png", std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const auto* data = reinterpret_cast<const std::uint8_t*>(bytes.data());
  const auto image = decode_image({data, bytes.size()});
  ASSERT_TRUE(image.ok()) << image.status().message();
  EXPECT_EQ(image->width, 500);
  EXPECT_EQ(image->height, 300);
  EXPECT_EQ(image->rgb.size(), 450000u);
  EXPECT_FALSE(decode_image({data, bytes.size() / 2}).ok());
  EXPECT_FALSE(decode_image({}).ok());
}

}  // namespace
}  // namespace servoflow
