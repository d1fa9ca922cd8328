// GFLOP/s of the CPU backend's products at the model's own shapes: --benchmark_filter=bf16/712,
// =int8-w8a8/712
#include <benchmark/benchmark.h>

#include <random>
#include <vector>

#include "core/bf16.h"
#include "ops/backend.h"

namespace servoflow::ops {
namespace {

// `format`: empty, or what the weight is rounded to.
void run(benchmark::State& state, const std::string& precision, bool geglu, const std::string& format = "") {
  const int m = static_cast<int>(state.range(0)), n = static_cast<int>(state.range(1)),
            k = static_cast<int>(state.range(2));
  auto backend = make_cpu_backend(precision, static_cast<int>(state.range(3)));
  Backend& b = **backend;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<bf16> values(static_cast<std::size_t>(n) * static_cast<std::size_t>(k));
  for (bf16& v : values) v = to_bf16(normal(random));
  const auto half = static_cast<std::size_t>(geglu ? n / 2 : n);
  std::vector<HostMatrix> parts;
  for (std::size_t first = 0; first < static_cast<std::size_t>(n); first += half)
    parts.push_back(
        {DType::kBF16, static_cast<int>(half), k,
         std::as_bytes(std::span(values))
             .subspan(first * static_cast<std::size_t>(k) * 2, half * static_cast<std::size_t>(k) * 2),
         "w"});
  std::vector<quant::QuantizedMatrix> rounded(parts.size());
  for (std::size_t i = 0; i < parts.size() && !format.empty(); ++i) {
    std::vector<float> floats(half * static_cast<std::size_t>(k));
    for (std::size_t j = 0; j < floats.size(); ++j) floats[j] = to_float(values[i * floats.size() + j]);
    rounded[i] = *quant::quantize(floats, parts[i].rows, k, *quant::parse_format(format));
    if (rounded[i].format.input.needs_calibration()) rounded[i].input_scale = 0.01f;
    parts[i].quantized = &rounded[i];
  }
  auto weight = b.pack(parts, {.mode = geglu ? PackMode::kInterleave : PackMode::kConcat});
  const DType dtype = b.activation_dtype();
  Matrix x{.dtype = dtype, .rows = m, .cols = k, .pitch = b.pitch(k, dtype)};
  Matrix y{.dtype = dtype, .rows = m, .cols = geglu ? n / 2 : n};
  y.pitch = b.pitch(y.cols, dtype);
  x.data = *b.allocate(static_cast<std::uint64_t>(x.rows * x.pitch) * dtype_size(dtype));
  y.data = *b.allocate(static_cast<std::uint64_t>(y.rows * y.pitch) * dtype_size(dtype));
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < k; ++j) {
      if (dtype == DType::kBF16) static_cast<bf16*>(x.data)[i * x.pitch + j] = to_bf16(normal(random));
      if (dtype == DType::kF32) static_cast<float*>(x.data)[i * x.pitch + j] = normal(random);
    }
  for (auto _ : state) b.matmul({.x = x, .w = &*weight, .y = y, .rows = {m}, .epilogue = {.geglu = geglu}});
  if (!b.finish().ok()) state.SkipWithError("matmul failed");
  state.counters["GFLOP/s"] = benchmark::Counter(
      2.0 * m * n * k * static_cast<double>(state.iterations()) * 1e-9, benchmark::Counter::kIsRate);
}

void shapes(benchmark::internal::Benchmark* b) {
  for (const int threads : {1, 2}) {
    b->Args({712, 2560, 2048, threads});
    b->Args({712, 32768, 2048, threads});
    b->Args({712, 2048, 16384, threads});
    b->Args({512, 3456, 1152, threads});
    b->Args({512, 1152, 4304, threads});
    b->Args({50, 8192, 1024, threads});
    b->Args({50, 1024, 4096, threads});
  }
  b->UseRealTime()->Unit(benchmark::kMillisecond);
}

BENCHMARK_CAPTURE(run, bf16, "bf16", false)->Apply(shapes);
BENCHMARK_CAPTURE(run, int8 - w8a8, "bf16", false, "int8-w8a8")->Apply(shapes);
BENCHMARK_CAPTURE(run, int8 - w8a16, "bf16", false, "int8-w8a16")->Apply(shapes);
BENCHMARK_CAPTURE(run, fp8 - w8a8, "bf16", false, "fp8-w8a8")->Apply(shapes);
BENCHMARK_CAPTURE(run, int4 - g128 - w4a16, "bf16", false, "int4-g128-w4a16")->Apply(shapes);
BENCHMARK_CAPTURE(run, nvfp4 - w4a16, "bf16", false, "nvfp4-w4a16")->Apply(shapes);
BENCHMARK_CAPTURE(run, nvfp4 - w4a8, "bf16", false, "nvfp4-w4a8")->Apply(shapes);
BENCHMARK_CAPTURE(run, nvfp4 - w4a4, "bf16", false, "nvfp4-w4a4")->Apply(shapes);
BENCHMARK_CAPTURE(run, bf16_geglu, "bf16", true)
    ->Args({712, 32768, 2048, 2})
    ->Args({50, 8192, 1024, 2})
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(run, fp32, "fp32", false)
    ->Args({712, 32768, 2048, 2})
    ->Args({50, 8192, 1024, 2})
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace servoflow::ops

BENCHMARK_MAIN();
