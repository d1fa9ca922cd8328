// y = epilogue(x · Wᵀ). A task is a group of two panels (64 columns) by a chunk of rows; its product stays in
// the thread's scratch in float32 while K is walked in blocks, then the epilogue writes the result once.
//
// The chunk's slice of x (at most 400 KiB) stays in the second-level cache while the panels of W stream past
// it: with 14 rows per tile a panel is read at some 5 bytes a cycle, which the second level and the
// prefetcher serve.
#include <algorithm>

#include "core/zones.h"
#include "ops/cpu/cpu_backend.h"

namespace servoflow::ops::cpu {
namespace {

constexpr int kGroup = 2;               // panels per task; gate and up panels of a GeGLU stay together
constexpr int kMaxChunkRows = 392;      // 28 tiles of 14 rows; 392 x 64 float32 = 98 KiB of scratch
constexpr int kBlockDepth = 2048;       // of K, for bf16 products
constexpr int kExactDepth = 256;        // of K, in float32: short sums, for precision
constexpr int kChunkBytes = 400 << 10;  // of x, per block of K

int even_share(int total, int most) {  // equal parts of at most `most`
  const int parts = (total + most - 1) / most;
  return (total + parts - 1) / parts;
}

}  // namespace

void CpuBackend::store_product(const Matmul& op, int first_panel, int last_panel, int first_row, int rows,
                               float* c, std::int64_t c_pitch) {
  const Weight& w = *op.w;
  EpilogueBlock block{
      .c = c, .c_pitch = c_pitch, .rows = rows, .first_row = first_row, .epilogue = &op.epilogue, .y = op.y};
  block.first_col = (w.paired ? first_panel / 2 : first_panel) * kPanel;
  if (op.epilogue.geglu) {
    block.cols = std::min(kPanel, op.y.cols - block.first_col);
    apply_epilogue(block);
  } else if (!w.paired) {
    block.cols = std::min((last_panel - first_panel) * kPanel, op.y.cols - block.first_col);
    apply_epilogue(block);
  } else {  // a paired weight without GeGLU: gates and ups go to their own halves
    for (int half = 0; half < 2; ++half) {
      EpilogueBlock part = block;
      part.c += half * kPanel;
      part.cols = std::min(kPanel, w.n / 2 - block.first_col);
      part.first_col += half * (w.n / 2);
      apply_epilogue(part);
    }
  }
}

void CpuBackend::do_matmul(const Matmul& op) {
  const Weight& w = *op.w;
  const int rows = valid(op.rows);
  if (rows <= 0) return;
  const zones::Zone zone(op.zone, 2.0 * rows * w.n * w.k, static_cast<double>(w.bytes));
  if (w.layout != nullptr) return low_bit_matmul(op, rows);
  PanelProduct product = nullptr;
  if (op.x.dtype == DType::kBF16 && w.stored == DType::kBF16) product = bf16_dot_;
  if (op.x.dtype == DType::kF32) product = w.stored == DType::kBF16 ? panel_f32_bf16 : panel_f32;
  if (product == nullptr) return fail(Status::runtime("cpu matmul: no kernel for this pair of dtypes"));

  const bool pairs = w.stored == DType::kBF16;
  const std::int64_t panel_bytes = static_cast<std::int64_t>(pairs ? (w.k + 1) / 2 * 2 : w.k) * kPanel *
                                   static_cast<std::int64_t>(dtype_size(w.stored));
  const int panels = w.paired ? 2 * ((w.n / 2 + kPanel - 1) / kPanel) : (w.n + kPanel - 1) / kPanel;
  // Small products use single panels where pairs would leave threads idle.
  const int group = w.paired || panels >= 8 * pool_.threads() ? kGroup : 1;
  const int groups = (panels + group - 1) / group;
  const int depth = (even_share(w.k, op.x.dtype == DType::kF32 ? kExactDepth : kBlockDepth) + 1) / 2 * 2;
  const int cached_rows = kChunkBytes / (depth * static_cast<int>(dtype_size(op.x.dtype))) / 14 * 14;
  const int chunk = even_share(rows, std::clamp(cached_rows, 56, kMaxChunkRows));
  const int chunks = (rows + chunk - 1) / chunk;
  if (!need_scratch(static_cast<std::size_t>(kMaxChunkRows) * kGroup * kPanel * sizeof(float))) return;

  const std::size_t x_size = dtype_size(op.x.dtype);
  pool_.parallel_for(groups * chunks, [&](int task, int thread) {
    const int first_panel = task / chunks * group, last_panel = std::min(panels, first_panel + group);
    const int first_row = task % chunks * chunk, count = std::min(rows, first_row + chunk) - first_row;
    float* c = reinterpret_cast<float*>(scratch(thread));
    constexpr std::int64_t c_pitch = kGroup * kPanel;
    const std::byte* x =
        static_cast<const std::byte*>(op.x.data) + static_cast<std::size_t>(first_row * op.x.pitch) * x_size;
    for (int k = 0; k < w.k; k += depth)
      for (int panel = first_panel; panel < last_panel; ++panel) {
        const std::byte* b =
            static_cast<const std::byte*>(w.data) + panel * panel_bytes +
            static_cast<std::int64_t>(k) * kPanel * static_cast<std::int64_t>(dtype_size(w.stored));
        product(x + static_cast<std::size_t>(k) * x_size, op.x.pitch, count, b, std::min(depth, w.k - k),
                c + (panel - first_panel) * kPanel, c_pitch, k > 0);
      }
    store_product(op, first_panel, last_panel, first_row, count, c, c_pitch);
  });
}

}  // namespace servoflow::ops::cpu
