// Float32 kernels in Highway: compiled once per instruction set, chosen at run time.
#include "ops/cpu/kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/cpu/vector_kernels.cc"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>
// After highway.h, per target:
#include <hwy/contrib/math/math-inl.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "ops/cpu/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace servoflow::ops::cpu::HWY_NAMESPACE {
// ---- panel products

#if HWY_TARGET <= HWY_AVX3
constexpr int kTileRows = 14;  // 32 registers: 28 accumulators
#else
constexpr int kTileRows = 6;  // 16 registers: 12 accumulators
#endif

// M rows by two vectors of columns starting at `column`.
template <int M, bool kBf16Panel>
void tile(const float* a, std::int64_t pitch, const void* panel, int k, int column, float* c,
          std::int64_t c_pitch, bool accumulate) {
  const F f;
  const U u;
  const int lanes = static_cast<int>(hn::Lanes(f));
  V left[M], right[M];
  for (int r = 0; r < M; ++r) left[r] = right[r] = hn::Zero(f);
  const auto step = [&](int i, V b0, V b1) HWY_ATTR {
#pragma GCC unroll 14
    for (int r = 0; r < M; ++r) {
      const V x = hn::Set(f, a[r * pitch + i]);
      left[r] = hn::MulAdd(x, b0, left[r]);
      right[r] = hn::MulAdd(x, b1, right[r]);
    }
  };
  if constexpr (kBf16Panel) {
    const std::uint32_t* b = static_cast<const std::uint32_t*>(panel) + column;
    const auto high = hn::Set(u, 0xffff0000u);
    for (int i = 0; i < k; i += 2, b += kPanel) {
      const auto w0 = hn::LoadU(u, b), w1 = hn::LoadU(u, b + lanes);
      step(i, hn::BitCast(f, hn::ShiftLeft<16>(w0)), hn::BitCast(f, hn::ShiftLeft<16>(w1)));
      if (i + 1 < k) step(i + 1, hn::BitCast(f, hn::And(w0, high)), hn::BitCast(f, hn::And(w1, high)));
    }
  } else {
    const float* b = static_cast<const float*>(panel) + column;
    for (int i = 0; i < k; ++i, b += kPanel) step(i, hn::LoadU(f, b), hn::LoadU(f, b + lanes));
  }
  for (int r = 0; r < M; ++r) {
    float* out = c + r * c_pitch + column;
    if (accumulate) {
      left[r] = hn::Add(hn::LoadU(f, out), left[r]);
      right[r] = hn::Add(hn::LoadU(f, out + lanes), right[r]);
    }
    hn::StoreU(left[r], f, out);
    hn::StoreU(right[r], f, out + lanes);
  }
}

template <int M, bool kBf16Panel>
void tile_of(int m, const float* a, std::int64_t pitch, const void* panel, int k, int column, float* c,
             std::int64_t c_pitch, bool accumulate) {
  if (m == M) return tile<M, kBf16Panel>(a, pitch, panel, k, column, c, c_pitch, accumulate);
  if constexpr (M > 1) tile_of<M - 1, kBf16Panel>(m, a, pitch, panel, k, column, c, c_pitch, accumulate);
}

template <bool kBf16Panel>
void product(const void* a, std::int64_t a_pitch, int m, const void* panel, int k, float* c,
             std::int64_t c_pitch, bool accumulate) {
  const int lanes = static_cast<int>(hn::Lanes(F()));
  const float* rows = static_cast<const float*>(a);
  const int count = (m + kTileRows - 1) / kTileRows;
  for (int column = 0; column < kPanel; column += 2 * lanes)
    for (int i = 0, row = 0; i < count; ++i) {
      const int size = (m - row + count - i - 1) / (count - i);
      tile_of<kTileRows, kBf16Panel>(size, rows + row * a_pitch, a_pitch, panel, k, column, c + row * c_pitch,
                                     c_pitch, accumulate);
      row += size;
    }
}

void PanelF32(const void* a, std::int64_t a_pitch, int m, const void* panel, int k, float* c,
              std::int64_t c_pitch, bool acc) {
  product<false>(a, a_pitch, m, panel, k, c, c_pitch, acc);
}
void PanelF32Bf16(const void* a, std::int64_t a_pitch, int m, const void* panel, int k, float* c,
                  std::int64_t c_pitch, bool acc) {
  product<true>(a, a_pitch, m, panel, k, c, c_pitch, acc);
}

// ---- activations and epilogue

HWY_INLINE V sigmoid_times(V x, V z) {  // x / (1 + exp(-z))
  const F f;
  const V e = hn::Exp(f, hn::Min(hn::Neg(z), hn::Set(f, 88.0f)));
  return hn::Div(x, hn::Add(hn::Set(f, 1.0f), e));
}

// 0.5 x (1 + tanh(u)) = x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x³)
HWY_INLINE V gelu_tanh(V x) {
  const F f;
  const V cube = hn::Mul(hn::Mul(x, x), x);
  const V u2 = hn::Mul(hn::Set(f, 2 * 0.79788456080286535588f), hn::MulAdd(hn::Set(f, 0.044715f), cube, x));
  return sigmoid_times(x, u2);
}

void ApplyEpilogue(const EpilogueBlock& block) {
  const F f;
  const Epilogue& e = *block.epilogue;
  const int lanes = static_cast<int>(hn::Lanes(f));
  const int col0 = block.first_col;
  for (int i = 0; i < block.rows; ++i) {
    const int row = block.first_row + i;
    const float* c = block.c + i * block.c_pitch;
    const std::int64_t out = (e.row_map != nullptr ? e.row_map[row] : row) * block.y.pitch + col0;
    const float* gate = nullptr;
    if (e.gate != nullptr) {
      const int step = e.gate->base + (e.gate->row_offset != nullptr ? e.gate->row_offset[row] : 0);
      gate = e.gate->table + step * e.gate->step_pitch +
             (static_cast<std::int64_t>(e.gate->site) * 3 + 2) * e.gate->width + col0;
    }
    const float* row_bias =
        e.row_bias != nullptr
            ? e.row_bias + static_cast<std::int64_t>(row % e.row_bias_period) * block.y.cols + col0
            : nullptr;
    const auto finish = [&](V x, int j, auto load) HWY_ATTR {
      if (e.bias != nullptr) x = hn::Add(x, load(e.bias + col0 + j));
      if (e.activation == Activation::kGeluTanh) x = gelu_tanh(x);
      if (e.activation == Activation::kSilu) x = sigmoid_times(x, x);
      if (gate != nullptr) x = hn::Mul(x, load(gate + j));
      if (row_bias != nullptr) x = hn::Add(x, load(row_bias + j));
      return x;
    };
    int j = 0;
    for (; j + lanes <= block.cols; j += lanes) {
      V x = hn::LoadU(f, c + j);
      if (e.geglu) x = hn::Mul(gelu_tanh(x), hn::LoadU(f, c + kPanel + j));
      x = finish(x, j, [&](const float* p) HWY_ATTR { return hn::LoadU(f, p); });
      if (e.accumulate) x = hn::Add(hn::LoadU(f, static_cast<float*>(block.y.data) + out + j), x);
      store_any(x, block.y.data, out + j, block.y.dtype);
    }
    for (; j < block.cols; ++j) {  // the last columns one by one, through the same arithmetic
      V x = hn::Set(f, c[j]);
      if (e.geglu) x = hn::Mul(gelu_tanh(x), hn::Set(f, c[kPanel + j]));
      x = finish(x, j, [&](const float* p) HWY_ATTR { return hn::Set(f, *p); });
      if (e.accumulate) x = hn::Add(hn::Set(f, static_cast<float*>(block.y.data)[out + j]), x);
      scalar_to(hn::GetLane(x), block.y.data, out + j, block.y.dtype);
    }
  }
}

// ---- norms

// Sum over a row in four vector accumulators, whatever its length: the order depends on the width alone.
template <typename Term>
HWY_INLINE float row_sum(int n, Term term) {
  const F f;
  const int lanes = static_cast<int>(hn::Lanes(f));
  V sum[4] = {hn::Zero(f), hn::Zero(f), hn::Zero(f), hn::Zero(f)};
  int i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes)
    for (int j = 0; j < 4; ++j) sum[j] = hn::Add(sum[j], term(hn::Undefined(f), i + j * lanes, lanes));
  for (; i + lanes <= n; i += lanes) sum[0] = hn::Add(sum[0], term(hn::Undefined(f), i, lanes));
  float total = hn::GetLane(hn::SumOfLanes(f, hn::Add(hn::Add(sum[0], sum[1]), hn::Add(sum[2], sum[3]))));
  for (; i < n; ++i) total += hn::GetLane(term(hn::Undefined(f), i, 1));
  return total;
}

HWY_INLINE V load_n(const float* p, int n) { return n == 1 ? hn::Set(F(), *p) : hn::LoadU(F(), p); }

void LayerNormRows(const LayerNorm& op, int first, int last) {
  const F f;
  const int width = op.x.cols, lanes = static_cast<int>(hn::Lanes(f));
  for (int r = first; r < last; ++r) {
    const float* x = static_cast<const float*>(op.x.data) + r * op.x.pitch;
    const std::int64_t out = r * op.y.pitch;
    const float mean = row_sum(width, [&](V, int i, int n) HWY_ATTR { return load_n(x + i, n); }) /
                       static_cast<float>(width);
    const V m = hn::Set(f, mean);
    const float variance = row_sum(width,
                                   [&](V, int i, int n) HWY_ATTR {
                                     const V d = hn::Sub(load_n(x + i, n), m);
                                     return hn::Mul(d, d);
                                   }) /
                           static_cast<float>(width);
    const V scale = hn::Set(f, 1.0f / std::sqrt(variance + op.eps));
    int i = 0;
    for (; i + lanes <= width; i += lanes) {
      const V d = hn::Mul(hn::Sub(hn::LoadU(f, x + i), m), scale);
      store_any(hn::MulAdd(d, hn::LoadU(f, op.weight + i), hn::LoadU(f, op.bias + i)), op.y.data, out + i,
                op.y.dtype);
    }
    for (; i < width; ++i)
      scalar_to((x[i] - mean) * hn::GetLane(scale) * op.weight[i] + op.bias[i], op.y.data, out + i,
                op.y.dtype);
  }
}

void RmsNormRows(const RmsNorm& op, int first, int last) {
  const F f;
  const int width = op.x.cols, lanes = static_cast<int>(hn::Lanes(f));
  for (int r = first; r < last; ++r) {
    const float* x = static_cast<const float*>(op.x.data) + r * op.x.pitch;
    const std::int64_t out = r * op.y.pitch;
    const float *factor = op.weight, *shift = nullptr;
    if (op.modulation != nullptr) {
      const ModulationRow& m = *op.modulation;
      const int step = m.base + (m.row_offset != nullptr ? m.row_offset[r] : 0);
      factor = m.table + step * m.step_pitch + static_cast<std::int64_t>(m.site) * 3 * m.width;
      shift = factor + m.width;
    }
    const float squares = row_sum(width, [&](V, int i, int n) HWY_ATTR {
      const V v = load_n(x + i, n);
      return hn::Mul(v, v);
    });
    const float inverse = 1.0f / std::sqrt(squares / static_cast<float>(width) + op.eps);
    const V scale = hn::Set(f, inverse), one = hn::Set(f, 1.0f);
    int i = 0;
    for (; i + lanes <= width; i += lanes) {
      V y = hn::Mul(hn::Mul(hn::LoadU(f, x + i), scale), hn::Add(one, hn::LoadU(f, factor + i)));
      if (shift != nullptr) y = hn::Add(y, hn::LoadU(f, shift + i));
      store_any(y, op.y.data, out + i, op.y.dtype);
    }
    for (; i < width; ++i)
      scalar_to(x[i] * inverse * (1.0f + factor[i]) + (shift != nullptr ? shift[i] : 0.0f), op.y.data,
                out + i, op.y.dtype);
  }
}

// ---- attention pieces

void SoftmaxRows(float* s, std::int64_t pitch, int rows, int keys, float scale, void* p, std::int64_t p_pitch,
                 DType dtype, float* inverse) {
  const F f;
  const int lanes = static_cast<int>(hn::Lanes(f));
  for (int r = 0; r < rows; ++r) {
    float* x = s + r * pitch;
    V most = hn::Set(f, x[0]);
    int i = 0;
    for (; i + lanes <= keys; i += lanes) most = hn::Max(most, hn::LoadU(f, x + i));
    float largest = hn::GetLane(hn::MaxOfLanes(f, most));
    for (; i < keys; ++i) largest = std::max(largest, x[i]);
    const V top = hn::Set(f, largest), factor = hn::Set(f, scale);
    const auto weight = [&](V v) HWY_ATTR { return hn::Exp(f, hn::Mul(hn::Sub(v, top), factor)); };
    const std::int64_t out = r * p_pitch;
    const float sum = row_sum(keys, [&](V, int at, int n) HWY_ATTR {
      const V e = weight(load_n(x + at, n));
      if (n == 1) {
        scalar_to(hn::GetLane(e), p, out + at, dtype);
      } else {
        store_any(e, p, out + at, dtype);
      }
      return e;
    });
    inverse[r] = 1.0f / sum;
  }
}

void StoreScaled(const float* x, int n, float factor, void* y, DType dtype) {
  const F f;
  const int lanes = static_cast<int>(hn::Lanes(f));
  int i = 0;
  for (; i + lanes <= n; i += lanes) store_any(hn::Mul(hn::LoadU(f, x + i), hn::Set(f, factor)), y, i, dtype);
  for (; i < n; ++i) scalar_to(x[i] * factor, y, i, dtype);
}

void RotateHead(const float* x, int dim, const float* cos, const float* sin, void* y, DType dtype) {
  if (cos == nullptr) return StoreScaled(x, dim, 1.0f, y, dtype);
  const F f;
  const int half = dim / 2, lanes = static_cast<int>(hn::Lanes(f));
  int i = 0;
  for (; i + lanes <= half; i += lanes) {
    const V a = hn::LoadU(f, x + i), b = hn::LoadU(f, x + half + i), c = hn::LoadU(f, cos + i),
            s = hn::LoadU(f, sin + i);
    store_any(hn::Sub(hn::Mul(a, c), hn::Mul(b, s)), y, i, dtype);
    store_any(hn::Add(hn::Mul(b, c), hn::Mul(a, s)), y, half + i, dtype);
  }
  for (; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    scalar_to(a * cos[i] - b * sin[i], y, i, dtype);
    scalar_to(b * cos[i] + a * sin[i], y, half + i, dtype);
  }
}

const char* TargetName() { return hwy::TargetName(HWY_TARGET); }

}  // namespace servoflow::ops::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace servoflow::ops::cpu {

HWY_EXPORT(PanelF32);
HWY_EXPORT(PanelF32Bf16);
HWY_EXPORT(ApplyEpilogue);
HWY_EXPORT(LayerNormRows);
HWY_EXPORT(RmsNormRows);
HWY_EXPORT(SoftmaxRows);
HWY_EXPORT(StoreScaled);
HWY_EXPORT(RotateHead);
HWY_EXPORT(TargetName);

void panel_f32(const void* a, std::int64_t a_pitch, int m, const void* panel, int k, float* c,
               std::int64_t c_pitch, bool acc) {
  HWY_DYNAMIC_DISPATCH(PanelF32)(a, a_pitch, m, panel, k, c, c_pitch, acc);
}
void panel_f32_bf16(const void* a, std::int64_t a_pitch, int m, const void* panel, int k, float* c,
                    std::int64_t c_pitch, bool acc) {
  HWY_DYNAMIC_DISPATCH(PanelF32Bf16)(a, a_pitch, m, panel, k, c, c_pitch, acc);
}
void apply_epilogue(const EpilogueBlock& block) { HWY_DYNAMIC_DISPATCH(ApplyEpilogue)(block); }
void layer_norm_rows(const LayerNorm& op, int first, int last) {
  HWY_DYNAMIC_DISPATCH(LayerNormRows)(op, first, last);
}
void rms_norm_rows(const RmsNorm& op, int first, int last) {
  HWY_DYNAMIC_DISPATCH(RmsNormRows)(op, first, last);
}
void softmax_rows(float* s, std::int64_t pitch, int rows, int keys, float scale, void* p,
                  std::int64_t p_pitch, DType dtype, float* inverse) {
  HWY_DYNAMIC_DISPATCH(SoftmaxRows)(s, pitch, rows, keys, scale, p, p_pitch, dtype, inverse);
}
void store_scaled(const float* x, int n, float factor, void* y, DType dtype) {
  HWY_DYNAMIC_DISPATCH(StoreScaled)(x, n, factor, y, dtype);
}
void rotate_head(const float* x, int dim, const float* cos, const float* sin, void* y, DType dtype) {
  HWY_DYNAMIC_DISPATCH(RotateHead)(x, dim, cos, sin, y, dtype);
}
const char* vector_target() { return HWY_DYNAMIC_DISPATCH(TargetName)(); }

}  // namespace servoflow::ops::cpu
#endif
