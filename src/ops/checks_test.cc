#include <gtest/gtest.h>

#include <vector>

#include "ops/backend.h"

namespace servoflow::ops {
namespace {

// A frame of 8 x 4 that becomes 4 x 2 in a picture of 4: its tables, then its pixels.
struct Good {
  std::vector<std::int32_t> block = std::vector<std::int32_t>(200, 1);
  Frame frame{.resampling = Resampling::kFixedPoint,
              .width = 8,
              .height = 4,
              .top = 1,
              .columns = 4,
              .rows = 2,
              .pixels = 96,
              .column_table = 0,
              .row_table = 64,
              .column_taps = 2,
              .row_taps = 2};
  Status check(int image = 4) const {
    const auto bytes = std::as_bytes(std::span(block));
    return check_frame(frame, bytes, bytes.size(), image);
  }
};

TEST(CheckFrame, TakesWhatFits) {
  const Status status = Good().check();
  EXPECT_TRUE(status.ok()) << status.message();
  Good ready;
  ready.frame = {.width = 4, .height = 4, .pixels = 4};
  EXPECT_TRUE(ready.check().ok());
}

TEST(CheckFrame, RefusesWhatADeviceCouldNot) {
  const auto refuses = [](const char* what, auto change) {
    Good g;
    change(g);
    const Status status = g.check();
    EXPECT_EQ(status.code(), StatusCode::kInvalidInput) << what;
  };
  refuses("no width", [](Good& g) { g.frame.width = 0; });
  refuses("negative height", [](Good& g) { g.frame.height = -4; });
  refuses("a side too long", [](Good& g) { g.frame.width = kMaxFrameSide + 1; });
  refuses("too many pixels", [](Good& g) {
    g.frame.width = g.frame.height = 2048;
    g.block.resize(std::size_t{4} << 20);
  });
  refuses("pixels beyond the block", [](Good& g) { g.frame.pixels = 800 - 92; });
  refuses("pixels before it", [](Good& g) { g.frame.pixels = -4; });
  refuses("pixels at an odd place", [](Good& g) { g.frame.pixels = 97; });
  refuses("outside the picture", [](Good& g) { g.frame.left = 1; });
  refuses("above the picture", [](Good& g) { g.frame.top = -1; });
  refuses("no rows", [](Good& g) { g.frame.rows = 0; });
  refuses("no taps", [](Good& g) { g.frame.row_taps = 0; });
  refuses("a table beyond the block", [](Good& g) { g.frame.row_table = 772; });
  refuses("inputs beyond the frame", [](Good& g) { g.block[3] = 8; });
  refuses("a sum beyond the frame", [](Good& g) { g.block[3] = 7, g.block[7] = 2; });
  refuses("more inputs than weights", [](Good& g) { g.block[4] = 3; });
  refuses("a negative input", [](Good& g) { g.block[0] = -1; });
  refuses("two neighbours with two weights", [](Good& g) { g.frame.resampling = Resampling::kUnit; });
  refuses("a neighbour beyond the frame", [](Good& g) {
    g.frame.resampling = Resampling::kUnit;
    g.frame.column_taps = g.frame.row_taps = 1;
    g.block[4] = 8;
  });
  refuses("a picture of another size", [](Good& g) { g.frame = {.width = 3, .height = 4}; });
}

}  // namespace
}  // namespace servoflow::ops
