// Memory, packing, copies and recording; what operations become is in blocks.cu.
#include <algorithm>
#include <array>
#include <cstring>

#include "core/bf16.h"
#include "core/status_macros.h"
#include "ops/cuda/cuda_backend.cuh"
#include "ops/cuda/paths.h"
#include "ops/host_rows.h"

namespace servoflow::ops::cuda {
namespace {

constexpr std::uint64_t kArenaBlock = std::uint64_t{64} << 20;
constexpr std::uint64_t kStaging = std::uint64_t{32} << 20;
constexpr int kLateRecordings = 32;  // kept at once of those that keep_recordings() came too early for

std::uint64_t round_up(std::uint64_t n, std::uint64_t to) { return (n + to - 1) / to * to; }

Status cuda_error(cudaError_t error, const std::string& what) {
  return Status::runtime("cuda: " + what + ": " + cudaGetErrorString(error));
}

}  // namespace

Result<std::unique_ptr<CudaBackend>> CudaBackend::create(const std::string& precision, int ordinal,
                                                         CudaPath path) {
  int devices = 0;
  if (const cudaError_t e = cudaGetDeviceCount(&devices); e != cudaSuccess || devices == 0)
    return Status::runtime(
        std::string("--device cuda: no usable GPU: ") +
        (e == cudaErrorInsufficientDriver
             ? "no NVIDIA driver, or one too old for this build; use --device cpu (the driver says: "
             : "(") +
        (e != cudaSuccess ? cudaGetErrorString(e) : "the driver lists none") + ")");
  if (ordinal >= devices)
    return Status::runtime("--device cuda:" + std::to_string(ordinal) + ": this machine has " +
                           std::to_string(devices) + " GPU(s), from cuda:0");
  const bool portable = path == CudaPath::kPortable;
  std::unique_ptr<CudaBackend> b(new CudaBackend);
  b->ordinal_ = ordinal;
  b->half_ = precision == "bf16";
  const auto must = [](cudaError_t e, const char* what) {
    return e == cudaSuccess ? Status() : cuda_error(e, what);
  };
  SF_RETURN_IF_ERROR(must(cudaSetDevice(ordinal), "cudaSetDevice"));
  cudaDeviceProp p{};
  SF_RETURN_IF_ERROR(must(cudaGetDeviceProperties(&p, ordinal), "cudaGetDeviceProperties"));
  if (const cudaError_t e = kernels_run_here(); e != cudaSuccess)
    return Status::runtime("--device cuda: this build has no code for " + std::string(p.name) + " (sm_" +
                           std::to_string(p.major) + std::to_string(p.minor) + "): " + cudaGetErrorString(e));
  b->wgmma_ = b->half_ && !portable && p.major == 9 && p.minor == 0 && wgmma_is_built();
  b->clusters_ = b->half_ && !portable && p.major >= 9;
  b->name_ = "cuda/sm_" + std::to_string(p.major) + std::to_string(p.minor) + (b->wgmma_ ? "a" : "") +
             (b->half_ ? "_bf16" : "");
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
  b->hardware_ = std::string(p.name) + ", CUDA driver " + version(driver) + ", runtime " + version(runtime);
  b->stream_.early_start = !portable && p.major >= 9;
  SF_RETURN_IF_ERROR(
      must(cudaStreamCreateWithFlags(&b->stream_.stream, cudaStreamNonBlocking), "cudaStreamCreate"));
  for (cudaEvent_t& event : b->marks_) SF_RETURN_IF_ERROR(must(cudaEventCreate(&event), "cudaEventCreate"));
  b->lane_streams_[0] = b->stream_.stream;
  SF_RETURN_IF_ERROR(must(cudaEventCreateWithFlags(&b->forked_, cudaEventDisableTiming), "cudaEventCreate"));
  for (int i = 1; i < kMostLanes; ++i) {
    SF_RETURN_IF_ERROR(
        must(cudaStreamCreateWithFlags(&b->lane_streams_[i], cudaStreamNonBlocking), "cudaStreamCreate"));
    SF_RETURN_IF_ERROR(
        must(cudaEventCreateWithFlags(&b->lane_ended_[i], cudaEventDisableTiming), "cudaEventCreate"));
  }
  SF_RETURN_IF_ERROR(must(cudaMalloc(&b->bad_, sizeof(int)), "cudaMalloc"));
  if (b->wgmma_ && path == CudaPath::kBest && expert_loop_fits()) {
    SF_ASSIGN_OR_RETURN(void* counters, b->allocate(kLoopCounterWords * sizeof(unsigned)));
    SF_ASSIGN_OR_RETURN(void* stall, b->allocate_staging(sizeof(LoopStall)));
    b->loop_counters_ = static_cast<unsigned*>(counters);
    b->loop_stall_ = static_cast<LoopStall*>(stall);
    b->loop_ = true;
  }
  return std::move(b);
}

CudaBackend::~CudaBackend() {
  select();
  if (stream_.stream != nullptr) cudaStreamSynchronize(stream_.stream);
  for (const auto& [key, recording] : recordings_) cudaGraphExecDestroy(recording.graph);
  for (cudaEvent_t event : marks_)
    if (event != nullptr) cudaEventDestroy(event);
  for (cudaEvent_t event : staged_)
    if (event != nullptr) cudaEventDestroy(event);
  if (forked_ != nullptr) cudaEventDestroy(forked_);
  for (int i = 1; i < kMostLanes; ++i) {
    if (lane_ended_[i] != nullptr) cudaEventDestroy(lane_ended_[i]);
    if (lane_streams_[i] != nullptr) cudaStreamDestroy(lane_streams_[i]);
  }
  for (void* block : blocks_) cudaFree(block);
  for (void* block : landing_) cudaFree(block);
  cudaFree(bad_);
  for (void* block : pinned_) cudaFreeHost(block);
  for (void* block : staging_) cudaFreeHost(block);
  if (stream_.stream != nullptr) cudaStreamDestroy(stream_.stream);
}

void CudaBackend::select() const { cudaSetDevice(ordinal_); }

bool CudaBackend::ok(cudaError_t error, const char* what) {
  if (error != cudaSuccess) fail(explained(error, what));
  return error == cudaSuccess;
}

// An error of this call or of what ran before it; the loop says itself what stopped it.
Status CudaBackend::explained(cudaError_t error, const char* what) const {
  if (loop_stall_ == nullptr || loop_stall_->wanted == 0) return cuda_error(error, what);
  return cuda_error(error,
                    "the denoise loop stopped itself: " + describe(*loop_stall_, loop_launch_) +
                        ". Its blocks have to run on the GPU all at once, and some did not come for two "
                        "seconds. Is another process using this GPU (MPS)? Load the policy again, with the "
                        "GPU to itself");
}

std::int64_t CudaBackend::pitch(int cols, DType) const {
  return static_cast<std::int64_t>(round_up(static_cast<std::uint64_t>(cols), 16));
}

std::uint64_t CudaBackend::query_bytes(int rows, int heads, int head_dim) const {
  return static_cast<std::uint64_t>(rows) * static_cast<std::uint64_t>(heads) *
         static_cast<std::uint64_t>(head_dim) * dtype_size(activation_dtype());
}

std::uint64_t CudaBackend::cache_bytes(const KvCache& c) const {
  return 2 * static_cast<std::uint64_t>(c.layers) * static_cast<std::uint64_t>(c.slots) *
         static_cast<std::uint64_t>(c.kv_heads) * static_cast<std::uint64_t>(c.keys) *
         static_cast<std::uint64_t>(c.head_dim) * dtype_size(c.dtype);
}

// Many weights share a block, and what is left of each is offered to all that come later: weights are of a
// few sizes, so that little stays empty. Every address is a multiple of 256.
Result<void*> CudaBackend::allocate(std::uint64_t bytes) {
  select();
  bytes = round_up(std::max<std::uint64_t>(bytes, 1), 256);
  auto room = std::find_if(rooms_.begin(), rooms_.end(), [&](const Room& r) { return r.left >= bytes; });
  if (room == rooms_.end()) {
    const std::uint64_t size = std::max(bytes, kArenaBlock);
    void* block = nullptr;
    if (const cudaError_t e = cudaMalloc(&block, size); e != cudaSuccess) {
      cudaGetLastError();  // not sticky: the caller may go on with less
      std::size_t available = 0, total = 0;
      cudaMemGetInfo(&available, &total);
      return Status::runtime("cuda: out of memory: " + std::to_string(size >> 20) + " MiB wanted, " +
                             std::to_string(available >> 20) + " of " + std::to_string(total >> 20) +
                             " MiB free on " + device());
    }
    blocks_.push_back(block);
    cudaError_t e = cudaMemsetAsync(block, 0, size, stream_.stream);
    if (e == cudaSuccess && stream_.lanes > 1)
      e = cudaStreamSynchronize(stream_.stream);  // other lanes may be given some of it
    if (e != cudaSuccess) return cuda_error(e, "cudaMemset");
    room = rooms_.insert(rooms_.end(), {static_cast<char*>(block), size});
  }
  void* out = room->next;
  room->next += bytes;
  room->left -= bytes;
  return out;
}

Result<void*> CudaBackend::allocate_staging(std::uint64_t bytes) {
  select();
  void* block = nullptr;
  bytes = std::max<std::uint64_t>(bytes, 1);
  if (const cudaError_t e = cudaMallocHost(&block, bytes); e != cudaSuccess)
    return cuda_error(e, std::to_string(bytes) + " bytes of pinned memory");
  std::memset(block, 0, bytes);
  pinned_.push_back(block);
  return block;
}

Result<Weight> CudaBackend::pack(std::span<const HostMatrix> parts, const PackOptions& options) {
  SF_RETURN_IF_ERROR(check_parts(parts, options));
  if (parts[0].quantized != nullptr) return refuse_format(parts[0].quantized->format, parts[0].name);
  select();
  WeightLayout w{.k = parts[0].cols};
  bool stored_bf16 = true;
  for (const HostMatrix& part : parts) {
    stored_bf16 = stored_bf16 && part.dtype == DType::kBF16;
    w.n += part.rows;
  }
  w.tensor_core = half_ && !options.keep_float32;
  w.f32 = !stored_bf16 && !w.tensor_core;
  int rows = (w.n + 15) / 16 * 16;
  if (options.mode == PackMode::kInterleave) {
    w.order = RowOrder::kGated;
    rows = (w.n / 2 + 7) / 8 * 16;
  } else if (options.mode == PackMode::kHeads && options.head_dim % 2 == 0) {
    w.order = RowOrder::kRotated;
    w.head_dim = options.head_dim;
    w.rotated = parts[0].rows + parts[1].rows;
  }
  w.padded_n = static_cast<int>(round_up(static_cast<std::uint64_t>(rows), 128));
  w.tiled = options.few_rows && w.tensor_core && clusters_;
  w.pitch = static_cast<std::int64_t>(round_up(static_cast<std::uint64_t>(w.k), w.tiled ? 128 : 64));
  Weight out{.n = w.n,
             .k = w.k,
             .stored = w.f32 ? DType::kF32 : DType::kBF16,
             .paired = options.mode == PackMode::kInterleave,
             .bytes = static_cast<std::uint64_t>(w.padded_n) * static_cast<std::uint64_t>(w.pitch) *
                      (w.f32 ? 4 : 2)};
  SF_ASSIGN_OR_RETURN(void* data, allocate(out.bytes));
  out.data = data;
  layouts_[data] = w;

  for (int i = 0; i < 2 && staging_[i] == nullptr; ++i)
    if (!ok(cudaMallocHost(&staging_[i], kStaging), "pinned memory") ||
        !ok(cudaMalloc(&landing_[i], kStaging), "cudaMalloc") || !ok(cudaEventCreate(&staged_[i]), "event"))
      return finish();
  ok(cudaMemsetAsync(bad_, 0, sizeof(int), stream_.stream), "cudaMemset");
  int first = 0, turn = 0;
  for (const HostMatrix& part : parts) {
    const std::uint64_t row_bytes = static_cast<std::uint64_t>(part.cols) * dtype_size(part.dtype);
    if (row_bytes > kStaging)
      return Status::invalid(part.name + ": rows of " + std::to_string(row_bytes) + " bytes");
    const int at_once = static_cast<int>(kStaging / row_bytes);
    for (int row = 0; row < part.rows; row += at_once, turn ^= 1) {
      const int count = std::min(at_once, part.rows - row);
      const std::uint64_t bytes = static_cast<std::uint64_t>(count) * row_bytes;
      if (part.sequence) {
        const auto cols = static_cast<std::uint64_t>(part.cols);
        ok(fill_sequence(stream_.stream, *part.sequence, static_cast<std::uint64_t>(row) * cols,
                         static_cast<std::uint64_t>(count) * cols, part.dtype, landing_[turn]),
           "generating");
        ok(pack_rows(stream_.stream, landing_[turn], part.dtype, count, first + row, w, data, bad_),
           "packing");
        continue;
      }
      if (!ok(cudaEventSynchronize(staged_[turn]), "copying weights")) return finish();
      std::memcpy(staging_[turn], part.bytes.data() + static_cast<std::uint64_t>(row) * row_bytes, bytes);
      ok(cudaMemcpyAsync(landing_[turn], staging_[turn], bytes, cudaMemcpyHostToDevice, stream_.stream),
         "copy");
      ok(pack_rows(stream_.stream, landing_[turn], part.dtype, count, first + row, w, data, bad_), "packing");
      ok(cudaEventRecord(staged_[turn], stream_.stream), "event");
    }
    first += part.rows;
  }
  int bad = 0;
  download(&bad, bad_, sizeof(int));
  if (failed()) return finish();
  if (bad != 0) {  // find the culprit by name, slowly
    std::vector<float> values(static_cast<std::size_t>(w.k));
    for (const HostMatrix& part : parts)
      for (int r = 0; r < part.rows && !part.sequence; ++r)
        SF_RETURN_IF_ERROR(read_row(part, r, values.data()));
    return Status::invalid(parts[0].name + ": a value overflows bf16");
  }
  return out;
}

void CudaBackend::generate(void* device, DType dtype, std::uint64_t count, const Sequence& sequence) {
  if (failed() || count == 0) return;
  select();
  ok(fill_sequence(stream_.stream, sequence, 0, count, dtype, device), "generating");
}

void CudaBackend::upload(void* device, const void* host, std::size_t bytes) {
  if (failed() || bytes == 0) return;
  select();
  ok(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream_.stream), "upload");
}

void CudaBackend::download(void* host, const void* device, std::size_t bytes) {
  if (failed() || bytes == 0) return;
  select();
  if (ok(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream_.stream), "download") &&
      !recording_)
    ok(cudaStreamSynchronize(stream_.stream), "download");
}

void CudaBackend::copy(void* to, const void* from, std::size_t bytes) {
  if (failed() || bytes == 0) return;
  select();
  ok(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_.stream), "copy");
}

std::optional<DeviceState> CudaBackend::device_state() const {
  select();
  DeviceState state;
  char bus[32] = {};
  std::size_t available = 0, total = 0;
  if (cudaDeviceGetPCIBusId(bus, sizeof(bus), ordinal_) != cudaSuccess ||
      cudaMemGetInfo(&available, &total) != cudaSuccess)
    return {};
  return DeviceState{bus, total, available};
}

// The denoise loop stays on the GPU as one launch whose blocks wait for each other. Two of them at once could
// each hold half of it for ever, so the policies of a process take turns on a device.
void CudaBackend::take_turn() {
  static std::array<std::mutex, 64> gates;
  if (loop_ && !turn_.owns_lock())
    turn_ = std::unique_lock(gates[static_cast<std::size_t>(ordinal_) % gates.size()]);
}

Status CudaBackend::wait() {
  select();
  const std::unique_lock<std::mutex> turn = std::move(turn_);  // ends with this wait
  const cudaError_t e = cudaStreamSynchronize(stream_.stream);
  return e == cudaSuccess ? Status() : explained(e, "kernels");
}

void CudaBackend::replay(std::uint64_t key, const std::function<void()>& feed,
                         const std::function<void()>& body) {
  if (failed()) return;
  select();
  feed();
  ++replays_;
  const auto found = recordings_.find(key);
  if (found == recordings_.end()) {
    // Run once for real: it loads the kernels and sizes the scratch memory, which recording must not do.
    body();
    if (Status status = finish(); !status.ok()) return fail(std::move(status));
    cudaGraph_t graph = nullptr;
    if (!ok(cudaStreamBeginCapture(stream_.stream, cudaStreamCaptureModeThreadLocal), "recording")) return;
    recording_ = true;
    body();
    recording_ = false;
    const cudaError_t ended = cudaStreamEndCapture(stream_.stream, &graph);
    if (!ok(ended, "recording") || failed()) {
      if (graph != nullptr) cudaGraphDestroy(graph);
      return;
    }
    cudaGraphExec_t executable = nullptr;
    const bool made = ok(cudaGraphInstantiate(&executable, graph, 0), "instantiating the graph");
    cudaGraphDestroy(graph);
    if (!made) return;
    make_room();
    recordings_.emplace(key, Recording{.graph = executable, .loop = loop_launch_, .used = replays_});
    ++made_;
    ok(cudaGraphUpload(executable, stream_.stream),
       "uploading the graph");  // now, and not with its first launch
    return;                     // this call has run already
  }
  found->second.used = replays_;
  loop_launch_ = found->second.loop;
  take_turn();
  ok(cudaGraphLaunch(found->second.graph, stream_.stream), "launching the graph");
}

void CudaBackend::keep_recordings() {
  for (auto& [key, recording] : recordings_) recording.kept = true;
}

// Of the recordings that are not to be kept, the one that was not used for longest goes when there are too
// many.
void CudaBackend::make_room() {
  auto oldest = recordings_.end();
  int late = 0;
  for (auto it = recordings_.begin(); it != recordings_.end(); ++it) {
    if (it->second.kept) continue;
    ++late;
    if (oldest == recordings_.end() || it->second.used < oldest->second.used) oldest = it;
  }
  if (late < kLateRecordings) return;
  cudaGraphExecDestroy(oldest->second.graph);
  recordings_.erase(oldest);
}

// A few chains of short kernels hide each other's beginnings and ends; many rows fill the device by
// themselves.
int CudaBackend::lanes(int n) const { return wgmma_ && n > 1 && n <= kMostLanes ? n : 1; }

void CudaBackend::begin_lane(int lane, int lanes) {
  if (failed() || lanes == 1) return;
  select();
  if (lane == 0) {
    stream_.lanes = lanes;
    ok(cudaEventRecord(forked_, stream_.stream), "event");
    for (int i = 1; i < lanes; ++i) ok(cudaStreamWaitEvent(lane_streams_[i], forked_), "event");
    return;
  }
  lane_ = lane;
  stream_.stream = lane_streams_[lane];
  ok(start_chain(stream_), "lane");
}

void CudaBackend::end_lanes() {
  if (stream_.lanes == 1) return;
  const int lanes = stream_.lanes;
  stream_.stream = lane_streams_[0];
  stream_.lanes = 1;
  lane_ = 0;
  for (int i = 1; i < lanes; ++i) {  // after an error, too: what was begun must not meet the next call
    ok(cudaEventRecord(lane_ended_[i], lane_streams_[i]), "event");
    ok(cudaStreamWaitEvent(stream_.stream, lane_ended_[i]), "event");
  }
  if (!failed()) ok(start_chain(stream_), "lane");
}

void CudaBackend::do_letterbox(const Letterbox& op) { ok(cuda::letterbox(stream_, op), "letterbox"); }

void CudaBackend::mark(int i) {
  if (failed()) return;
  ok(recording_ ? cudaEventRecordWithFlags(marks_[i], stream_.stream, cudaEventRecordExternal)
                : cudaEventRecord(marks_[i], stream_.stream),
     "event");
}

double CudaBackend::elapsed(int i, int j) {
  float ms = 0;
  return cudaEventElapsedTime(&ms, marks_[i], marks_[j]) == cudaSuccess ? ms : 0.0;
}

void CudaBackend::read_cache(const KvCache& c, int layer, int slot, int rows, std::span<float> k,
                             std::span<float> v) {
  const auto d = static_cast<std::size_t>(c.head_dim), size = dtype_size(c.dtype);
  const std::uint64_t layer_bytes = cache_bytes(c) / 2 / static_cast<std::uint64_t>(c.layers);
  std::vector<std::byte> raw(static_cast<std::size_t>(rows) * d * size);
  for (int side = 0; side < 2; ++side)
    for (int head = 0; head < c.kv_heads; ++head) {
      const std::uint64_t from = static_cast<std::uint64_t>(2 * layer + side) * layer_bytes +
                                 (static_cast<std::uint64_t>(slot) * static_cast<std::uint64_t>(c.kv_heads) +
                                  static_cast<std::uint64_t>(head)) *
                                     static_cast<std::uint64_t>(c.keys) * d * size;
      download(raw.data(), static_cast<const std::byte*>(c.data) + from, raw.size());
      for (std::size_t row = 0; row < static_cast<std::size_t>(rows); ++row)
        for (std::size_t i = 0; i < d; ++i) {
          // Keys keep rotated pairs side by side (DeviceQkv).
          const std::size_t place = side == 1 || d % 2 != 0 ? i : i < d / 2 ? 2 * i : 2 * (i - d / 2) + 1;
          float value;
          if (c.dtype == DType::kF32) {
            std::memcpy(&value, raw.data() + (row * d + place) * 4, 4);
          } else {
            bf16 half;
            std::memcpy(&half, raw.data() + (row * d + place) * 2, 2);
            value = to_float(half);
          }
          (side == 0
               ? k
               : v)[(row * static_cast<std::size_t>(c.kv_heads) + static_cast<std::size_t>(head)) * d + i] =
              value;
        }
    }
}

}  // namespace servoflow::ops::cuda

namespace servoflow::ops {

bool cuda_is_built() { return true; }

int cuda_device_count() {
  int devices = 0;
  return cudaGetDeviceCount(&devices) == cudaSuccess ? devices : 0;
}

Result<std::unique_ptr<Backend>> make_cuda_backend(const std::string& precision, int ordinal) {
  return make_cuda_backend(precision, ordinal, CudaPath::kBest);
}

Result<std::unique_ptr<Backend>> make_cuda_backend(const std::string& precision, int ordinal, CudaPath path) {
  SF_ASSIGN_OR_RETURN(std::unique_ptr<cuda::CudaBackend> backend,
                      cuda::CudaBackend::create(precision, ordinal, path));
  return std::unique_ptr<Backend>(std::move(backend));
}

}  // namespace servoflow::ops
