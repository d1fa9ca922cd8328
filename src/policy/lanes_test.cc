// Pictures side by side (Backend::lanes) must come out as they do together, bit for bit.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "ops/cpu/cpu_backend.h"
#include "policy/plan.h"
#include "stages/vision/vision.h"
#include "weights/loader.h"
#include "weights/synth.h"

namespace servoflow::policy {
namespace {

// Computes lane after lane, and notes which began.
class InLanes : public ops::cpu::CpuBackend {
 public:
  explicit InLanes(const std::string& precision) : CpuBackend(precision, 2, {}) {}
  int lanes(int n) const override { return side_by_side ? n : 1; }
  void begin_lane(int lane, int lanes) override {
    EXPECT_TRUE(side_by_side);
    EXPECT_LT(lane, lanes);
    begun.push_back(lane);
  }
  void end_lanes() override { ++ended; }

  bool side_by_side = false;
  std::vector<int> begun;
  int ended = 0;
};

class Lanes : public testing::TestWithParam<const char*> {};

TEST_P(Lanes, PicturesComeOutAsTheyDoTogether) {
  const weights::Architecture a = weights::tiny_architecture();
  const weights::SyntheticSource source(a, 3, DType::kF32);
  InLanes backend(GetParam());
  weights::Loader loader(backend, source, 1, {});
  const auto vision = stages::Vision::load(loader, a);
  ASSERT_TRUE(vision.ok()) << vision.status().message();
  const int most = 3, tokens = a.vision.tokens();
  auto planned = plan_workspace(backend, a, {.batch = 1, .pictures = most});
  ASSERT_TRUE(planned.ok()) << planned.status().message();
  Workspace& w = *planned;
  const auto pixels = static_cast<std::size_t>(most * a.vision.image * a.vision.image * 3);
  for (std::size_t i = 0; i < pixels; ++i)
    w.pixels[i] = static_cast<float>((i * 7919) % 255) / 127.5f - 1;  // no two pictures are the same

  const auto run = [&](int pictures) {
    *w.device.counts = {.pictures = pictures, .vision_rows = pictures * tokens};
    for (int p = 0; p < pictures; ++p) {
      w.device.segments[p] = {.row_begin = p * tokens, .rows = tokens, .slot = p, .past = 0};
      w.device.alone[p] = {.row_begin = 0, .rows = tokens, .slot = p, .past = 0};
    }
    for (int i = 0; i < most * tokens; ++i) w.device.vision_map[i] = i;
    w.picture_count.likely = w.picture_segments.count.likely = pictures;
    w.vision_rows.likely = pictures * tokens;
    auto* out = static_cast<float*>(w.prefix_x.data);
    std::fill_n(out, static_cast<std::size_t>(w.prefix_x.rows) * static_cast<std::size_t>(w.prefix_x.pitch),
                -7.0f);
    vision->run(backend, vision_run(w));
    EXPECT_TRUE(backend.finish().ok());
    return std::vector<float>(out, out + static_cast<std::ptrdiff_t>(pictures * tokens) * w.prefix_x.pitch);
  };
  for (int pictures = 1; pictures <= most; ++pictures) {
    backend.side_by_side = false;
    backend.begun.clear();
    backend.ended = 0;
    const std::vector<float> together = run(pictures);
    EXPECT_TRUE(backend.begun.empty());
    backend.side_by_side = true;
    const std::vector<float> side_by_side = run(pictures);
    std::vector<int> all(static_cast<std::size_t>(pictures > 1 ? pictures : 0));
    for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int>(i);
    EXPECT_EQ(backend.begun, all);
    EXPECT_EQ(backend.ended, pictures > 1 ? 1 : 0);
    ASSERT_EQ(together.size(), side_by_side.size());
    EXPECT_EQ(std::memcmp(together.data(), side_by_side.data(), together.size() * sizeof(float)), 0)
        << pictures;
    EXPECT_NE(together[0], -7.0f);
  }
}

INSTANTIATE_TEST_SUITE_P(Precisions, Lanes, testing::Values("fp32", "bf16"),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace servoflow::policy
