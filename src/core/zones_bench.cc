// What a trace zone costs, off and on.
#include <benchmark/benchmark.h>

#include "core/zones.h"

namespace servoflow {
namespace {

void zone(benchmark::State& state) {
  zones::enable(state.range(0) != 0);
  for (auto _ : state) {
    const zones::Zone z("bench/zone");
    benchmark::ClobberMemory();
  }
  zones::enable(false);
}
BENCHMARK(zone)->ArgName("on")->Arg(0)->Arg(1)->Iterations(200000);

}  // namespace
}  // namespace servoflow

BENCHMARK_MAIN();
