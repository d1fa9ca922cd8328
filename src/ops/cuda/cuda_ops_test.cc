// The CUDA backend against the reference. Needs a GPU.
#include "ops/conformance.h"

namespace servoflow::ops {
namespace {

Variant variant(const char* precision) {
  return {precision, [=] {
            auto made = make_backend({.device = "cuda", .precision = precision});
            if (!made.ok()) {
              std::printf("%s\n", std::string(made.status().message()).c_str());
              std::exit(1);
            }
            return std::move(made->backend);
          }};
}

TEST_P(Ops, NamesWhatRuns) {
  const std::string name = device.b->name();
  std::printf("  %s runs as %s\n", GetParam().name.c_str(), name.c_str());
  EXPECT_TRUE(name.starts_with("cuda/sm_")) << name;
  EXPECT_EQ(name.ends_with("_bf16"), act() == DType::kBF16);
}

TEST_P(Ops, ReplaysWhatItRecorded) {
  const int rows = 40, width = 64;
  const auto values = normal(rows * width, 5);
  void* staged = *device.b->allocate_staging(values.size() * sizeof(float));
  const Matrix x = device.matrix(rows, width, DType::kF32), y = device.matrix(rows, width, DType::kF32);
  const auto body = [&] {
    device.b->mark(0);
    device.b->upload(x.data, staged, values.size() * sizeof(float));
    device.b->scale_rows({.x = x, .y = y, .rows = {rows}, .scale = 2});
    device.b->mark(1);
  };
  for (int turn = 1; turn <= 3; ++turn) {
    std::vector<float> now(values.size());
    for (std::size_t i = 0; i < now.size(); ++i) now[i] = values[i] * static_cast<float>(turn);
    std::memcpy(staged, now.data(), now.size() * sizeof(float));
    device.b->replay(7, body);
    const Status status = device.b->finish();
    ASSERT_TRUE(status.ok()) << status.message();
    EXPECT_GT(device.b->elapsed(0, 1), 0);
    const std::vector<float> got = device.get(y, rows);
    for (std::size_t i = 0; i < got.size(); ++i) ASSERT_EQ(got[i], 2 * now[i]) << "turn " << turn;
  }
}

INSTANTIATE_TEST_SUITE_P(Cuda, Ops, testing::Values(variant("fp32"), variant("bf16")),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace servoflow::ops
