// The CPU backend: packed panels, one pool, no allocation after planning.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/memory.h"
#include "core/thread_pool.h"
#include "ops/backend.h"
#include "ops/cpu/kernels.h"
#include "ops/cpu/low_bit.h"

namespace servoflow::ops::cpu {

// K/V cache: per layer, slot and K/V head one K part and one V part, both panels that `PanelProduct` reads
// directly.
//   K: [ceil(keys/32)] panels of depth head_dim    scores = q · K
//   V: [ceil(head_dim/32)] panels of depth keys    out = p · V
struct CacheLayout {
  explicit CacheLayout(const KvCache& cache);
  std::int64_t element;                // bytes
  std::int64_t depth_dim, depth_keys;  // head_dim and keys rounded up to pairs for bf16
  std::int64_t k_panel, v_panel;       // elements of one panel
  std::int64_t k_part, v_part, head;   // elements of a K part, a V part, both
  std::byte* k(const KvCache& cache, int layer, int slot, int head) const;
  std::byte* v(const KvCache& cache, int layer, int slot, int head) const;
  // Element of the K or V part for one key and dimension.
  std::int64_t k_index(int key, int dim) const;
  std::int64_t v_index(int key, int dim) const;

 private:
  bool pairs_;
};

class CpuBackend : public Backend {
 public:
  // The dot products that may be used; null: the CPU has none.
  struct DotProducts {
    PanelProduct bf16 = bf16_dot_product();
    Int8Product int8 = int8_dot_product();
    Unpack unpack = unpack_avx512();
    CodesProduct codes = bf16_dot_codes_product();
  };
  CpuBackend(const std::string& precision, int threads, const DotProducts& dot);

  std::string name() const override { return name_; }
  std::string device() const override { return "cpu"; }
  int threads() const override { return pool_.threads(); }
  DType activation_dtype() const override { return bf16_dot_ != nullptr ? DType::kBF16 : DType::kF32; }
  std::string low_bit_kernel(const quant::LinearFormat& format) const override;
  std::int64_t pitch(int cols, DType dtype) const override;
  std::uint64_t query_bytes(int rows, int heads, int head_dim) const override;
  std::uint64_t cache_bytes(const KvCache& cache) const override;
  Result<void*> allocate(std::uint64_t bytes) override;
  Result<Weight> pack(std::span<const HostMatrix> parts, const PackOptions& options) override;
  void upload(void* device, const void* host, std::size_t bytes) override;
  void download(void* host, const void* device, std::size_t bytes) override;
  void read_cache(const KvCache& cache, int layer, int slot, int rows, std::span<float> k,
                  std::span<float> v) override;

 protected:
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
  // Scratch of one thread, sized for the largest block of any op.
  struct ThreadScratch {
    HostBlock block;
  };
  std::byte* scratch(int thread) const { return scratch_[static_cast<std::size_t>(thread)].block.data(); }
  bool need_scratch(
      std::size_t bytes);  // grows all threads' scratch; false (and a sticky error) when memory is out
  template <typename Body>
  void for_rows(int rows, int rows_per_task, Body body);
  // Columns of panels [first_panel, last_panel) of a finished product, c [rows][c_pitch], through the
  // epilogue.
  static void store_product(const Matmul& op, int first_panel, int last_panel, int first_row, int rows,
                            float* c, std::int64_t c_pitch);

  struct Codes8;
  Result<Weight> pack_low_bit(std::span<const HostMatrix> parts, const PackOptions& options);
  void low_bit_matmul(const Matmul& op, int rows);
  bool round_inputs(const Matmul& op, const LowBitWeight& w, int rows, Codes8& out);
  bool need_input_codes(std::size_t bytes, std::size_t rows);

  bool round_weights_;     // bf16 precision: weights without keep_float32 are stored as bf16
  PanelProduct bf16_dot_;  // null: float32 arithmetic throughout
  Int8Product int8_dot_;
  Unpack unpack_;
  CodesProduct codes_dot_;  // null: panels of codes meet float32 arithmetic
  std::string name_;
  ThreadPool pool_;
  std::vector<ThreadScratch> scratch_;
  HostBlock input_codes_, input_scales_;  // of the product at work
  std::vector<std::unique_ptr<LowBitWeight>> low_bit_;
  std::mutex memory_mutex_;
  std::vector<HostBlock> blocks_;
  std::byte* arena_ = nullptr;  // rest of the last block
  std::uint64_t arena_left_ = 0;
};

int valid(const Count& count);

}  // namespace servoflow::ops::cpu
