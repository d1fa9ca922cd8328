// A network that takes frames answers as one that is given their pictures, on every device that takes them.
#include <gtest/gtest.h>

#include <functional>
#include <random>

#include "policy/network.h"
#include "policy/noise.h"
#include "stages/preprocess/resize.h"
#include "weights/synth.h"

namespace servoflow::policy {
namespace {

using stages::Letterbox;

struct Frame {
  int width, height;
  std::vector<std::uint8_t> bytes;
  Frame(int w, int h) : width(w), height(h), bytes(std::size_t{3} * w * h) {
    std::mt19937 random(static_cast<unsigned>(w * 31 + h));
    for (std::uint8_t& b : bytes) b = static_cast<std::uint8_t>(random());
  }
};

class RawInputs : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    architecture_ = weights::tiny_architecture();
    auto source = std::make_shared<weights::SyntheticSource>(architecture_, 3, DType::kBF16);
    auto network = Network::create(source, architecture_, {.device = GetParam(), .max_batch = 2});
    ASSERT_TRUE(network.ok()) << network.status().message();
    network_ = std::move(*network);
    ASSERT_TRUE(network_->info().raw_frames);
  }
  stages::ModelInput input(const std::vector<const Frame*>& frames, bool raw, contract::Resize mode) const {
    Letterbox letterbox(mode);
    stages::ModelInput in;
    const int size = architecture_.vision.image;
    for (const Frame* f : frames) {
      stages::CameraPicture& picture = in.pictures.emplace_back();
      picture.slot = in.picture_count++;
      picture.is_raw = raw;
      picture.pixels.resize(raw ? 0 : std::size_t{3} * size * size);
      const Status status = raw ? letterbox.describe(f->bytes, f->width, f->height, false, size, picture.raw)
                                : letterbox.run(f->bytes, f->width, f->height, size, picture.pixels);
      EXPECT_TRUE(status.ok()) << status.message();
    }
    in.tokens = {5, 0, architecture_.vocab - 1, 17, 17, 2};
    return in;
  }
  std::vector<float> run(std::vector<stages::ModelInput> inputs, int* waited = nullptr) {
    const std::size_t size = static_cast<std::size_t>(architecture_.horizon * architecture_.action_dim);
    std::vector<float> noise(size), out(size * inputs.size());
    fill_noise(1, 2, noise);
    const std::function<void()> meanwhile = [&] { ++*waited; };
    std::vector<NetworkRequest> requests;
    for (std::size_t i = 0; i < inputs.size(); ++i)
      requests.push_back({&inputs[i], noise, std::span(out).subspan(i * size, size),
                          waited != nullptr ? &meanwhile : nullptr});
    const Status status = network_->run(requests, 3, nullptr, nullptr);
    EXPECT_TRUE(status.ok()) << status.message();
    return out;
  }
  weights::Architecture architecture_;
  std::unique_ptr<Network> network_;
};

TEST_P(RawInputs, AnswerAsPicturesDoWhateverTheirSize) {
  const Frame small(40, 30), large(640, 480), tall(99, 250), same(28, 28);
  for (const auto mode :
       {contract::Resize::kPillow, contract::Resize::kOpenpiFloat, contract::Resize::kLerobotFloat}) {
    std::vector<std::vector<float>> seen;
    for (const auto& [a, b] :
         {std::pair(&small, &large), {&large, &small}, {&tall, &same}, {&large, &large}}) {
      const std::vector<float> raw = run({input({a, b}, true, mode)});
      EXPECT_EQ(raw, run({input({a, b}, false, mode)}));
      for (const std::vector<float>& other : seen) EXPECT_NE(raw, other) << "frames make a difference";
      seen.push_back(raw);
    }
  }
}

TEST_P(RawInputs, MixWithPicturesInABatch) {
  const Frame small(40, 30), large(640, 480);
  const auto mode = contract::Resize::kPillow;
  stages::ModelInput mixed = input({&small, &large}, true, mode);
  mixed.pictures[1] = input({&small, &large}, false, mode).pictures[1];
  int waited = 0;
  const std::vector<float> batch = run({mixed, input({&large}, true, mode)}, &waited);
  EXPECT_EQ(waited, 2);
  std::vector<float> want = run({input({&small, &large}, false, mode)});
  const std::vector<float> second = run({input({&large}, false, mode)});
  want.insert(want.end(), second.begin(), second.end());
  EXPECT_EQ(batch, want);
}

TEST_P(RawInputs, RefuseFramesThatDoNotFit) {
  const Frame frame(40, 30);
  const auto refused = [&](const std::function<void(stages::RawFrame&)>& change) {
    stages::ModelInput in = input({&frame}, true, contract::Resize::kPillow);
    change(in.pictures[0].raw);
    std::vector<float> noise(static_cast<std::size_t>(architecture_.horizon * architecture_.action_dim)),
        out(noise.size());
    const NetworkRequest request{&in, noise, out};
    const Status status = network_->run({&request, 1}, 3, nullptr, nullptr);
    return status.code() == StatusCode::kInvalidInput;
  };
  EXPECT_TRUE(refused([](stages::RawFrame& f) { f.bytes = f.bytes.subspan(1); }));
  EXPECT_TRUE(refused([](stages::RawFrame& f) { f.frame.left = 500; }));
  EXPECT_TRUE(refused([](stages::RawFrame& f) { f.columns.table[0] = 40; }));
  const std::vector<std::uint8_t> huge(std::size_t{3} * 2000 * 2000);
  EXPECT_TRUE(refused([&](stages::RawFrame& f) {
    f.bytes = huge;
    f.frame.width = f.frame.height = 2000;
  }));
  EXPECT_FALSE(refused([](stages::RawFrame&) {}));
}

INSTANTIATE_TEST_SUITE_P(Devices, RawInputs, testing::Values("reference", "cuda"),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace servoflow::policy
