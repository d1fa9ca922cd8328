#include "weights/scan.h"

#include <gtest/gtest.h>

#include <bit>
#include <limits>

#include "weights/checkpoint_draft.h"

namespace servoflow::weights {
namespace {

template <typename T>
void put(DraftTensor& tensor, std::size_t index, T value) {
  std::memcpy(tensor.bytes.data() + index * sizeof(T), &value, sizeof(T));
}

TEST(Scan, FindsNothingInSoundWeights) {
  const Result<Checkpoint> opened = open_checkpoint("tests/golden/openpi-tiny");
  std::uint64_t last = 0, total = 0;
  const auto found = scan_weights(*opened, [&](std::uint64_t done, std::uint64_t all) {
    EXPECT_GT(done, last);
    last = done;
    total = all;
  });
  ASSERT_TRUE(found.ok());
  EXPECT_TRUE(found->empty());
  EXPECT_EQ(last, 4 * 520220u);
  EXPECT_EQ(total, last);
}

TEST(Scan, NamesCountsAndPlacesInEveryDtype) {
  CheckpointDraft draft;
  const float infinity = std::numeric_limits<float>::infinity();
  DraftTensor& f32 = draft.at("action_in_proj.weight");  // 30 elements
  put(f32, 7, std::bit_cast<float>(0x7f800001u));
  put(f32, 9, -infinity);
  put(f32, 29, infinity);
  draft.add("action_in_proj.bias", {10}, DType::kBF16);
  put(draft.at("action_in_proj.bias"), 9, std::uint16_t{0xffc0});
  draft.add("action_out_proj.bias", {3}, DType::kF16);
  put(draft.at("action_out_proj.bias"), 0, std::uint16_t{0x7c00});
  put(draft.at("action_out_proj.bias"), 1, std::uint16_t{0x7bff});  // the largest finite value
  draft.add("time_mlp_in.bias", {10}, DType::kF64);
  put(draft.at("time_mlp_in.bias"), 5, std::numeric_limits<double>::quiet_NaN());
  put(draft.at("time_mlp_in.bias"), 6, std::numeric_limits<double>::max());
  put(draft.at("time_mlp_out.bias"), 0, std::numeric_limits<float>::max());
  draft.add(kExpertHead, {11, 10});
  put(draft.at(kExpertHead), 0, infinity);  // not used, so not looked at
  ASSERT_EQ(draft.failure(), "");
  const Result<std::vector<NonFinite>> found = scan_weights(*open_checkpoint(draft.dir));
  ASSERT_TRUE(found.ok());
  ASSERT_EQ(found->size(), 4u);
  const auto expect = [&](std::size_t i, const char* name, std::uint64_t nans, std::uint64_t infinities,
                          std::uint64_t first) {
    EXPECT_EQ((*found)[i].name, name);
    EXPECT_EQ((*found)[i].nans, nans);
    EXPECT_EQ((*found)[i].infinities, infinities);
    EXPECT_EQ((*found)[i].first_index, first);
  };
  expect(0, "action_in_proj.weight", 1, 2, 7);
  expect(1, "action_in_proj.bias", 1, 0, 9);
  expect(2, "action_out_proj.bias", 0, 1, 0);
  expect(3, "time_mlp_in.bias", 1, 0, 5);
}

// A tensor of several parts and rounds: the first index counts from the tensor's start.
TEST(Scan, CrossesParts) {
  CheckpointDraft draft;
  draft.config["architecture"]["prefix"]["vocab"] = 3'000'000;
  draft.add(kTokenTable, {3'000'000, 6});  // 72 MB
  DraftTensor& table = draft.at(kTokenTable);
  put(table, 17'500'000, std::numeric_limits<float>::quiet_NaN());
  put(table, 17'999'999, std::numeric_limits<float>::infinity());
  ASSERT_EQ(draft.failure(), "");
  const Result<std::vector<NonFinite>> found = scan_weights(*open_checkpoint(draft.dir), {}, 2);
  ASSERT_TRUE(found.ok());
  ASSERT_EQ(found->size(), 1u);
  EXPECT_EQ((*found)[0].first_index, 17'500'000u);
  EXPECT_EQ((*found)[0].nans, 1u);
  EXPECT_EQ((*found)[0].infinities, 1u);
}

}  // namespace
}  // namespace servoflow::weights
