// What a GPU's memory, launches, barriers and copies cost.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <vector>

#include "core/status_macros.h"
#include "ops/cuda/cublaslt.h"
#include "ops/cuda/device_code.cuh"
#include "ops/cuda/kernels.h"
#include "ops/cuda/launch.h"
#include "ops/device_probe.h"

namespace servoflow::ops::cuda {
namespace {

using Clock = std::chrono::steady_clock;
constexpr int kStreamThreads = 1024, kUnroll = 8;
constexpr double kLeastSample = 300;  // microseconds; shorter passes are repeated within a sample
constexpr std::size_t kWorkspace = std::size_t{64} << 20;

Status cuda_error(cudaError_t error, const char* what) {
  cudaGetLastError();
  return Status::runtime(std::string("cuda: ") + what + ": " + cudaGetErrorString(error));
}

#define SF_CUDA_MUST(call, what)                                                                         \
  do {                                                                                                   \
    if (const cudaError_t sf_error = (call); sf_error != cudaSuccess) return cuda_error(sf_error, what); \
  } while (false)

// Past the first-level cache, and never left out or moved by the compiler.
__device__ __forceinline__ uint4 load_far(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
__device__ __forceinline__ void store_far(uint4* p, const uint4& v) {
  asm volatile("st.global.cg.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// `units` of 16 bytes are read, or written, or read and written `units` further on.
template <Traffic kTraffic>
__global__ void __launch_bounds__(kStreamThreads)
    stream_kernel(uint4* data, std::size_t units, int passes, unsigned* never) {
  const std::size_t stride = static_cast<std::size_t>(gridDim.x) * kStreamThreads;
  const std::size_t first = static_cast<std::size_t>(blockIdx.x) * kStreamThreads + threadIdx.x;
  uint4 acc = make_uint4(threadIdx.x, 1, 2, 3);
  for (int pass = 0; pass < passes; ++pass) {
    for (std::size_t at = first; at < units; at += kUnroll * stride) {
      uint4 v[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const std::size_t here = at + static_cast<std::size_t>(i) * stride;
        if (kTraffic != Traffic::kWrite && here < units) v[i] = load_far(data + here);
      }
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const std::size_t here = at + static_cast<std::size_t>(i) * stride;
        if (here >= units) break;
        if constexpr (kTraffic == Traffic::kRead) {
          acc.x ^= v[i].x;
          acc.y ^= v[i].y;
          acc.z ^= v[i].z;
          acc.w ^= v[i].w;
        } else if constexpr (kTraffic == Traffic::kCopy) {
          store_far(data + units + here, v[i]);
        } else {
          store_far(data + here, acc);
        }
      }
    }
  }
  if (kTraffic == Traffic::kRead && (acc.x ^ acc.y ^ acc.z ^ acc.w) == 0x5eed5eedu) *never = acc.x;
}

__global__ void empty_kernel() {
  wait_for_inputs();
  release_successor();
}

__global__ void barrier_kernel(unsigned* counter, int rounds) {
  for (int round = 1; round <= rounds; ++round) {
    __syncthreads();
    if (threadIdx.x == 0) {
      const unsigned wanted = static_cast<unsigned>(round) * gridDim.x;
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
      unsigned seen = 0;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
      } while (seen < wanted);
    }
    __syncthreads();
  }
}

// Random bytes; `mask` clears bits that would make numbers too large or none at all.
__global__ void random_bytes_kernel(std::uint32_t* words, std::size_t count, std::uint32_t seed,
                                    std::uint32_t mask) {
  const std::size_t stride = static_cast<std::size_t>(gridDim.x) * blockDim.x;
  for (std::size_t i = static_cast<std::size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    std::uint32_t h = static_cast<std::uint32_t>(i) * 0x9E3779B9u + seed;
    h = (h ^ h >> 16) * 0x85EBCA6Bu;
    h = (h ^ h >> 13) * 0xC2B2AE35u;
    words[i] = (h ^ h >> 16) & mask;
  }
}

// Memory of one measurement.
struct DeviceBlock {
  void* data = nullptr;
  DeviceBlock() = default;
  DeviceBlock(DeviceBlock&& other) noexcept : data(std::exchange(other.data, nullptr)) {}
  ~DeviceBlock() { cudaFree(data); }
  static Result<DeviceBlock> make(std::size_t bytes) {
    DeviceBlock out;
    SF_CUDA_MUST(cudaMalloc(&out.data, bytes), (std::to_string(bytes >> 20) + " MiB").c_str());
    return std::move(out);
  }
};

struct Graph {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  ~Graph() {
    if (executable != nullptr) cudaGraphExecDestroy(executable);
    if (graph != nullptr) cudaGraphDestroy(graph);
  }
};

class CudaProbe : public DeviceProbe {
 public:
  static Result<std::unique_ptr<DeviceProbe>> create(int ordinal) {
    int devices = 0;
    if (const cudaError_t e = cudaGetDeviceCount(&devices); e != cudaSuccess || ordinal >= devices)
      return Status::runtime(
          "--device cuda:" + std::to_string(ordinal) + ": this machine has " +
          std::to_string(e == cudaSuccess ? devices : 0) + " usable GPUs" +
          (e == cudaSuccess ? std::string() : std::string(" (") + cudaGetErrorString(e) + ")"));
    std::unique_ptr<CudaProbe> p(new CudaProbe);
    p->ordinal_ = ordinal;
    SF_CUDA_MUST(cudaSetDevice(ordinal), "cudaSetDevice");
    SF_CUDA_MUST(cudaGetDeviceProperties(&p->properties_, ordinal), "cudaGetDeviceProperties");
    if (const cudaError_t e = kernels_run_here(); e != cudaSuccess)
      return Status::runtime("--device cuda: this build has no code for " + std::string(p->properties_.name) +
                             ": " + cudaGetErrorString(e));
    p->stream_.early_start = p->properties_.major >= 9;
    SF_CUDA_MUST(cudaStreamCreateWithFlags(&p->stream_.stream, cudaStreamNonBlocking), "cudaStreamCreate");
    for (cudaEvent_t& event : p->events_) SF_CUDA_MUST(cudaEventCreate(&event), "cudaEventCreate");
    return std::unique_ptr<DeviceProbe>(std::move(p));
  }

  ~CudaProbe() override {
    cudaSetDevice(ordinal_);
    if (stream_.stream != nullptr) cudaStreamSynchronize(stream_.stream);
    for (cudaEvent_t event : events_)
      if (event != nullptr) cudaEventDestroy(event);
    if (stream_.stream != nullptr) cudaStreamDestroy(stream_.stream);
  }

  GpuIdentity identity() const override {
    cudaSetDevice(ordinal_);
    const cudaDeviceProp& p = properties_;
    GpuIdentity out{.name = p.name,
                    .capability_major = p.major,
                    .capability_minor = p.minor,
                    .multiprocessors = p.multiProcessorCount,
                    .l2_bytes = static_cast<std::uint64_t>(p.l2CacheSize),
                    .memory_bytes = p.totalGlobalMem,
                    .shared_bytes = p.sharedMemPerMultiprocessor,
                    .memory_bus_bits = p.memoryBusWidth,
                    .integrated = p.integrated != 0,
                    .ecc = p.ECCEnabled != 0};
    char bus[32] = {};
    if (cudaDeviceGetPCIBusId(bus, sizeof(bus), ordinal_) == cudaSuccess) out.bus = bus;
    std::size_t available = 0, total = 0;
    if (cudaMemGetInfo(&available, &total) == cudaSuccess) out.free_bytes = available;
    cudaDriverGetVersion(&out.driver);
    cudaRuntimeGetVersion(&out.runtime);
    return out;
  }

  Result<std::vector<double>> stream(Traffic traffic, std::uint64_t bytes, int processors,
                                     int samples) override {
    cudaSetDevice(ordinal_);
    const std::uint64_t half = traffic == Traffic::kCopy ? 2 : 1;
    const std::size_t units = bytes / half / sizeof(uint4);
    if (units == 0 || processors < 1) return Status::invalid("probe: nothing to stream through");
    SF_ASSIGN_OR_RETURN(const DeviceBlock block, DeviceBlock::make(units * half * sizeof(uint4)));
    SF_ASSIGN_OR_RETURN(const DeviceBlock sink, DeviceBlock::make(sizeof(unsigned)));
    SF_RETURN_IF_ERROR(fill(block.data, units * half * sizeof(uint4), 1, ~0u));
    auto* kernel = traffic == Traffic::kRead   ? stream_kernel<Traffic::kRead>
                   : traffic == Traffic::kCopy ? stream_kernel<Traffic::kCopy>
                                               : stream_kernel<Traffic::kWrite>;
    const auto pass = [&](int passes) {
      kernel<<<static_cast<unsigned>(processors), kStreamThreads, 0, stream_.stream>>>(
          static_cast<uint4*>(block.data), units, passes, static_cast<unsigned*>(sink.data));
      return cudaGetLastError();
    };
    SF_RETURN_IF_ERROR(
        between_events([&] { return pass(1); }).status());  // loads the kernel, fills the cache
    SF_ASSIGN_OR_RETURN(const double once, between_events([&] { return pass(1); }));
    const int passes = std::clamp(static_cast<int>(kLeastSample / std::max(once, 0.1)), 1, 2000);
    return many(samples, passes, [&] { return pass(passes); });
  }

  Result<std::vector<double>> launch(int samples) override {
    cudaSetDevice(ordinal_);
    return walls(samples, [&] {
      empty_kernel<<<1, 32, 0, stream_.stream>>>();
      return cudaGetLastError();
    });
  }

  Result<std::vector<double>> launch_in_a_row(int samples) override {
    cudaSetDevice(ordinal_);
    constexpr int kRow = 500;
    return many(samples, kRow, [&] {
      for (int i = 0; i < kRow; ++i) empty_kernel<<<1, 32, 0, stream_.stream>>>();
      return cudaGetLastError();
    });
  }

  Result<std::vector<double>> graph(int kernels, bool early_start, int samples) override {
    cudaSetDevice(ordinal_);
    if (early_start && !stream_.early_start)
      return Status::runtime("programmatic dependent launch needs compute capability 9.0");
    Graph g;
    Stream s = stream_;
    s.early_start = early_start;
    SF_RETURN_IF_ERROR(record(g, [&] {
      for (int i = 0; i < kernels; ++i) SF_CUDA_MUST(cuda::launch(s, dim3(1), 32, 0, empty_kernel), "launch");
      return Status();
    }));
    return walls(samples, [&] { return cudaGraphLaunch(g.executable, stream_.stream); });
  }

  Result<std::vector<double>> grid_barrier(int samples) override {
    cudaSetDevice(ordinal_);
    SF_ASSIGN_OR_RETURN(const DeviceBlock counter, DeviceBlock::make(sizeof(unsigned)));
    int rounds = 1000;
    auto* data = static_cast<unsigned*>(counter.data);
    void* arguments[] = {&data, &rounds};
    // Cooperative: all blocks are there at once, or the launch is refused.
    const auto body = [&] {
      return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(barrier_kernel),
                                         dim3(static_cast<unsigned>(properties_.multiProcessorCount)),
                                         dim3(128), arguments, 0, stream_.stream);
    };
    const auto clear = [&] { return cudaMemsetAsync(counter.data, 0, sizeof(unsigned), stream_.stream); };
    return many(samples, rounds, body, clear);
  }

  Result<std::vector<double>> transfer(bool to_device, bool pinned, std::uint64_t bytes,
                                       int samples) override {
    cudaSetDevice(ordinal_);
    SF_ASSIGN_OR_RETURN(const DeviceBlock block, DeviceBlock::make(bytes));
    std::vector<std::byte> pageable(pinned ? 0 : bytes, std::byte{1});
    struct Pinned {
      void* data = nullptr;
      ~Pinned() { cudaFreeHost(data); }
    } locked;
    if (pinned) {
      SF_CUDA_MUST(cudaMallocHost(&locked.data, bytes), "pinned memory");
      std::memset(locked.data, 1, bytes);
    }
    void* host = pinned ? locked.data : pageable.data();
    return walls(samples, [&] {
      return to_device ? cudaMemcpyAsync(block.data, host, bytes, cudaMemcpyHostToDevice, stream_.stream)
                       : cudaMemcpyAsync(host, block.data, bytes, cudaMemcpyDeviceToHost, stream_.stream);
    });
  }

  Result<std::string> open_library(const std::string& path) override {
    cudaSetDevice(ordinal_);
    SF_ASSIGN_OR_RETURN(library_, Cublaslt::open(path));
    return library_->name();
  }

  Result<std::vector<double>> library_product(ProductKind kind, int m, int n, int k, int copies,
                                              int samples) override {
    cudaSetDevice(ordinal_);
    if (library_ == nullptr) return Status::invalid("probe: no library was opened");
    const std::size_t size = kind == ProductKind::kBf16 ? 2 : 1,
                      out_size = kind == ProductKind::kInt8 ? 4 : 2;
    const auto rows = static_cast<std::size_t>(m), features = static_cast<std::size_t>(n),
               depth = static_cast<std::size_t>(k), count = static_cast<std::size_t>(copies);
    const std::size_t each = (features * depth * size + 255) / 256 * 256;
    SF_ASSIGN_OR_RETURN(const DeviceBlock x, DeviceBlock::make((rows * depth * size + 255) / 256 * 256));
    SF_ASSIGN_OR_RETURN(const DeviceBlock w, DeviceBlock::make(each * count));
    SF_ASSIGN_OR_RETURN(const DeviceBlock y, DeviceBlock::make(rows * features * out_size));
    SF_ASSIGN_OR_RETURN(const DeviceBlock workspace, DeviceBlock::make(kWorkspace));
    SF_RETURN_IF_ERROR(numbers(kind, x.data, rows * depth, 1));
    SF_RETURN_IF_ERROR(numbers(kind, w.data, each / size * count, 2));
    SF_ASSIGN_OR_RETURN(const std::unique_ptr<Cublaslt::Product> product,
                        library_->prepare(kind, m, n, k, workspace.data, kWorkspace));
    const int calls = std::max(20, copies);
    const auto all = [&]() -> Status {
      for (int i = 0; i < calls; ++i)
        SF_RETURN_IF_ERROR(product->enqueue(
            x.data, static_cast<const std::byte*>(w.data) + static_cast<std::size_t>(i % copies) * each,
            y.data, stream_.stream));
      return {};
    };
    SF_RETURN_IF_ERROR(all());  // once for real: recording must not load kernels
    SF_CUDA_MUST(cudaStreamSynchronize(stream_.stream), "cuBLASLt's product");
    Graph g;
    SF_RETURN_IF_ERROR(record(g, all));
    return many(samples, calls, [&] { return cudaGraphLaunch(g.executable, stream_.stream); });
  }

 private:
  CudaProbe() = default;

  Status fill(void* data, std::size_t bytes, std::uint32_t seed, std::uint32_t mask) {
    random_bytes_kernel<<<1024, 256, 0, stream_.stream>>>(static_cast<std::uint32_t*>(data), bytes / 4, seed,
                                                          mask);
    SF_CUDA_MUST(cudaGetLastError(), "random data");
    return {};
  }

  // BF16 in [-1, 1); any INT8; E4M3 without its top exponent bit: below 2, and never NaN.
  Status numbers(ProductKind kind, void* data, std::size_t count, std::uint32_t seed) {
    if (kind != ProductKind::kBf16)
      return fill(data, count / 4 * 4, seed, kind == ProductKind::kFp8 ? 0xbfbfbfbfu : ~0u);
    SF_CUDA_MUST(fill_sequence(stream_.stream, {.state = seed, .amp = 1}, 0, count, DType::kBF16, data),
                 "random data");
    return {};
  }

  template <typename Body>
  Status record(Graph& g, const Body& body) {
    SF_CUDA_MUST(cudaStreamBeginCapture(stream_.stream, cudaStreamCaptureModeThreadLocal), "recording");
    Status status = body();
    const cudaError_t ended = cudaStreamEndCapture(stream_.stream, &g.graph);
    SF_RETURN_IF_ERROR(status);
    SF_CUDA_MUST(ended, "recording");
    SF_CUDA_MUST(cudaGraphInstantiate(&g.executable, g.graph, 0), "instantiating a graph");
    SF_CUDA_MUST(cudaGraphUpload(g.executable, stream_.stream), "uploading a graph");
    SF_CUDA_MUST(cudaStreamSynchronize(stream_.stream), "uploading a graph");
    return {};
  }

  // Microseconds by the device's clock.
  template <typename Body>
  Result<double> between_events(const Body& body) {
    SF_CUDA_MUST(cudaEventRecord(events_[0], stream_.stream), "event");
    SF_CUDA_MUST(body(), "probe");
    SF_CUDA_MUST(cudaEventRecord(events_[1], stream_.stream), "event");
    SF_CUDA_MUST(cudaStreamSynchronize(stream_.stream), "probe");
    float ms = 0;
    SF_CUDA_MUST(cudaEventElapsedTime(&ms, events_[0], events_[1]), "event");
    return static_cast<double>(ms) * 1e3;
  }

  // Samples of `body`, which does `each` things; the first run warms up.
  template <typename Body, typename Before>
  Result<std::vector<double>> many(int samples, int each, const Body& body, const Before& before) {
    std::vector<double> out;
    for (int i = 0; i <= samples; ++i) {
      SF_CUDA_MUST(before(), "probe");
      SF_ASSIGN_OR_RETURN(const double us, between_events(body));
      if (i > 0) out.push_back(us / each);
    }
    return out;
  }
  template <typename Body>
  Result<std::vector<double>> many(int samples, int each, const Body& body) {
    return many(samples, each, body, [] { return cudaSuccess; });
  }

  // The same by the wall's clock, from the call to its end.
  template <typename Body>
  Result<std::vector<double>> walls(int samples, const Body& body) {
    std::vector<double> out;
    SF_CUDA_MUST(cudaStreamSynchronize(stream_.stream), "probe");
    for (int i = 0; i <= samples; ++i) {
      const Clock::time_point begin = Clock::now();
      SF_CUDA_MUST(body(), "probe");
      SF_CUDA_MUST(cudaStreamSynchronize(stream_.stream), "probe");
      if (i > 0) out.push_back(std::chrono::duration<double, std::micro>(Clock::now() - begin).count());
    }
    return out;
  }

  int ordinal_ = 0;
  cudaDeviceProp properties_{};
  Stream stream_;
  cudaEvent_t events_[2] = {};
  std::unique_ptr<Cublaslt> library_;
};

}  // namespace
}  // namespace servoflow::ops::cuda

namespace servoflow::ops {

Result<std::unique_ptr<DeviceProbe>> make_cuda_probe(int ordinal) { return cuda::CudaProbe::create(ordinal); }

}  // namespace servoflow::ops
