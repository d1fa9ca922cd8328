// Vectors of float32 that the kernels share: compiled once per instruction set, as Highway's headers are.
#if defined(SF_OPS_CPU_VECTORS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SF_OPS_CPU_VECTORS_INL_H_
#undef SF_OPS_CPU_VECTORS_INL_H_
#else
#define SF_OPS_CPU_VECTORS_INL_H_
#endif

#include <hwy/highway.h>

#include "core/bf16.h"
#include "core/dtype.h"

HWY_BEFORE_NAMESPACE();
namespace servoflow::ops::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// At most 16 lanes, so that 32-column panels divide evenly whatever the vector size.
using F = hn::CappedTag<float, 16>;
using U = hn::RebindToUnsigned<F>;
using V = hn::Vec<F>;

// Reads `lanes` floats of storage type `dtype` at element i.
HWY_INLINE V load_any(const void* p, std::int64_t i, DType dtype) {
  const F f;
  if (dtype == DType::kF32) return hn::LoadU(f, static_cast<const float*>(p) + i);
  const hn::Rebind<std::uint16_t, F> half;
  const U u;
  return hn::BitCast(
      f, hn::ShiftLeft<16>(hn::PromoteTo(u, hn::LoadU(half, static_cast<const std::uint16_t*>(p) + i))));
}

// float32 -> bf16, round to nearest even, quiet NaN kept.
HWY_INLINE hn::Vec<hn::Rebind<std::uint16_t, F>> to_bf16_vector(V x) {
  const U u;
  const auto bits = hn::BitCast(u, x);
  const auto lsb = hn::And(hn::ShiftRight<16>(bits), hn::Set(u, 1));
  const auto rounded = hn::ShiftRight<16>(hn::Add(hn::Add(bits, hn::Set(u, 0x7fff)), lsb));
  const auto nan = hn::Or(hn::ShiftRight<16>(bits), hn::Set(u, 0x40));
  const auto is_nan = hn::RebindMask(u, hn::IsNaN(x));
  return hn::TruncateTo(hn::Rebind<std::uint16_t, F>(), hn::IfThenElse(is_nan, nan, rounded));
}

HWY_INLINE void store_any(V x, void* p, std::int64_t i, DType dtype) {
  if (dtype == DType::kF32) {
    hn::StoreU(x, F(), static_cast<float*>(p) + i);
  } else {
    hn::StoreU(to_bf16_vector(x), hn::Rebind<std::uint16_t, F>(), static_cast<std::uint16_t*>(p) + i);
  }
}

HWY_INLINE float scalar_at(const void* p, std::int64_t i, DType dtype) {
  return dtype == DType::kF32 ? static_cast<const float*>(p)[i] : to_float(static_cast<const bf16*>(p)[i]);
}
HWY_INLINE void scalar_to(float x, void* p, std::int64_t i, DType dtype) {
  if (dtype == DType::kF32) {
    static_cast<float*>(p)[i] = x;
  } else {
    static_cast<bf16*>(p)[i] = to_bf16(x);
  }
}

}  // namespace servoflow::ops::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
