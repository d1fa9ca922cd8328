// Letterboxing one camera frame, single-threaded: the share of an inference that a robot's cameras cost.
#include <benchmark/benchmark.h>

#include "stages/preprocess/resize.h"

namespace servoflow::stages {
namespace {

void letterbox(benchmark::State& state) {
  const int width = static_cast<int>(state.range(0)), height = static_cast<int>(state.range(1));
  Letterbox letterbox(static_cast<contract::Resize>(state.range(2)));
  std::vector<std::uint8_t> frame(std::size_t{3} * width * height);
  for (std::size_t i = 0; i < frame.size(); ++i) frame[i] = static_cast<std::uint8_t>(i * 31 + i / 1000);
  std::vector<float> pixels(3 * 224 * 224);
  for (auto _ : state) {
    if (!letterbox.run(frame, width, height, 224, pixels).ok()) state.SkipWithError("refused");
    benchmark::DoNotOptimize(pixels.data());
  }
}
BENCHMARK(letterbox)
    ->ArgNames({"width", "height", "mode"})
    ->Unit(benchmark::kMicrosecond)
    ->ArgsProduct({{640}, {480}, {0, 2}})
    ->Args({224, 224, 0})
    ->Args({256, 256, 0})
    ->Args({1280, 720, 0});

}  // namespace
}  // namespace servoflow::stages

BENCHMARK_MAIN();
