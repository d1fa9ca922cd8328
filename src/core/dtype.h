// Element types of tensors in files and in memory.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

namespace servoflow {

enum class DType : std::uint8_t {
  kF64,
  kF32,
  kF16,
  kBF16,
  kF8E4M3,
  kF8E5M2,
  kI64,
  kI32,
  kI16,
  kI8,
  kU64,
  kU32,
  kU16,
  kU8,
  kBool,
  kF8E8M0  // scales of the MX formats: powers of two
};

// Bytes of one element.
std::size_t dtype_size(DType dtype);
// The safetensors name: "F32", "BF16", "F8_E4M3", "BOOL", …
std::string_view dtype_name(DType dtype);
// Inverse of dtype_name; nothing for a name no published safetensors file uses.
std::optional<DType> dtype_from_name(std::string_view name);
inline bool is_float(DType dtype) {
  return dtype == DType::kF64 || dtype == DType::kF32 || dtype == DType::kF16 || dtype == DType::kBF16;
}

}  // namespace servoflow
