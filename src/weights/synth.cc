#include "weights/synth.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <initializer_list>

#include "weights/manifest.h"

namespace servoflow::weights {
namespace {

std::uint64_t fnv1a64(std::string_view text) {
  std::uint64_t hash = 0xcbf29ce484222325u;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return hash;
}

bool ends_with_any(std::string_view name, std::initializer_list<std::string_view> endings) {
  return std::any_of(endings.begin(), endings.end(), [&](std::string_view e) { return name.ends_with(e); });
}

inline void store(float value, float& out) { out = value; }
// Values are finite, so to_bf16's care for NaNs is left out and the loop vectorises.
inline void store(float value, bf16& out) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  out.bits = static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

constexpr std::uint64_t kStep = 0x9E3779B97F4A7C15u;

// `base` is the state before the first element's step.
template <typename Out>
[[gnu::always_inline]] inline void fill(std::uint64_t base, SyntheticRule rule, Out* out, std::size_t count) {
  const float amp = rule.amp, offset = rule.offset;
  for (std::size_t i = 0; i < count; ++i) {
    std::uint64_t z = base + (i + 1) * kStep;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    const float u = static_cast<float>(static_cast<std::int32_t>(z >> 40)) * 0x1p-24f;
    store(offset + amp * (u * 2.0f - 1.0f), out[i]);
  }
}

#if defined(__x86_64__)
// The same loop where 64-bit multiplications exist as vector instructions: five times as fast.
template <typename Out>
[[gnu::target("avx512f,avx512dq,avx512bw,avx512vl")]] void fill_wide(std::uint64_t base, SyntheticRule rule,
                                                                     Out* out, std::size_t count) {
  fill(base, rule, out, count);
}
bool has_wide() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#endif

template <typename Out>
void generate(std::string_view name, const Shape& shape, std::uint64_t seed, std::uint64_t start,
              std::span<Out> out) {
  const ops::Sequence sequence = synthetic_sequence(name, shape, seed);
  const std::uint64_t base = sequence.state + start * kStep;
  const SyntheticRule rule{sequence.amp, sequence.offset};
#if defined(__x86_64__)
  static const bool wide = has_wide();
  if (wide) return fill_wide(base, rule, out.data(), out.size());
#endif
  fill(base, rule, out.data(), out.size());
}

}  // namespace

SyntheticRule synthetic_rule(std::string_view name, const Shape& shape) {
  double fan_in = 1;
  for (int i = 1; i < shape.rank(); ++i) fan_in *= static_cast<double>(shape[i]);
  const double uniform = std::sqrt(3.0 / fan_in);  // variance 1 / fan_in
  if (name.ends_with(".bias")) return {0.1f, 0.0f};
  if (ends_with_any(name, {"layer_norm1.weight", "layer_norm2.weight", "post_layernorm.weight"}))
    return {0.2f, 1.0f};
  if (ends_with_any(
          name, {"input_layernorm.weight", "post_attention_layernorm.weight", "language_model.norm.weight"}))
    return {0.2f, 0.0f};
  if (name.ends_with("position_embedding.weight")) return {0.5f, 0.0f};
  if (ends_with_any(name, {"embed_tokens.weight", "lm_head.weight"}))
    return {static_cast<float>(uniform), 0.0f};
  if (ends_with_any(name, {"layernorm.dense.weight", "norm.dense.weight"}))
    return {static_cast<float>(0.3 * uniform), 0.0f};
  return {static_cast<float>(uniform), 0.0f};
}

ops::Sequence synthetic_sequence(std::string_view name, const Shape& shape, std::uint64_t seed) {
  const SyntheticRule rule = synthetic_rule(name, shape);
  return {fnv1a64(name) ^ seed, rule.amp, rule.offset};
}

void synthetic_values(std::string_view name, const Shape& shape, std::uint64_t seed, std::uint64_t start,
                      std::span<float> out) {
  generate(name, shape, seed, start, out);
}

void synthetic_values(std::string_view name, const Shape& shape, std::uint64_t seed, std::uint64_t start,
                      std::span<bf16> out) {
  generate(name, shape, seed, start, out);
}

SyntheticSource::SyntheticSource(const Architecture& architecture, std::uint64_t seed, DType dtype)
    : seed_(seed), dtype_(dtype) {
  for (TensorSpec& spec : manifest(architecture)) {
    parameters_ += static_cast<std::uint64_t>(spec.shape.elements());
    shapes_.emplace(std::move(spec.name), spec.shape);
  }
  table_ = shapes_.at(kTokenTable);
}

Result<TensorData> SyntheticSource::get(const std::string& name) const {
  const auto it = shapes_.find(name);
  if (it == shapes_.end()) return Status::invalid("tensor \"" + name + "\" is not part of this network");
  const Shape& shape = it->second;
  const std::size_t count = static_cast<std::size_t>(shape.elements());
  // At most 1 or 2 GB, for the token table; everything else is far smaller.
  const auto fill = [&](auto block) {
    const std::span values(block.get(), count);
    synthetic_values(name, shape, seed_, 0, values);
    return TensorData{dtype_, shape, std::as_bytes(values), block};
  };
  if (dtype_ == DType::kBF16) return fill(std::make_shared_for_overwrite<bf16[]>(count));
  return fill(std::make_shared_for_overwrite<float[]>(count));
}

Result<TensorData> SyntheticSource::describe(const std::string& name) const {
  const auto it = shapes_.find(name);
  if (it == shapes_.end()) return Status::invalid("tensor \"" + name + "\" is not part of this network");
  return TensorData{dtype_, it->second, {}, nullptr, synthetic_sequence(name, it->second, seed_)};
}

Status SyntheticSource::token_rows(std::span<const std::int32_t> ids, std::span<float> out) const {
  const std::size_t width = static_cast<std::size_t>(table_[1]);
  if (out.size() != ids.size() * width)
    return Status::invalid("token_rows: the output does not fit the number of ids");
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= table_[0])
      return Status::invalid("token id " + std::to_string(ids[i]) + " is outside the token table of " +
                             std::to_string(table_[0]) + " rows");
    const std::span<float> row = out.subspan(i * width, width);
    synthetic_values(kTokenTable, table_, seed_, static_cast<std::uint64_t>(ids[i]) * width, row);
    if (dtype_ != DType::kBF16) continue;
    for (float& x : row) x = to_float(to_bf16(x));
  }
  return {};
}

}  // namespace servoflow::weights
