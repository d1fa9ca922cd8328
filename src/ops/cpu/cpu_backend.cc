#include "ops/cpu/cpu_backend.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "core/bf16.h"
#include "core/status_macros.h"
#include "core/zones.h"
#include "ops/host_rows.h"

namespace servoflow::ops::cpu {
namespace {

constexpr std::uint64_t kLine = 64;
constexpr std::uint64_t kArenaBlock = std::uint64_t{64} << 20;

std::uint64_t round_up(std::uint64_t n, std::uint64_t to) { return (n + to - 1) / to * to; }

}  // namespace

int valid(const Count& count) {
  return count.device != nullptr ? std::min(*count.device, count.capacity) : count.capacity;
}

CpuBackend::CpuBackend(const std::string& precision, int threads, const DotProducts& dot)
    : round_weights_(precision == "bf16"),
      bf16_dot_(precision == "bf16" ? dot.bf16 : nullptr),
      int8_dot_(dot.int8),
      unpack_(dot.unpack != nullptr ? dot.unpack : unpack_plain),
      codes_dot_(bf16_dot_ != nullptr ? dot.codes : nullptr),
      pool_(threads) {
  std::string target = vector_target();
  std::transform(target.begin(), target.end(), target.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  if (target.rfind("avx3", 0) == 0) target = "avx512";
  name_ = "cpu/" + target + (bf16_dot_ != nullptr ? "_bf16" : "");
  scratch_.resize(static_cast<std::size_t>(pool_.threads()));
}

std::int64_t CpuBackend::pitch(int cols, DType dtype) const {
  // An odd number of cache lines: rows of a tile then never share a cache set.
  const std::uint64_t size = dtype_size(dtype);
  return static_cast<std::int64_t>((round_up(static_cast<std::uint64_t>(cols) * size, kLine) | kLine) / size);
}

std::uint64_t CpuBackend::query_bytes(int rows, int heads, int head_dim) const {
  return static_cast<std::uint64_t>(rows) * static_cast<std::uint64_t>(heads) *
             static_cast<std::uint64_t>(head_dim) * dtype_size(activation_dtype()) +
         kLine;
}

// Many weights share a block, so that rounding to huge pages costs little.
Result<void*> CpuBackend::allocate(std::uint64_t bytes) {
  const std::lock_guard lock(memory_mutex_);
  bytes = round_up(std::max<std::uint64_t>(bytes, 1), 4096);
  if (bytes > arena_left_) {
    HostBlock block(std::max(bytes, kArenaBlock));
    if (block.data() == nullptr)
      return Status::runtime("out of memory: the system refused " + std::to_string(bytes) + " bytes");
    arena_ = block.data();
    arena_left_ = block.bytes();
    blocks_.push_back(std::move(block));
  }
  void* out = arena_;
  arena_ += bytes;
  arena_left_ -= bytes;
  return out;
}

bool CpuBackend::need_scratch(std::size_t bytes) {
  for (ThreadScratch& s : scratch_) {
    if (s.block.bytes() >= bytes) continue;
    s.block = HostBlock(bytes);
    if (s.block.data() == nullptr) {
      fail(Status::runtime("out of memory: " + std::to_string(bytes) + " bytes of scratch"));
      return false;
    }
  }
  return true;
}

Result<Weight> CpuBackend::pack(std::span<const HostMatrix> parts, const PackOptions& options) {
  SF_RETURN_IF_ERROR(check_parts(parts, options));
  if (parts[0].quantized != nullptr) return pack_low_bit(parts, options);
  bool stored_bf16 = true;
  for (const HostMatrix& part : parts) stored_bf16 = stored_bf16 && part.dtype == DType::kBF16;
  Weight w{.k = parts[0].cols, .paired = options.mode == PackMode::kInterleave};
  w.stored = stored_bf16 || (round_weights_ && !options.keep_float32) ? DType::kBF16 : DType::kF32;
  for (const HostMatrix& part : parts) w.n += part.rows;
  const int panels_of_part = (parts[0].rows + kPanel - 1) / kPanel;
  const int panels = w.paired ? 2 * panels_of_part : (w.n + kPanel - 1) / kPanel;
  const std::uint64_t panel_bytes =
      static_cast<std::uint64_t>(w.stored == DType::kBF16 ? (w.k + 1) / 2 * 2 : w.k) * kPanel *
      dtype_size(w.stored);
  w.bytes = static_cast<std::uint64_t>(panels) * panel_bytes;
  SF_ASSIGN_OR_RETURN(void* data, allocate(w.bytes));
  w.data = data;
  std::atomic<bool> finite{true};
  pool_.parallel_for(panels, [&](int panel, int) {
    const std::byte* rows[kPanel] = {};
    DType source = parts[0].dtype;
    bool one_dtype = true;
    for (int r = 0; r < kPanel; ++r) {
      // Which row of which part stands in this column: concatenated parts, or gate and up panels in turn.
      std::size_t part = w.paired ? static_cast<std::size_t>(panel % 2) : 0;
      int row = w.paired ? panel / 2 * kPanel + r : panel * kPanel + r;
      while (!w.paired && part < parts.size() && row >= parts[part].rows) row -= parts[part++].rows;
      if (part >= parts.size() || row >= parts[part].rows) continue;
      one_dtype = one_dtype && (parts[part].dtype == source || rows[0] == nullptr);
      source = parts[part].dtype;
      rows[r] = parts[part].bytes.data() +
                static_cast<std::size_t>(row) * static_cast<std::size_t>(w.k) * dtype_size(source);
    }
    if (!one_dtype)
      fail(Status::invalid(parts[0].name + ": parts of one fused weight are stored in different dtypes"));
    if (!pack_panel(rows, source, w.k, w.stored,
                    static_cast<std::byte*>(data) + static_cast<std::uint64_t>(panel) * panel_bytes))
      finite.store(false, std::memory_order_relaxed);
  });
  if (!finite.load()) {  // find the culprit by name, slowly
    std::vector<float> row(static_cast<std::size_t>(w.k));
    for (const HostMatrix& part : parts)
      for (int r = 0; r < part.rows; ++r) SF_RETURN_IF_ERROR(read_row(part, r, row.data()));
    return Status::invalid(parts[0].name + ": a value overflows bf16");
  }
  if (failed()) return finish();
  return w;
}

void CpuBackend::upload(void* device, const void* host, std::size_t bytes) {
  std::memcpy(device, host, bytes);
}
void CpuBackend::download(void* host, const void* device, std::size_t bytes) {
  std::memcpy(host, device, bytes);
}

template <typename Body>
void CpuBackend::for_rows(int rows, int rows_per_task, Body body) {
  const int tasks = (rows + rows_per_task - 1) / rows_per_task;
  pool_.parallel_for(
      tasks, [&](int task, int) { body(task * rows_per_task, std::min(rows, (task + 1) * rows_per_task)); });
}

void CpuBackend::do_letterbox(const Letterbox& op) { letterbox_rows(op, valid(op.pictures)); }

void CpuBackend::do_patch_rows(const PatchRows& op) {
  const zones::Zone zone("vision/patches");
  const int grid = op.image / op.patch, p = op.patch;
  for_rows(valid(op.pictures) * grid, 4, [&](int first, int last) {
    for (int line = first; line < last; ++line) {
      const int picture = line / grid, y = line % grid;
      for (int x = 0; x < grid; ++x) {
        const std::int64_t row = static_cast<std::int64_t>(picture * grid + y) * grid + x;
        for (int i = 0; i < p; ++i) {
          const float* in =
              op.pixels +
              ((static_cast<std::int64_t>(picture) * op.image + y * p + i) * op.image + x * p) * 3;
          for (int j = 0; j < p; ++j)
            for (int c = 0; c < 3; ++c) put_patch_value(op, row, (c * p + i) * p + j, in[j * 3 + c]);
        }
      }
    }
  });
}

void CpuBackend::do_scale_rows(const ScaleRows& op) {
  const zones::Zone zone("prefix/embed");
  for_rows(valid(op.rows), 64, [&](int first, int last) {
    for (int i = first; i < last; ++i) {
      const std::int64_t from = op.ids != nullptr ? op.ids[i] : i;
      float* to = static_cast<float*>(op.y.data) + (op.row_map != nullptr ? op.row_map[i] : i) * op.y.pitch;
      if (op.x.dtype == DType::kF32) {
        store_scaled(static_cast<const float*>(op.x.data) + from * op.x.pitch, op.x.cols, op.scale, to,
                     DType::kF32);
      } else {
        scale_row(op.x, from, op.scale, to);
      }
    }
  });
}

void CpuBackend::do_layer_norm(const LayerNorm& op) {
  const zones::Zone zone("norm");
  for_rows(valid(op.rows), 16, [&](int first, int last) { layer_norm_rows(op, first, last); });
}

void CpuBackend::do_rms_norm(const RmsNorm& op) {
  const zones::Zone zone("norm");
  for_rows(valid(op.rows), 16, [&](int first, int last) { rms_norm_rows(op, first, last); });
}

void CpuBackend::do_time_embedding(const TimeEmbedding& op) {
  for (int i = 0; i < op.steps; ++i)
    time_features(op.times[i], op.width, op.min_period, op.max_period,
                  static_cast<float*>(op.out.data) + i * op.out.pitch);
}

void CpuBackend::do_euler_step(const EulerStep& op) {
  for (int i = 0; i < valid(op.rows); ++i) {
    float* x = static_cast<float*>(op.x.data) + i * op.x.pitch;
    const float* v = static_cast<const float*>(op.v.data) + i * op.v.pitch;
    for (int c = 0; c < op.x.cols; ++c) x[c] += op.dt * v[c];
  }
}

}  // namespace servoflow::ops::cpu

namespace servoflow::ops {

Result<std::unique_ptr<Backend>> make_cpu_backend(const std::string& precision, int threads) {
  return std::unique_ptr<Backend>(new cpu::CpuBackend(precision, threads, {}));
}

}  // namespace servoflow::ops
