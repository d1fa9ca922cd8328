// Synthetic weights, version 1: random numbers anyone can regenerate bit for bit, in any language and from
// any element, so that full-size parity and speed need no download.
//
//   key = fnv1a64(name) xor seed, name = the tensor's openpi name
//   element i (row-major, from 0): z = key + (i + 1) * 0x9E3779B97F4A7C15, then splitmix64's finalizer
//   u = float(z >> 40) * 2^-24, value = offset + amp * (2u - 1) in FP32 without FMA, rounded to the stored
//   dtype (amp, offset) follow from the name and the fan-in: synthetic_rule().
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>

#include "core/bf16.h"
#include "core/shape.h"
#include "weights/architecture.h"
#include "weights/weight_source.h"

namespace servoflow::weights {

struct SyntheticRule {
  float amp = 0, offset = 0;
};
SyntheticRule synthetic_rule(std::string_view name, const Shape& shape);

// The generator's state before element 0, and the rule: what a backend needs to make the tensor itself.
ops::Sequence synthetic_sequence(std::string_view name, const Shape& shape, std::uint64_t seed);

// Elements [start, start + out.size()) of a tensor.
void synthetic_values(std::string_view name, const Shape& shape, std::uint64_t seed, std::uint64_t start,
                      std::span<float> out);
// The same, rounded to bfloat16.
void synthetic_values(std::string_view name, const Shape& shape, std::uint64_t seed, std::uint64_t start,
                      std::span<bf16> out);

// Generates tensors when they are asked for; nothing is kept.
class SyntheticSource : public WeightSource {
 public:
  // `dtype` is kBF16 or kF32: what the values are rounded to. The architecture must have passed
  // check_architecture.
  SyntheticSource(const Architecture& architecture, std::uint64_t seed, DType dtype);

  bool has(const std::string& name) const override { return shapes_.contains(name); }
  Result<TensorData> get(const std::string& name) const override;
  Result<TensorData> describe(const std::string& name) const override;
  void release(const std::string&) const override {}
  Status token_rows(std::span<const std::int32_t> ids, std::span<float> out) const override;
  std::string stored_dtype() const override { return dtype_ == DType::kBF16 ? "BF16" : "F32"; }
  std::uint64_t parameters() const { return parameters_; }

 private:
  std::unordered_map<std::string, Shape> shapes_;
  Shape table_;
  std::uint64_t seed_ = 0, parameters_ = 0;
  DType dtype_ = DType::kBF16;
};

}  // namespace servoflow::weights
