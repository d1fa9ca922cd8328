// How fast oneDNN multiplies at the model's own shapes: the rate our kernels are compared with. A peer for
// measuring, never linked into the product.
//
// out[M, N] = activations[M, K] * weights[K, N], weights packed ahead in the layout oneDNN asks for. Each
// thread runs a single-threaded primitive on its own columns of N, as servoflow's pool does. The output is
// reused from call to call.
#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <oneapi/dnnl/dnnl.hpp>
#include <string>
#include <thread>
#include <vector>

extern "C" void omp_set_num_threads(int threads);  // as in omp.h, which not every compiler brings

namespace {

using dnnl::memory;
using Clock = std::chrono::steady_clock;

struct Size {
  int m, n, k;
};
// Prefix gate and up, prefix down, expert gate and up, vision fc1 and fc2.
constexpr Size kSizes[] = {
    {712, 32768, 2048}, {712, 2048, 16384}, {50, 8192, 1024}, {512, 4304, 1152}, {512, 1152, 4304}};

void fill(memory& block) {
  auto* bytes = static_cast<unsigned char*>(block.get_data_handle());
  const std::size_t size = block.get_desc().get_size();
  // Both BF16 and FP32 read this as small numbers near 0.01: no denormals, no infinities.
  for (std::size_t i = 0; i < size; ++i) bytes[i] = i % 2 == 0 ? static_cast<unsigned char>(i % 251) : 0x3c;
}

// One thread's share of the columns.
struct Panel {
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  dnnl::matmul matmul;
  memory activations, weights, out;

  Panel(Size s, memory::data_type type) {
    const memory::desc a({s.m, s.k}, type, memory::format_tag::ab),
        any({s.k, s.n}, type, memory::format_tag::any);
    const memory::desc plain({s.k, s.n}, type, memory::format_tag::ab),
        o({s.m, s.n}, type, memory::format_tag::ab);
    const dnnl::matmul::primitive_desc description(dnnl::matmul::desc(a, any, o), engine);
    matmul = dnnl::matmul(description);
    activations = memory(a, engine);
    out = memory(o, engine);
    weights = memory(description.weights_desc(), engine);
    memory unpacked(plain, engine);
    fill(activations);
    fill(unpacked);
    dnnl::reorder(unpacked, weights).execute(stream, unpacked, weights);
    stream.wait();
  }
  void run() {
    matmul.execute(stream, {{DNNL_ARG_SRC, activations}, {DNNL_ARG_WEIGHTS, weights}, {DNNL_ARG_DST, out}});
    stream.wait();
  }
};

// Seconds of each repeat, from the moment all threads start to the moment the last one is done.
std::vector<double> measure(Size size, memory::data_type type, int threads, int repeats) {
  std::vector<double> seconds;
  Clock::time_point start;
  bool begun = false;
  auto tick = [&]() noexcept {  // runs once per round of the barrier, while every thread waits
    const auto now = Clock::now();
    if (begun) seconds.push_back(std::chrono::duration<double>(now - start).count());
    begun = true;
    start = now;
  };
  std::barrier barrier(threads, tick);
  auto work = [&](int thread) {
    omp_set_num_threads(1);
    Size share = size;
    share.n = size.n * (thread + 1) / threads - size.n * thread / threads;
    Panel panel(share, type);
    panel.run();
    for (int i = 0; i <= repeats; ++i) {
      barrier.arrive_and_wait();
      if (i < repeats) panel.run();
    }
  };
  std::vector<std::thread> pool;
  for (int thread = 0; thread < threads; ++thread) pool.emplace_back(work, thread);
  for (std::thread& thread : pool) thread.join();
  return seconds;
}

}  // namespace

int main(int argc, char** argv) {
  const int repeats = argc > 1 ? std::atoi(argv[1]) : 15;
  if (repeats < 1) {
    std::fprintf(stderr, "usage: gemm_onednn [repeats]\n");
    return 2;
  }
  const dnnl_version_t* version = dnnl_version();
  std::printf("{\"onednn\": \"%d.%d.%d\", \"results\": [", version->major, version->minor, version->patch);
  const char* separator = "";
  for (const Size& size : kSizes) {
    for (const auto& [name, type] :
         {std::pair{"bf16", memory::data_type::bf16}, std::pair{"fp32", memory::data_type::f32}}) {
      for (int threads : {1, 2}) {
        std::vector<double> seconds = measure(size, type, threads, repeats);
        const double best = *std::min_element(seconds.begin(), seconds.end());
        std::nth_element(seconds.begin(), seconds.begin() + seconds.size() / 2, seconds.end());
        const double work = 2.0 * size.m * size.n * size.k * 1e-9;
        std::printf(
            "%s\n {\"m\": %d, \"n\": %d, \"k\": %d, \"type\": \"%s\", \"threads\": %d, \"gflops_best\": "
            "%.1f, ",
            separator, size.m, size.n, size.k, name, threads, work / best);
        std::printf("\"gflops_median\": %.1f, \"repeats\": %d}", work / seconds[seconds.size() / 2], repeats);
        std::fflush(stdout);
        separator = ",";
      }
    }
  }
  std::printf("\n]}\n");
  return 0;
}
