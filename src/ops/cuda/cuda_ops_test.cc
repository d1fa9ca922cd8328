// The CUDA backend against the reference. Needs a GPU.
#include "ops/attention_conformance.h"
#include "ops/block_conformance.h"
#include "ops/cuda/expert_problem.h"
#include "ops/cuda/paths.h"
#include "ops/input_conformance.h"

namespace servoflow::ops {
namespace {

Variant variant(const std::string& name, const char* precision, CudaPath path = CudaPath::kBest) {
  return {name, [=] {
            auto made = make_cuda_backend(precision, 0, path);
            if (!made.ok()) {
              std::printf("%s\n", std::string(made.status().message()).c_str());
              std::exit(1);
            }
            return std::move(*made);
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
  const auto feed = [&] { device.b->upload(x.data, staged, values.size() * sizeof(float)); };
  const auto body = [&] {
    device.b->mark(0);
    device.b->scale_rows({.x = x, .y = y, .rows = {rows}, .scale = 2});
    device.b->mark(1);
  };
  for (int turn = 1; turn <= 3; ++turn) {
    std::vector<float> now(values.size());
    for (std::size_t i = 0; i < now.size(); ++i) now[i] = values[i] * static_cast<float>(turn);
    std::memcpy(staged, now.data(), now.size() * sizeof(float));
    device.b->replay(7, feed, body);
    const Status status = device.b->finish();
    ASSERT_TRUE(status.ok()) << status.message();
    EXPECT_GT(device.b->elapsed(0, 1), 0);
    const std::vector<float> got = device.get(y, rows);
    for (std::size_t i = 0; i < got.size(); ++i) ASSERT_EQ(got[i], 2 * now[i]) << "turn " << turn;
  }
}

// Those that were there when it was told so stay; of the others only the last used do.
TEST_P(Ops, KeepsTheRecordingsItWasToldTo) {
  const Matrix x = device.put(normal(64, 5), 1, 64, DType::kF32), y = device.matrix(1, 64, DType::kF32);
  const auto replay = [&](std::uint64_t key) {
    const int before = device.b->recordings();
    device.b->replay(
        key, [] {}, [&] { device.b->scale_rows({.x = x, .y = y, .rows = {1}, .scale = 2}); });
    const Status status = device.b->finish();
    EXPECT_TRUE(status.ok()) << status.message();
    return device.b->recordings() - before;
  };
  EXPECT_EQ(replay(1), 1);
  EXPECT_EQ(replay(2), 1);
  device.b->keep_recordings();
  for (std::uint64_t key = 100; key < 140; ++key) {
    EXPECT_EQ(replay(key), 1) << key;
    EXPECT_EQ(replay(100), 0) << "used again and again, after key " << key;
  }
  for (const std::uint64_t key : {1, 2, 139, 120}) EXPECT_EQ(replay(key), 0) << key;
  EXPECT_EQ(replay(101), 1) << "not used for longest";
}

// What a generated matrix is, is a matter of its bytes: those of weights/synth.h, here for one seed.
TEST_P(Ops, GeneratesWhatTheHostWould) {
  ASSERT_TRUE(device.b->generates());
  const int n = 300, k = 70;
  const Sequence sequence{0x0123456789ABCDEFu, 0.3f, -0.1f};
  std::vector<float> values;
  for (std::uint64_t i = 0; i < static_cast<std::uint64_t>(n) * k; ++i) {
    std::uint64_t z = sequence.state + (i + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    const float u = static_cast<float>(static_cast<std::int32_t>(z >> 40)) * 0x1p-24f;
    values.push_back(sequence.offset + sequence.amp * (u * 2.0f - 1.0f));
  }
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    std::vector<float> want = values;
    if (dtype == DType::kBF16)
      for (float& v : want) v = to_float(to_bf16(v));
    Matrix made = device.matrix(1, n * k, dtype);
    device.b->generate(made.data, dtype, static_cast<std::uint64_t>(n) * k, sequence);
    EXPECT_EQ(device.get(made, 1), want);
    // Packed, it is what a matrix that came in bytes is.
    const std::vector<HostMatrix> parts = {{dtype, n, k, {}, "made", sequence}};
    const auto packed = device.b->pack(parts, {});
    ASSERT_TRUE(packed.ok()) << packed.status().message();
    const Weight sent = device.weight({want}, k, PackMode::kConcat, dtype);
    const Matrix x = device.put(normal(5 * k, 3), 5, k, act()), y = device.matrix(5, n, DType::kF32),
                 z = device.matrix(5, n, DType::kF32);
    device.b->matmul({.x = x, .w = &*packed, .y = y, .rows = {5}});
    device.b->matmul({.x = x, .w = &sent, .y = z, .rows = {5}});
    EXPECT_EQ(device.get(y, 5), device.get(z, 5));
  }
}

// The sizes that the denoise loop has kernels of its own for: rows beyond one pass of 56, requests of
// different lengths, and a request that gets the same bits alone.
TEST_P(Ops, ExpertOfFullSize) {
  std::vector<std::vector<float>> moved;
  for (Device* d : {&reference, &device}) {
    ExpertProblem problem(*d, {});
    for (const int count : {3, 3, 1}) {
      if (d == &reference && !moved.empty()) break;
      const Result<std::vector<float>> actions = problem.run(count);
      ASSERT_TRUE(actions.ok()) << actions.status().message();
      moved.push_back(*actions);
    }
  }
  expect_share("actions of the expert", measure(moved[1], moved[0]), half() ? 0x1p-6 : 1e-5,
               half() ? 0x1p-12 : 0);
  EXPECT_EQ(moved[2], moved[1]) << "a repeat";
  moved[1].resize(moved[3].size());
  EXPECT_EQ(moved[3], moved[1]) << "alone";
}

INSTANTIATE_TEST_SUITE_P(Cuda, Ops,
                         testing::Values(variant("fp32", "fp32"), variant("bf16", "bf16"),
                                         variant("bf16_kernels", "bf16", CudaPath::kKernels),
                                         variant("bf16_portable", "bf16", CudaPath::kPortable)),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace servoflow::ops
