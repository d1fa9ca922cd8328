// Needs a GPU: what the probe measures is there, and plausible for any GPU.
#include <gtest/gtest.h>

#include <algorithm>

#include "ops/device_probe.h"

namespace servoflow::ops {
namespace {

double median(Result<std::vector<double>> samples) {
  EXPECT_TRUE(samples.ok()) << samples.status().message();
  if (!samples.ok() || samples->empty()) return 0;
  std::sort(samples->begin(), samples->end());
  return (*samples)[samples->size() / 2];
}

class CudaProbe : public ::testing::Test {
 protected:
  void SetUp() override {
    auto made = make_cuda_probe(0);
    ASSERT_TRUE(made.ok()) << made.status().message();
    probe_ = std::move(*made);
    id_ = probe_->identity();
  }
  std::unique_ptr<DeviceProbe> probe_;
  GpuIdentity id_;
};

TEST_F(CudaProbe, KnowsTheGpu) {
  EXPECT_FALSE(id_.name.empty());
  EXPECT_FALSE(id_.bus.empty());
  EXPECT_GE(id_.capability_major, 7);
  EXPECT_GT(id_.multiprocessors, 0);
  EXPECT_GT(id_.memory_bytes, std::uint64_t{1} << 30);
  EXPECT_LE(id_.free_bytes, id_.memory_bytes);
  EXPECT_GE(id_.driver, id_.runtime / 1000 * 1000);
}

TEST_F(CudaProbe, MoreProcessorsStreamMoreAndNothingBeatsTheCache) {
  const std::uint64_t bytes = std::uint64_t{256} << 20, small = std::uint64_t{1} << 20;
  for (const Traffic traffic : {Traffic::kRead, Traffic::kCopy, Traffic::kWrite}) {
    const double one = static_cast<double>(bytes) / median(probe_->stream(traffic, bytes, 1, 3)) * 1e-3;
    const double all =
        static_cast<double>(bytes) / median(probe_->stream(traffic, bytes, id_.multiprocessors, 3)) * 1e-3;
    EXPECT_GT(one, 1);
    EXPECT_LT(one, 1000);  // a multiprocessor moves 64 to 128 bytes per cycle at most
    EXPECT_GT(all, 2 * one);
    EXPECT_LT(all, 30000);
  }
  const double cached =
      static_cast<double>(small) / median(probe_->stream(Traffic::kRead, small, id_.multiprocessors, 3));
  const double far =
      static_cast<double>(bytes) / median(probe_->stream(Traffic::kRead, bytes, id_.multiprocessors, 3));
  EXPECT_GT(cached, 0.5 * far);
  EXPECT_FALSE(probe_->stream(Traffic::kRead, 0, 1, 1).ok());
}

TEST_F(CudaProbe, LaunchesBarriersAndCopiesTakeTime) {
  const double launch = median(probe_->launch(20)), row = median(probe_->launch_in_a_row(3));
  EXPECT_GT(launch, 1);
  EXPECT_LT(launch, 1000);
  EXPECT_GT(row, 0.2);
  EXPECT_LT(row, launch);
  const double graph = median(probe_->graph(900, false, 5));
  EXPECT_GT(graph, 100);
  EXPECT_LT(graph, 900 * launch);
  const auto early = probe_->graph(900, true, 5);
  EXPECT_EQ(early.ok(), id_.capability_major >= 9);
  const double barrier = median(probe_->grid_barrier(3));
  EXPECT_GT(barrier, 0.1);
  EXPECT_LT(barrier, 100);
  const std::uint64_t bytes = std::uint64_t{16} << 20;
  for (const bool to_device : {true, false})
    for (const bool pinned : {true, false}) {
      const double gbs =
          static_cast<double>(bytes) / median(probe_->transfer(to_device, pinned, bytes, 5)) * 1e-3;
      EXPECT_GT(gbs, 0.1);
      EXPECT_LT(gbs, 1000);
    }
}

TEST_F(CudaProbe, ALibraryThatIsNotThereIsNamed) {
  const auto opened = probe_->open_library("libno-such-cublas.so.9");
  ASSERT_FALSE(opened.ok());
  EXPECT_NE(opened.status().message().find("libno-such-cublas.so.9"), std::string::npos);
  EXPECT_FALSE(probe_->library_product(ProductKind::kBf16, 16, 64, 64, 1, 1).ok());
  EXPECT_FALSE(probe_->open_library("libc.so.6").ok());
}

TEST_F(CudaProbe, ALibrarysProductsRunWhereItIs) {
  const auto opened = probe_->open_library("");
  if (!opened.ok()) GTEST_SKIP() << opened.status().message();
  for (const ProductKind kind : {ProductKind::kBf16, ProductKind::kInt8})
    EXPECT_GT(median(probe_->library_product(kind, 64, 2048, 1024, 3, 3)), 0.5);
  if (id_.capability_major * 10 + id_.capability_minor >= 89) {
    EXPECT_GT(median(probe_->library_product(ProductKind::kFp8, 64, 2048, 1024, 3, 3)), 0.5);
  }
}

TEST(CudaProbeAbsent, AnOrdinalThatIsNotHereIsAnError) { EXPECT_FALSE(make_cuda_probe(97).ok()); }

}  // namespace
}  // namespace servoflow::ops
