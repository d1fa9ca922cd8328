// The inner loops of the CPU backend. Each is one call over a block, so that choosing the instruction set
// costs nothing.
//
// Packed B panels hold 32 output columns. Two formats:
//   float32: [k][32]
//   bf16:    [ceil(k/2)][32][2]: the two k of a pair side by side, as VDPBF16PS wants them; an odd k is
//   padded with zero
// A is row-major; for bf16 products it holds bf16, else float32.
#pragma once

#include <cstdint>

#include "core/bf16.h"
#include "ops/ops.h"

namespace servoflow::ops::cpu {

inline constexpr int kPanel = 32;  // columns of a panel

// c[i][0..31] (+)= a[i][0..k) · panel for i in [0, m). Pitches in elements. Sums run over k in order from
// zero and are then added to c, so that a long sum taken in blocks of k loses less than one running total
// would.
using PanelProduct = void (*)(const void* a, std::int64_t a_pitch, int m, const void* panel, int k, float* c,
                              std::int64_t c_pitch, bool accumulate);

// The AVX-512 BF16 dot-product kernel (bf16 a, bf16 panel); null where the CPU or the build has none.
PanelProduct bf16_dot_product();

// Float32 arithmetic in the widest vectors the CPU has.
void panel_f32(const void* a, std::int64_t a_pitch, int m, const void* panel, int k, float* c,
               std::int64_t c_pitch, bool accumulate);
void panel_f32_bf16(const void* a, std::int64_t a_pitch, int m, const void* panel, int k, float* c,
                    std::int64_t c_pitch, bool accumulate);
// "avx512", "avx2", "sse4", …: what the float32 kernels dispatch to.
const char* vector_target();

// Where one row of a finished block goes, and what is done to it (see Epilogue).
struct EpilogueBlock {
  const float* c = nullptr;  // [rows][c_pitch]
  std::int64_t c_pitch = 0;
  int rows = 0, cols = 0;            // cols of the output (with geglu: gates at c, ups at c + 32)
  int first_row = 0, first_col = 0;  // of the block inside the whole product
  const Epilogue* epilogue = nullptr;
  Matrix y;
};
void apply_epilogue(const EpilogueBlock& block);

// Rows [first, last) of the norms.
void layer_norm_rows(const LayerNorm& op, int first, int last);
void rms_norm_rows(const RmsNorm& op, int first, int last);

// In place softmax over `keys` columns of float32 scores s[rows][pitch] · scale: p gets the unnormalised
// exponentials in `dtype` (p may be s itself for float32), inverse[i] the reciprocal of the row's sum.
void softmax_rows(float* s, std::int64_t pitch, int rows, int keys, float scale, void* p,
                  std::int64_t p_pitch, DType dtype, float* inverse);

// y[0..n) = x[0..n) · factor in `dtype`.
void store_scaled(const float* x, int n, float factor, void* y, DType dtype);

// Rotates one head of `dim` elements (cos == nullptr: copies) and stores it in `dtype`.
void rotate_head(const float* x, int dim, const float* cos, const float* sin, void* y, DType dtype);

// Packs 32 rows of k weights (row r at rows[r], null rows are zero) into a panel. Returns false on NaN or
// Inf.
bool pack_panel(const std::byte* const rows[kPanel], DType source, int k, DType target, void* panel);

}  // namespace servoflow::ops::cpu
