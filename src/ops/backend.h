// One device: memory, weights in its own layout, and the operations of ops.h.
//
// The public methods check every contract once (checks.cc) and call the protected do_* of the implementation.
// Work may be enqueued rather than done when a method returns: only `download` and `finish` wait. The first
// broken contract or device error sticks and comes out of finish(); everything after it is skipped.
#pragma once

#include <cstddef>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/memory.h"
#include "ops/ops.h"
#include "quant/matrix.h"
#include "servoflow/status.h"

namespace servoflow::ops {

// Random values that a backend can make itself, element i of a tensor: z = state + (i + 1) ·
// 0x9E3779B97F4A7C15, splitmix64's finalizer, u = float(z >> 40) · 2^-24, offset + amp · (2u - 1) in float32,
// not fused, rounded to the stored dtype. weights/synth.h says which tensor has which.
struct Sequence {
  std::uint64_t state = 0;
  float amp = 0, offset = 0;
};

// Host rows to pack: [rows, cols] row-major of a float dtype. Without bytes they are generated, by a backend
// that does that, in float32 or bfloat16.
struct HostMatrix {
  DType dtype = DType::kF32;
  int rows = 0, cols = 0;
  std::span<const std::byte> bytes;
  std::string name;  // for error messages
  std::optional<Sequence> sequence = {};
  // Instead of bytes: all parts of one weight are, or none.
  const quant::QuantizedMatrix* quantized = nullptr;
};

enum class PackMode : std::uint8_t {
  kConcat,      // parts below each other
  kInterleave,  // two parts, gate and up, paired for the GeGLU epilogue
  kHeads,       // q, k and v below each other; PackOptions::head_dim tells where a head's halves meet
};

struct PackOptions {
  PackMode mode = PackMode::kConcat;
  // Float32 arithmetic and no rounding below the stored precision (time and action projections), whatever the
  // backend's precision.
  bool keep_float32 = false;
  int head_dim = 0;       // kHeads
  bool few_rows = false;  // tens of rows pass through at a time, not hundreds: a hint for the layout
};

// A device that is not the host, as it is now.
struct DeviceState {
  std::string bus;  // PCI address, "0000:3b:00.0"
  std::uint64_t memory_total = 0, memory_free = 0;
};

struct ExpertWeights;
struct ModulationRow;
struct SiglipBlock;
struct GemmaLayer;
struct ExpertStep;
struct DenoiseLoop;

// Sees every product before it is enqueued. A backend that replaces composites whole shows nothing of what is
// inside.
class MatmulObserver {
 public:
  virtual ~MatmulObserver() = default;
  virtual void before(const Matmul& op) = 0;
};

class Backend {
 public:
  virtual ~Backend() = default;

  // Null: nobody watches. The observer may download.
  void watch_products(MatmulObserver* observer) { observer_ = observer; }
  // A copy of `name` that lives as long as the backend, for Weight::name.
  const char* keep_name(std::string name);

  // "cpu/avx512_bf16", "reference": what the reply names.
  virtual std::string name() const = 0;
  virtual std::string device() const = 0;
  virtual int threads() const { return 1; }
  // dtype of matmul inputs between ops in this precision; float32 where the device computes in float32.
  virtual DType activation_dtype() const = 0;
  // dtype of K/V caches.
  virtual DType cache_dtype() const { return activation_dtype(); }
  // Preferred distance between rows of a matrix with `cols` columns, in elements.
  virtual std::int64_t pitch(int cols, DType dtype) const;
  // Bytes behind SplitQkv::q for this many rows.
  virtual std::uint64_t query_bytes(int rows, int heads, int head_dim) const = 0;
  virtual std::uint64_t cache_bytes(const KvCache& cache) const = 0;

  // Zeroed device memory, alive as long as the backend. Fails with the size when there is none left.
  virtual Result<void*> allocate(std::uint64_t bytes) = 0;
  // Zeroed host memory that uploads read from (pinned where that matters), alive as long as the backend.
  virtual Result<void*> allocate_staging(std::uint64_t bytes);
  // Packs weights into the backend's layout. NaN or Inf is an error that names the tensor and its first bad
  // element.
  virtual Result<Weight> pack(std::span<const HostMatrix> parts, const PackOptions& options) = 0;
  // How products with weights and inputs of this format are computed here, for reports: "int8 dot product
  // (AVX-512 VNNI)", "float32 arithmetic …". Empty: not at all, and pack refuses them.
  virtual std::string low_bit_kernel(const quant::LinearFormat& format) const;
  // Whether generated matrices need no bytes; `generate` writes elements 0 … count - 1 of one.
  virtual bool generates() const { return false; }
  virtual void generate(void* /*device*/, DType, std::uint64_t /*count*/, const Sequence&) {}
  // Copies; `host` must stay alive until finish() or the next download.
  virtual void upload(void* device, const void* host, std::size_t bytes) = 0;
  virtual void download(void* host, const void* device, std::size_t bytes) = 0;
  // Within the device's memory; where that is the host's, at once.
  virtual void copy(void* to, const void* from, std::size_t bytes);
  // Keys or values of one slot and layer as plain float32 rows [rows, kv_heads * head_dim].
  virtual void read_cache(const KvCache& cache, int layer, int slot, int rows, std::span<float> k,
                          std::span<float> v) = 0;
  // Waits for everything enqueued; the first error since the last finish().
  Status finish();

  // The device and what drives it, for reports: "NVIDIA H200, driver 13.0, runtime 13.0"; empty for the CPU.
  virtual std::string hardware() const { return {}; }
  // Nothing on the CPU.
  virtual std::optional<DeviceState> device_state() const { return {}; }

  // How many chains of work side by side are worth it where `n` independent ones are to be done, n or 1. With
  // begin_lane(i, lanes), what is enqueued from there on belongs to chain i = 0 … lanes - 1, which reads what
  // was enqueued before chain 0 began and nothing of the other chains; end_lanes() waits for all of them.
  virtual int lanes(int /*n*/) const { return 1; }
  virtual void begin_lane(int /*lane*/, int /*lanes*/) {}
  virtual void end_lanes() {}

  // A backend that can record work replays it with one call. `body` only enqueues on this backend and reads
  // nothing on the host but what `key` names: it is recorded the first time a key is seen and replayed from
  // then on. `feed` enqueues before the body what varies in size: uploads. Without recording both simply run,
  // and so they do the first time: a body runs once per call and may change its inputs.
  virtual bool records() const { return false; }
  virtual void replay(std::uint64_t key, const std::function<void()>& feed,
                      const std::function<void()>& body);
  // How many records were made so far. Those made before keep_recordings() stay as long as the backend; of
  // later ones only the last used do.
  virtual int recordings() const { return 0; }
  virtual void keep_recordings() {}
  // Device times within replayed work: mark(i), i < kMarks, between ops; milliseconds from mark i to mark j
  // after finish().
  static constexpr int kMarks = 8;
  virtual void mark(int) {}
  virtual double elapsed(int, int) { return 0; }

  // A schedule of `steps` steps stands in the modulation's table: time to derive from it what denoise_loop
  // can use. Called again whenever the table changes.
  virtual void prepare_schedule(const ExpertWeights&, const ModulationRow&, int /*steps*/) {}

  // Whether pictures and tokens enter raw: frames for `letterbox`, ids for `scale_rows` on the whole token
  // table. Otherwise the host makes pictures and gathers rows.
  virtual bool takes_raw_inputs() const { return false; }

  // Requests that are worth computing together where nobody says how many, and up to which the expert's
  // weights keep the layout of few rows. 1: each takes as long as alone.
  virtual int requests_at_once() const { return 1; }

  // Whether a product in float32 costs more here than one whose operands come in bfloat16 parts (PatchRows).
  virtual bool prefers_parts() const { return false; }

  void letterbox(const Letterbox& op);
  void patch_rows(const PatchRows& op);
  void scale_rows(const ScaleRows& op);
  void matmul(const Matmul& op);
  void layer_norm(const LayerNorm& op);
  void rms_norm(const RmsNorm& op);
  void split_qkv(const SplitQkv& op);
  void attention(const Attention& op);
  void time_embedding(const TimeEmbedding& op);
  void euler_step(const EulerStep& op);

  // Composites: by default their plain composition (ops/composite); a backend may replace one whole.
  virtual void siglip_block(const SiglipBlock& op);
  virtual void gemma_layer(const GemmaLayer& op);
  virtual void expert_step(const ExpertStep& op);
  virtual void denoise_loop(const DenoiseLoop& op);

 protected:
  virtual Status wait() { return {}; }
  virtual void do_letterbox(const Letterbox& op) = 0;
  virtual void do_patch_rows(const PatchRows& op) = 0;
  virtual void do_scale_rows(const ScaleRows& op) = 0;
  virtual void do_matmul(const Matmul& op) = 0;
  virtual void do_layer_norm(const LayerNorm& op) = 0;
  virtual void do_rms_norm(const RmsNorm& op) = 0;
  virtual void do_split_qkv(const SplitQkv& op) = 0;
  virtual void do_attention(const Attention& op) = 0;
  virtual void do_time_embedding(const TimeEmbedding& op) = 0;
  virtual void do_euler_step(const EulerStep& op) = 0;
  // Remembers the first failure; false afterwards.
  bool check(const char* op, const char* broken);
  bool failed() const { return !status_.ok(); }
  void fail(Status status);
  // The error of pack for a format without a kernel here.
  Status refuse_format(const quant::LinearFormat& format, const std::string& tensor) const;

 private:
  Status status_;
  std::vector<HostBlock> staging_;
  MatmulObserver* observer_ = nullptr;
  std::deque<std::string> names_;
};

// Whether a frame can become a picture of `image` x `image` pixels: a device could not refuse it any more.
// `tables` is the beginning, still in host memory, of the `bytes` that its offsets point into.
Status check_frame(const Frame& frame, std::span<const std::byte> tables, std::uint64_t bytes, int image);

struct BackendOptions {
  std::string device = "auto";     // auto | cpu | cuda[:N] | reference (the plain scalar oracle)
  std::string precision = "auto";  // auto | fp32 | bf16: of what is not quantized
  int threads = 0;
};

// What a precision resolved to, and the backend that runs it.
struct BackendChoice {
  std::unique_ptr<Backend> backend;
  std::string precision;  // "fp32" | "bf16"
};

// Fails, naming the choices, for an unknown device or precision, and for a device this build or machine
// lacks.
Result<BackendChoice> make_backend(const BackendOptions& options);

// One per implementation; a build without CUDA links the stub in ops/no_cuda, which returns a clear error.
Result<std::unique_ptr<Backend>> make_cpu_backend(const std::string& precision, int threads);
Result<std::unique_ptr<Backend>> make_reference_backend();
Result<std::unique_ptr<Backend>> make_cuda_backend(const std::string& precision, int ordinal);
bool cuda_is_built();
int cuda_device_count();  // GPUs that a backend can be made for; 0 without CUDA, driver or GPU

// "cuda:0,2" -> cuda:0 and cuda:2; "cuda:all" -> every GPU; "auto", "cpu" and "cuda:1" are one. Fails, naming
// what is wrong, for an empty entry and for a GPU named twice; whether a device is there shows when it is
// opened.
Result<std::vector<std::string>> device_list(const std::string& devices);

}  // namespace servoflow::ops
