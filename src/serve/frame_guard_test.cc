#include "serve/frame_guard.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace servoflow::serve {
namespace {

using Verdict = FrameFollower::Verdict;
using Clock = FrameFollower::Clock;

// A frame as a client sends it, masked; `announced` may be more than there is.
std::string frame(int first, std::uint64_t announced, std::size_t payload) {
  std::string out(1, static_cast<char>(first));
  const int length = announced < 126 ? static_cast<int>(announced) : announced < 65536 ? 126 : 127;
  out += static_cast<char>(0x80 | length);
  const int bytes = length == 127 ? 8 : length == 126 ? 2 : 0;
  for (int i = bytes - 1; i >= 0; --i) out += static_cast<char>(announced >> (8 * i));
  return out + "mask" + std::string(payload, 'x');
}

// The verdict on `stream`, handed over in pieces of `step` bytes.
Verdict follow(const std::string& stream, std::size_t step, std::uint64_t* announced = nullptr) {
  FrameFollower follower(1000, std::chrono::seconds(10));
  Verdict verdict = Verdict::kFine;
  for (std::size_t i = 0; i < stream.size() && verdict == Verdict::kFine; i += step) {
    const std::size_t count = std::min(step, stream.size() - i);
    verdict =
        follower.follow({reinterpret_cast<const std::uint8_t*>(stream.data()) + i, count}, Clock::now());
  }
  if (announced != nullptr) *announced = follower.announced();
  return verdict;
}

TEST(FrameFollower, MessagesUpToTheLimitPassInAnyPieces) {
  std::string stream;
  for (const std::size_t size : {0, 1, 125, 126, 500, 999, 1000}) {
    stream += frame(0x82, size, size);
    stream += frame(0x89, 4, 4);  // a ping between messages
  }
  stream += frame(0x02, 400, 400) + frame(0x89, 125, 125) + frame(0x00, 400, 400) + frame(0x80, 200, 200);
  for (const std::size_t step :
       {std::size_t{1}, std::size_t{2}, std::size_t{7}, std::size_t{64}, stream.size()})
    EXPECT_EQ(follow(stream, step), Verdict::kFine) << step;
}

TEST(FrameFollower, WhatIsAnnouncedBeyondItIsStoppedAtTheHeader) {
  for (const std::uint64_t size : {std::uint64_t{1001}, std::uint64_t{65536}, std::uint64_t{1} << 62,
                                   std::uint64_t{1} << 63, ~std::uint64_t{0}})
    for (const std::size_t step : {1, 3, 1000}) {
      std::uint64_t announced = 0;
      EXPECT_EQ(follow(frame(0x82, 10, 10) + frame(0x82, size, 0), step, &announced), Verdict::kTooBig);
      EXPECT_EQ(announced, size);
    }
  // Fragments count together, and their sum does not wrap around.
  EXPECT_EQ(follow(frame(0x02, 600, 600) + frame(0x00, 600, 0), 50), Verdict::kTooBig);
  EXPECT_EQ(follow(frame(0x02, 600, 600) + frame(0x00, ~std::uint64_t{0}, 0), 50), Verdict::kTooBig);
}

TEST(FrameFollower, AMessageMayNotTrickleForever) {
  FrameFollower follower(1000, std::chrono::seconds(10));
  const std::string stream = frame(0x82, 100, 100);
  const auto bytes = [&](std::size_t from, std::size_t count) {
    return std::span<const std::uint8_t>(reinterpret_cast<const std::uint8_t*>(stream.data()) + from, count);
  };
  const Clock::time_point begin = Clock::now();
  EXPECT_EQ(follower.follow(bytes(0, 50), begin), Verdict::kFine);
  EXPECT_EQ(follower.follow(bytes(50, 10), begin + std::chrono::seconds(9)), Verdict::kFine);
  EXPECT_EQ(follower.follow(bytes(60, 10), begin + std::chrono::seconds(11)), Verdict::kTooSlow);
  // Between messages there is no hurry.
  FrameFollower idle(1000, std::chrono::seconds(10));
  EXPECT_EQ(idle.follow(bytes(0, stream.size()), begin), Verdict::kFine);
  EXPECT_EQ(idle.follow(bytes(0, stream.size()), begin + std::chrono::hours(1)), Verdict::kFine);
}

}  // namespace
}  // namespace servoflow::serve
