// What a stalled loop is said to stand at, for counters as the kernel would leave them. Needs no GPU.
#include "ops/cuda/loop_stall.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>

namespace servoflow::ops::cuda {
namespace {

using namespace loop;

constexpr int kBlocks = 120, kRanks = 8, kClusters = 15;
constexpr LoopLaunch kLaunch{.first = 2, .steps = 3, .depth = 4, .rows = 50};

// Every block counts as it walks through the loop, until one that does not: its count is left out, and nobody
// comes past the exchange that lacks it.
struct Walk {
  int requests = 1;
  // Leaves a count out: turn, phase (0 the edge … 5 down), request, block.
  std::function<bool(int, int, int, int)> silent;
  LoopStall stall;

  bool exchange(int turn, int phase) {
    bool complete = true;
    const auto count = [&](int request, int block, int counter) {
      if (silent(turn, phase, request, block))
        complete = false;
      else
        ++stall.counts[request * kLoopCounters + counter];
    };
    for (int request = 0; request < requests; ++request) {
      if (phase == 0)
        for (int row = 0; row < kLaunch.rows; ++row) count(request, (50 * request + row) % kBlocks, kEdges);
      for (int block = 0; block < kBlocks && phase > 0; ++block) {
        const int rank = block % kRanks, cluster = block / kRanks;
        if (phase == 1 && block >= 64 && block < 96) count(request, block, kKeys + rank);  // 32 groups
        if (phase == 2 && cluster < 8) count(request, block, kAttended + cluster);         // a head each
        if ((phase == 3 || phase == 5) && rank < 7) count(request, block, kColumns + rank);
        if (phase == 4) {  // 512 groups of hidden features, five to each of the last 32 blocks
          const int group = 4 * block + std::max(0, block - 88), last = group + (block < 88 ? 3 : 4);
          count(request, block, kHidden + group / 64);
          if (last / 64 != group / 64) count(request, block, kHidden + last / 64);
        }
      }
    }
    return complete;
  }
  std::string run() {
    for (int turn = 0; turn <= kLaunch.steps * kLaunch.depth; ++turn)
      for (int phase = 0; phase < 6; ++phase) {
        if (phase == 0 ? turn % kLaunch.depth != 0 : turn == kLaunch.steps * kLaunch.depth) continue;
        if (!exchange(turn, phase)) return describe(stall, kLaunch);
      }
    return describe(stall, kLaunch);
  }
};

std::string stands(int turn, int phase, int block, int request = 0, int requests = 1) {
  Walk walk{.requests = requests};
  walk.silent = [=](int t, int p, int r, int b) {
    return t == turn && p == phase && r == request && b == block;
  };
  const std::string all = walk.run();
  return all.substr(0, all.find(" have counted"));
}

TEST(LoopStall, NamesTheExchangeAndWhoIsMissing) {
  EXPECT_EQ(stands(0, 0, 17), "it stands at step 2, edge: request 0: 49 of 50 rows");
  EXPECT_EQ(stands(0, 1, 64),
            "it stands at step 2, layer 0, q/k/v: request 0: 3 of 4 blocks with keys and values, every "
            "eighth from 0");
  EXPECT_EQ(stands(5, 1, 89),
            "it stands at step 3, layer 1, q/k/v: request 0: 3 of 4 blocks with keys and values, every "
            "eighth from 1");
  EXPECT_EQ(stands(6, 2, 57),
            "it stands at step 3, layer 2, attention: request 0: 7 of 8 blocks of cluster 7");
  EXPECT_EQ(stands(7, 3, 118), "it stands at step 3, layer 3, out: request 0: 14 of 15 blocks of rank 6");
  EXPECT_EQ(stands(11, 4, 57),
            "it stands at step 4, layer 3, gate/up: request 0: 15 of 16 blocks of slice 3");
  EXPECT_EQ(stands(11, 5, 1), "it stands at step 4, layer 3, down: request 0: 14 of 15 blocks of rank 1");
  EXPECT_EQ(stands(4, 0, 3), "it stands at step 3, edge: request 0: 49 of 50 rows");
  EXPECT_EQ(stands(12, 0, 3), "it stands at the last edge: request 0: 49 of 50 rows");
  EXPECT_EQ(stands(3, 3, 8, 2, 4), "it stands at step 2, layer 3, out: request 2: 14 of 15 blocks of rank 0");
  EXPECT_EQ(stands(-1, 0, 0), "it stands at no exchange: everybody has counted");
}

TEST(LoopStall, NamesABlockThatCountsInTwoSlices) {
  // Block 94 has the hidden features' groups 382 to 386.
  EXPECT_EQ(stands(0, 4, 94),
            "it stands at step 2, layer 0, gate/up: request 0: 14 of 15 blocks of slice 5, 13 of 14 blocks "
            "of slice 6");
}

TEST(LoopStall, NamesWhoGaveUpAndBeforeWhat) {
  const auto gave_up = [](unsigned block, unsigned request, unsigned counter, unsigned seen,
                          unsigned wanted) {
    const LoopStall stall{
        .block = block, .counter = request * kLoopCounters + counter, .seen = seen, .wanted = wanted};
    const std::string all = describe(stall, kLaunch);
    return all.substr(all.find("; ") + 2);
  };
  EXPECT_EQ(gave_up(41, 1, kKeys + 3, 11, 12),
            "block 41 (cluster 5, rank 1) gave up before attention of request 1, having seen 11 of 12 "
            "arrivals since "
            "the launch at the counter of key group 3");
  const auto before = [&](unsigned counter, unsigned wanted) {
    const std::string all = gave_up(0, 0, counter, 0, wanted);
    return all.substr(all.find("before ") + 7, all.find(" of request") - all.find("before ") - 7);
  };
  EXPECT_EQ(before(kEdges, 50), "q/k/v");
  EXPECT_EQ(before(kColumns + 2, kClusters * 3), "gate/up");
  EXPECT_EQ(before(kColumns + 2, kClusters * 4), "q/k/v");
  EXPECT_EQ(before(kColumns + 2, kClusters * 8), "edge") << "four layers are a step";
  EXPECT_EQ(before(kAttended + 7, 13), "out");
  EXPECT_EQ(before(kHidden + 7, 16), "down");
  EXPECT_NE(gave_up(0, 0, kHidden + 7, 1, 16).find("the counter of slice 7"), std::string::npos);
}

}  // namespace
}  // namespace servoflow::ops::cuda
