// The CUDA backend: device memory, packed weights, one stream, recorded graphs, and a kernel per operation.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "ops/backend.h"
#include "ops/composite/composite.h"
#include "ops/cuda/expert_loop.cuh"
#include "ops/cuda/kernels.h"
#include "ops/cuda/paths.h"

namespace servoflow::ops::cuda {

class CudaBackend : public Backend {
 public:
  static Result<std::unique_ptr<CudaBackend>> create(const std::string& precision, int ordinal,
                                                     CudaPath path);
  ~CudaBackend() override;

  std::string name() const override { return name_; }
  std::string hardware() const override { return hardware_; }
  std::optional<DeviceState> device_state() const override;
  std::string device() const override { return "cuda:" + std::to_string(ordinal_); }
  DType activation_dtype() const override { return half_ ? DType::kBF16 : DType::kF32; }
  std::int64_t pitch(int cols, DType dtype) const override;
  std::uint64_t query_bytes(int rows, int heads, int head_dim) const override;
  std::uint64_t cache_bytes(const KvCache& cache) const override;

  Result<void*> allocate(std::uint64_t bytes) override;
  Result<void*> allocate_staging(std::uint64_t bytes) override;
  Result<Weight> pack(std::span<const HostMatrix> parts, const PackOptions& options) override;
  bool generates() const override { return true; }
  void generate(void* device, DType dtype, std::uint64_t count, const Sequence& sequence) override;
  void upload(void* device, const void* host, std::size_t bytes) override;
  void download(void* host, const void* device, std::size_t bytes) override;
  void copy(void* to, const void* from, std::size_t bytes) override;
  void read_cache(const KvCache& cache, int layer, int slot, int rows, std::span<float> k,
                  std::span<float> v) override;
  bool records() const override { return true; }
  bool takes_raw_inputs() const override { return true; }
  // The denoise loop in one launch walks through them one by one; for more, products of many rows are faster.
  int requests_at_once() const override { return 4; }
  bool prefers_parts() const override { return half_; }
  void replay(std::uint64_t key, const std::function<void()>& feed,
              const std::function<void()>& body) override;
  int recordings() const override { return made_; }
  void keep_recordings() override;
  int lanes(int n) const override;
  void begin_lane(int lane, int lanes) override;
  void end_lanes() override;
  void mark(int i) override;
  double elapsed(int i, int j) override;

  void siglip_block(const SiglipBlock& op) override;
  void gemma_layer(const GemmaLayer& op) override;
  void expert_step(const ExpertStep& op) override;
  void denoise_loop(const DenoiseLoop& op) override;
  void prepare_schedule(const ExpertWeights& w, const ModulationRow& modulation, int steps) override;

  // For tests: the denoise loop's launch by another launcher, such as a copy of the kernel. False where this
  // backend does not run the loop as one launch.
  using LoopLauncher = cudaError_t (*)(const Stream&, const ExpertLoop&);
  bool launch_loop_by(LoopLauncher launcher);

 protected:
  Status wait() override;
  void do_letterbox(const Letterbox& op) override;
  void do_patch_rows(const PatchRows& op) override;
  void do_scale_rows(const ScaleRows& op) override;
  void do_matmul(const Matmul& op) override;
  void do_layer_norm(const LayerNorm& op) override;
  void do_rms_norm(const RmsNorm& op) override;
  void do_split_qkv(const SplitQkv& op) override;
  void do_attention(const Attention& op) override;
  void do_time_embedding(const TimeEmbedding& op) override;
  void do_euler_step(const EulerStep& op) override;

 private:
  CudaBackend() = default;
  void select() const;  // makes this backend's device the thread's
  bool ok(cudaError_t error, const char* what);
  Status explained(cudaError_t error, const char* what) const;
  const WeightLayout* layout_of(const Weight& w);
  Product product_of(const Matrix& x, const Count& rows, const Weight& w);
  DeviceEpilogue epilogue_of(const Epilogue& e, const Matrix& y) const;
  DeviceQkv qkv_of(const Segments& segments, const RopeTable* rope, void* q, const KvCache& cache, int layer,
                   int heads) const;
  void run_product(const Product& op, const Count& rows);
  // x += epilogue(x_in · Wᵀ), then `norm` of the new x, in as few launches as the device allows.
  void product_into_rows(Product op, const Matrix& x, const Count& rows, const NextNorm& norm);
  void attend(const GemmaWeights& w, const Matrix& x, const Count& rows, const Segments& segments,
              const KvCache& cache, int layer, int heads, const RopeTable* rope, const ModulationRow* gate,
              const NextNorm& next, const BlockScratch& s, bool only_cache);
  void gated_mlp(const GemmaWeights& w, const Matrix& x, const Count& rows, const ModulationRow* gate,
                 const NextNorm& next, const BlockScratch& s);

  void take_turn();
  bool takes_expert(const ExpertWeights& w);
  bool takes_loop(const DenoiseLoop& op) const;
  void run_loop(const DenoiseLoop& op, const float* shift);
  ExpertEdge edge_of(const DenoiseLoop& op, float* squares, __nv_bfloat16* scaled);

  struct Scratch {
    void* data = nullptr;
    std::uint64_t bytes = 0;
  };
  void* scratch(Scratch& memory, std::uint64_t bytes);

  struct ShiftProducts {
    float* data = nullptr;  // [steps][depth][qkv features | gate and up features]
    int steps = 0;
  };

  int ordinal_ = 0;
  bool half_ = false, wgmma_ = false, clusters_ = false, loop_ = false;
  std::string name_, hardware_;
  Stream stream_;
  // Lane 0 is the stream itself; the others have one of their own, while they last.
  static constexpr int kMostLanes = 3;
  int lane_ = 0;
  cudaStream_t lane_streams_[kMostLanes] = {};
  cudaEvent_t forked_ = nullptr, lane_ended_[kMostLanes] = {};
  std::vector<void*> blocks_, pinned_;
  struct Room {
    char* next = nullptr;
    std::uint64_t left = 0;
  };
  std::vector<Room> rooms_;  // the rest of each block
  void* staging_[2] = {};    // pinned, for packing
  void* landing_[2] = {};    // their copies on the device
  cudaEvent_t staged_[2] = {};
  int* bad_ = nullptr;
  std::unordered_map<const void*, WeightLayout> layouts_;
  struct Recording {
    cudaGraphExec_t graph = nullptr;
    LoopLaunch loop;
    std::uint64_t used = 0;  // when, in calls of replay
    bool kept = false;
  };
  void make_room();
  std::map<std::uint64_t, Recording> recordings_;
  std::uint64_t replays_ = 0;
  int made_ = 0;
  cudaEvent_t marks_[kMarks] = {};
  bool recording_ = false;
  std::unordered_map<const float*, ShiftProducts> shift_products_;
  std::unique_lock<std::mutex> turn_;  // on the device, while a denoise loop may be on it
  unsigned* loop_counters_ = nullptr;
  LoopStall* loop_stall_ = nullptr;  // on the host, written by the device
  LoopLaunch loop_launch_;           // the last
  LoopLauncher loop_launcher_ = nullptr;
  Scratch squares_, expert_rows_;  // the denoise loop's: sums of squares, rows between its products
  // Of each lane: parts of sums that are split; inputs rounded to bf16.
  Scratch partials_[kMostLanes], rounded_[kMostLanes];
};

}  // namespace servoflow::ops::cuda
