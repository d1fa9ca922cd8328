// Rounding rows of inputs to codes, and scaling finished sums: compiled once per instruction set, chosen at
// run time.
#include "ops/cpu/low_bit.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/cpu/low_bit_rows.cc"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>
// After highway.h, per target:
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <optional>

#include "ops/cpu/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace servoflow::ops::cpu::HWY_NAMESPACE {

using I = hn::RebindToSigned<F>;

HWY_INLINE V magnitude(V x) { return hn::Abs(x); }

// x · multiplier into values, which end with zeros up to a whole vector. The largest magnitude, or NaN if one
// value is not finite: as integers, magnitudes keep their order and NaN is the largest.
HWY_INLINE float load_row(const InputRow& row) {
  const F f;
  const I i32;
  const int lanes = static_cast<int>(hn::Lanes(f));
  auto most = hn::Zero(i32);
  int i = 0;
  for (; i + lanes <= row.k; i += lanes) {
    V x = load_any(row.x, i, row.dtype);
    if (row.multiplier != nullptr) x = hn::Mul(x, hn::LoadU(f, row.multiplier + i));
    hn::StoreU(x, f, row.values + i);
    most = hn::Max(most, hn::BitCast(i32, magnitude(x)));
  }
  std::int32_t largest = hn::GetLane(hn::MaxOfLanes(i32, most));
  for (; i < row.k; ++i) {
    float x = scalar_at(row.x, i, row.dtype);
    if (row.multiplier != nullptr) x *= row.multiplier[i];
    row.values[i] = x;
    largest = std::max(largest, std::bit_cast<std::int32_t>(std::abs(x)));
  }
  for (; i % lanes != 0; ++i) row.values[i] = 0;
  if (largest >= 0x7f800000) return std::numeric_limits<float>::quiet_NaN();
  return std::bit_cast<float>(largest);
}

// What quant::fake_quantize_rows multiplies by, and what undoes it.
struct RowScale {
  float scale, inverse;
};
HWY_INLINE RowScale row_scale(float most, std::optional<float> given, float top) {
  if (std::isnan(most)) return {most, 0.0f};
  if (given) return {*given, 1.0f / *given};
  const float inverse = most > 0 ? top / most : 0.0f;
  return {most / top, std::isfinite(inverse) ? inverse : 0.0f};
}

float Int8Row(const InputRow& row, int zero, std::uint8_t* out) {
  const F f;
  const I i32;
  const int lanes = static_cast<int>(hn::Lanes(f));
  const hn::Rebind<std::uint8_t, F> u8;
  const float most = load_row(row);
  const RowScale scale = row_scale(most, row.static_scale, 127.0f);
  const V inverse = hn::Set(f, scale.inverse);
  // A static scale may saturate, and then -128 is a code as well.
  const auto least = hn::Set(f, row.static_scale ? -128.0f : -127.0f), top = hn::Set(f, 127.0f);
  const auto offset = hn::Set(i32, 128);
  const V shift = hn::Set(f, static_cast<float>(zero));
  for (int i = 0; i < row.k; i += lanes) {
    const V x = hn::Mul(hn::LoadU(f, row.values + i), inverse);
    // Clamped as floats: far values have no int32.
    const V code = hn::Min(hn::Max(hn::Add(hn::Round(x), shift), least), top);
    hn::StoreU(hn::DemoteTo(u8, hn::Add(hn::NearestInt(code), offset)), u8, out + i);
  }
  return scale.scale;
}

// Rounds |x| <= max, in units of 2^-mantissa of its own power of two, of which 2^least is the smallest:
// adding a power of two 2^23 times the unit leaves the rest to the adder, which rounds ties to even.
HWY_INLINE V round_magnitude(V a, int mantissa, int least) {
  const F f;
  const U u;
  const auto exponent = hn::Max(hn::And(hn::BitCast(u, a), hn::Set(u, 0x7f800000u)),
                                hn::Set(u, static_cast<std::uint32_t>(127 + least) << 23));
  const V magic =
      hn::BitCast(f, hn::Add(exponent, hn::Set(u, static_cast<std::uint32_t>(23 - mantissa) << 23)));
  return hn::Sub(hn::Add(a, magic), magic);
}
HWY_INLINE V round_e4m3(V x) {
  const F f;
  return hn::CopySign(round_magnitude(hn::Min(magnitude(x), hn::Set(f, 448.0f)), 3, -6), x);
}
HWY_INLINE V round_e2m1(V x) {
  const F f;
  return hn::CopySign(round_magnitude(hn::Min(magnitude(x), hn::Set(f, 6.0f)), 1, 0), x);
}

float CodeRow(const InputRow& row, quant::Code code, void* out, DType dtype) {
  const F f;
  const int lanes = static_cast<int>(hn::Lanes(f));
  const bool int8 = code == quant::Code::kInt8;
  const float most = load_row(row);
  const RowScale scale = row_scale(most, row.static_scale, int8 ? 127.0f : 448.0f);
  const V inverse = hn::Set(f, scale.inverse);
  const V least = hn::Set(f, row.static_scale ? -128.0f : -127.0f), top = hn::Set(f, 127.0f);
  for (int i = 0; i < row.k; i += lanes) {
    const V x = hn::Mul(hn::LoadU(f, row.values + i), inverse);
    store_any(int8 ? hn::Min(hn::Max(hn::Round(x), least), top) : round_e4m3(x), out, i, dtype);
  }
  return scale.scale;
}

float Nvfp4Row(const InputRow& row, void* out, DType dtype) {
  const F f;
  const int lanes = static_cast<int>(hn::Lanes(f));
  const float most = load_row(row);
  const float global = row.static_scale ? *row.static_scale : most / 2688.0f;
  if (std::isnan(most) || !(most > 0) || !(global > 0)) {  // nothing to round, or nothing that could be
    for (int i = 0; i < row.k; i += lanes) store_any(hn::Zero(f), out, i, dtype);
    return std::isnan(most) ? most : 1.0f;
  }
  const int end = (row.k + lanes - 1) / lanes * lanes;
  for (int i = row.k; i < (row.k + 15) / 16 * 16; ++i) row.values[i] = 0;
  for (int block = 0; block < row.k; block += 16) {
    V largest = hn::Zero(f);
    for (int i = block; i < block + 16; i += lanes)
      largest = hn::Max(largest, magnitude(hn::LoadU(f, row.values + i)));
    const float amax = hn::GetLane(hn::MaxOfLanes(f, largest));
    float unit = hn::GetLane(round_e4m3(hn::Set(f, amax / 6.0f / global)));
    if (!(unit * global > 0)) unit = 0;
    const V scale = hn::Set(f, unit), divisor = hn::Set(f, unit > 0 ? unit * global : 1.0f);
    for (int i = block; i < std::min(block + 16, end); i += lanes)
      store_any(hn::Mul(round_e2m1(hn::Div(hn::LoadU(f, row.values + i), divisor)), scale), out, i, dtype);
  }
  return global;
}

void LoadInputRow(const InputRow& row) { load_row(row); }

// Blocks are whole vectors wide.
void ScaleInts(std::int32_t* c, std::int64_t pitch, int rows, int cols, int correction,
               const std::int32_t* column_sum, const float* column_scale, const float* row_scale) {
  const F f;
  const I i32;
  const int lanes = static_cast<int>(hn::Lanes(f));
  const auto times = hn::Set(i32, correction);
  for (int r = 0; r < rows; ++r) {
    std::int32_t* row = c + r * pitch;
    const V scale = hn::Set(f, row_scale[r]);
    for (int j = 0; j < cols; j += lanes) {
      const auto sum = hn::Sub(hn::LoadU(i32, row + j), hn::Mul(times, hn::LoadU(i32, column_sum + j)));
      const V x = hn::Mul(hn::Mul(hn::ConvertTo(f, sum), hn::LoadU(f, column_scale + j)), scale);
      hn::StoreU(hn::BitCast(i32, x), i32, row + j);
    }
  }
}

void ScaleFloats(float* c, std::int64_t pitch, int rows, int cols, const float* column_scale,
                 const float* row_scale) {
  const F f;
  const int lanes = static_cast<int>(hn::Lanes(f));
  for (int r = 0; r < rows; ++r) {
    float* row = c + r * pitch;
    const V scale = hn::Set(f, row_scale != nullptr ? row_scale[r] : 1.0f);
    for (int j = 0; j < cols; j += lanes) {
      V x = hn::LoadU(f, row + j);
      if (column_scale != nullptr) x = hn::Mul(x, hn::LoadU(f, column_scale + j));
      hn::StoreU(hn::Mul(x, scale), f, row + j);
    }
  }
}

}  // namespace servoflow::ops::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace servoflow::ops::cpu {

HWY_EXPORT(Int8Row);
HWY_EXPORT(CodeRow);
HWY_EXPORT(Nvfp4Row);
HWY_EXPORT(LoadInputRow);
HWY_EXPORT(ScaleInts);
HWY_EXPORT(ScaleFloats);

float int8_row(const InputRow& row, int zero, std::uint8_t* out) {
  return HWY_DYNAMIC_DISPATCH(Int8Row)(row, zero, out);
}
float code_row(const InputRow& row, quant::Code code, void* out, DType dtype) {
  return HWY_DYNAMIC_DISPATCH(CodeRow)(row, code, out, dtype);
}
float nvfp4_row(const InputRow& row, void* out, DType dtype) {
  return HWY_DYNAMIC_DISPATCH(Nvfp4Row)(row, out, dtype);
}
void load_input_row(const InputRow& row) { HWY_DYNAMIC_DISPATCH(LoadInputRow)(row); }
void scale_ints(std::int32_t* c, std::int64_t pitch, int rows, int cols, int correction,
                const std::int32_t* column_sum, const float* column_scale, const float* row_scale) {
  HWY_DYNAMIC_DISPATCH(ScaleInts)(c, pitch, rows, cols, correction, column_sum, column_scale, row_scale);
}
void scale_floats(float* c, std::int64_t pitch, int rows, int cols, const float* column_scale,
                  const float* row_scale) {
  HWY_DYNAMIC_DISPATCH(ScaleFloats)(c, pitch, rows, cols, column_scale, row_scale);
}

}  // namespace servoflow::ops::cpu
#endif
