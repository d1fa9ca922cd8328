// Quantized matrices into the panels of low_bit.h.
#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <string>

#include "core/status_macros.h"
#include "ops/cpu/cpu_backend.h"
#include "ops/host_rows.h"
#include "quant/pack.h"
#include "quant/scalars.h"

namespace servoflow::ops::cpu {
namespace {

using quant::Code;
using quant::Granularity;
using quant::QuantizedMatrix;
using quant::ScaleCode;

std::uint16_t bf16_bits(float value) { return to_bf16(value).bits; }

// Nibbles as they lie in a panel: int4 offset-binary, an index of the table; E2M1 by kE2M1Order.
std::uint8_t nibble_index(Code code, std::uint8_t raw) {
  return code == Code::kInt4 ? raw ^ 8u : static_cast<std::uint8_t>((raw & 8u) | kE2M1Order[raw & 7u]);
}

// bf16 values by code: 8-bit codes as they are, nibbles twice or, with a zero point, by code - zero + 16.
std::vector<std::uint16_t> value_table(Code code, bool zero_point) {
  std::vector<std::uint16_t> table;
  if (quant::code_bits(code) == 8) {
    for (int c = 0; c < 256; ++c) {
      const auto byte = static_cast<std::uint8_t>(c);
      table.push_back(bf16_bits(code == Code::kE4M3   ? quant::decode_e4m3(byte)
                                : code == Code::kE5M2 ? quant::decode_e5m2(byte)
                                                      : static_cast<float>(static_cast<std::int8_t>(byte))));
    }
    return table;
  }
  // kE2M1Order is its own inverse: an index maps back to its code.
  for (int c = 0; c < 32; ++c)
    table.push_back(bf16_bits(zero_point ? static_cast<float>(c - 16)
                              : code == Code::kE2M1
                                  ? quant::decode_e2m1(nibble_index(code, static_cast<std::uint8_t>(c % 16)))
                                  : static_cast<float>(c % 16 - 8)));
  return table;
}

// A scale times a code is then exact in bf16.
bool folds(const quant::WeightFormat& w) {
  return (w.scale == ScaleCode::kE4M3 && w.code == Code::kE2M1) ||
         (w.scale == ScaleCode::kE8M0 && w.code != Code::kInt8 && w.code != Code::kInt4);
}

bool scales_along_k(const quant::WeightFormat& w) {
  return w.granularity == Granularity::kGroup || w.granularity == Granularity::kBlock;
}

// One scale per row of x and column of y is all that separates the product from one of integers.
bool integer_sums(const quant::LinearFormat& format) {
  return format.weight.code == Code::kInt8 && format.input.code == Code::kInt8 &&
         !scales_along_k(format.weight) && format.input.granularity != Granularity::kGroup;
}

// Where a column of the weight comes from.
struct Source {
  const QuantizedMatrix* matrix = nullptr;
  const HostMatrix* part = nullptr;
  std::int64_t row = 0;
};

Source source_of(std::span<const HostMatrix> parts, bool paired, int panel, int column) {
  std::size_t part = paired ? static_cast<std::size_t>(panel % 2) : 0;
  int row = paired ? panel / 2 * kPanel + column : panel * kPanel + column;
  while (!paired && part < parts.size() && row >= parts[part].rows) row -= parts[part++].rows;
  if (part >= parts.size() || row >= parts[part].rows) return {};
  return {parts[part].quantized, &parts[part], row};
}

std::uint8_t raw_code(const QuantizedMatrix& m, std::int64_t row, std::int64_t k) {
  const std::uint8_t* line = m.codes.data() + static_cast<std::size_t>(row) * m.pitch;
  return quant::code_bits(m.format.weight.code) == 4 ? static_cast<std::uint8_t>(quant::nibble(line, k))
                                                     : line[k];
}

bool is_nan(Code code, std::uint8_t byte) {
  if (code == Code::kE4M3) return (byte & 0x7f) == 0x7f;
  return code == Code::kE5M2 && (byte & 0x7f) >= 0x7c;
}

// The parts of one weight enter one product: what is said of inputs must be the same for all.
Status check_agreement(std::span<const HostMatrix> parts) {
  const QuantizedMatrix& first = *parts[0].quantized;
  for (const HostMatrix& part : parts) {
    const auto differ = [&](const std::string& what) {
      return Status::invalid(part.name + ": " + what + " is not that of " + parts[0].name +
                             ", with which it is computed as one product; quantize both alike");
    };
    if (part.quantized == nullptr || !(part.quantized->format == first.format))
      return differ("format " + (part.quantized == nullptr ? "float" : quant::name(part.quantized->format)));
    const QuantizedMatrix& m = *part.quantized;
    if (m.input_scale != first.input_scale || m.input_zero_point != first.input_zero_point)
      return differ("the input scale");
    if (m.input_multiplier != first.input_multiplier) return differ("the input multiplier (pre_quant_scale)");
  }
  return {};
}

// One column of a panel; false for a code or scale that is no number.
class ColumnPacker {
 public:
  ColumnPacker(const LowBitWeight& w, const Source& from, int panel, int column)
      : w_(w), m_(*from.matrix), row_(from.row), panel_(panel), column_(column) {}

  bool codes(std::byte* out, std::int32_t* sum) const {
    const Code code = m_.format.weight.code;
    std::int32_t total = 0;
    bool good = true, empty = false;  // empty: a group whose scale is zero, which adds_exponents excludes
    for (int k = 0; k < w_.k; ++k) {
      const std::uint8_t raw = raw_code(m_, row_, k);
      good = good && !is_nan(code, raw);
      if (w_.codes == Codes::kQuads8) {
        out[(k / 4 * kPanel + column_) * 4 + k % 4] = std::byte{raw};
        total += static_cast<std::int8_t>(raw);
      } else if (w_.codes == Codes::kPairs8) {
        out[(k / 2 * kPanel + column_) * 2 + k % 2] = std::byte{raw};
      } else {
        if (w_.adds_exponents && k % w_.group == 0) empty = m_.scale_at(m_.scale_index(row_, k)) == 0;
        const std::uint8_t nibble = empty ? 0 : nibble_index(code, raw);
        out[k / 2 * kPanel + column_ % 16 * 2 + k % 2] |=
            std::byte{static_cast<std::uint8_t>(column_ < 16 ? nibble : nibble << 4)};
      }
    }
    if (sum != nullptr) *sum = total;
    return good;
  }

  bool scales(std::uint16_t* folded, float* group_scales, std::uint8_t* shifts, float* column_scale) const {
    bool good = std::isfinite(m_.global_scale);
    for (int g = 0; g < w_.groups; ++g) {
      const std::int64_t index = m_.scale_index(row_, static_cast<std::int64_t>(g) * w_.group);
      const std::int64_t at = (static_cast<std::int64_t>(panel_) * w_.groups + g) * kPanel + column_;
      const float scale = m_.scale_at(index);
      good = good && std::isfinite(scale);
      if (folded != nullptr) {
        // A group with the scale zero has codes that are zeros, see codes().
        folded[at] = bf16_bits(scale == 0 && w_.adds_exponents ? 1 : scale);
        // The largest code times the scale must be a number, too.
        good = good && std::isfinite(scale * quant::code_max(m_.format.weight.code));
      }
      if (group_scales != nullptr) group_scales[at] = scale * m_.global_scale;
      if (shifts != nullptr)
        shifts[at] = static_cast<std::uint8_t>(8 - m_.zero_points[static_cast<std::size_t>(index)]);
    }
    if (column_scale != nullptr) {
      float scale = m_.global_scale;
      if (w_.groups == 0) scale *= m_.scale(row_, 0);
      good = good && std::isfinite(scale);
      column_scale[panel_ * kPanel + column_] = scale;
    }
    return good;
  }

 private:
  const LowBitWeight& w_;
  const QuantizedMatrix& m_;
  const std::int64_t row_;
  const int panel_, column_;
};

// Names the first code or scale that is no number.
Status bad_element(std::span<const HostMatrix> parts) {
  std::vector<float> row(static_cast<std::size_t>(parts[0].cols));
  for (const HostMatrix& part : parts)
    for (int r = 0; r < part.rows; ++r) SF_RETURN_IF_ERROR(read_row(part, r, row.data()));
  return Status::invalid(parts[0].name + ": a scale times the largest code overflows");
}

}  // namespace

bool bf16_holds(const quant::InputFormat& in) {
  if (in.scale == ScaleCode::kE8M0) return true;
  return in.granularity != Granularity::kGroup ? !in.zero_point : in.code == Code::kE2M1;
}

std::string CpuBackend::low_bit_kernel(const quant::LinearFormat& format) const {
  const quant::WeightFormat& w = format.weight;
  const quant::InputFormat& in = format.input;
  if (!w.quantized() || !quant::validate(format).ok()) return {};
  if (in.quantized() && in.dynamic && in.granularity == Granularity::kTensor) return {};
  if (w.zero_point && w.code != Code::kInt4) return {};
  if (w.group % 2 != 0) return {};  // pairs of k's lie side by side
  if (integer_sums(format) && int8_dot_ != nullptr) return "int8 dot product (AVX-512 VNNI)";
  if (codes_dot_ != nullptr && (!in.quantized() || bf16_holds(in)))
    return "bf16 dot product (AVX-512 BF16) of unpacked panels";
  return "float32 arithmetic of unpacked panels";
}

Result<Weight> CpuBackend::pack_low_bit(std::span<const HostMatrix> parts, const PackOptions& options) {
  SF_RETURN_IF_ERROR(check_agreement(parts));
  const QuantizedMatrix& first = *parts[0].quantized;
  const quant::WeightFormat& format = first.format.weight;
  if (low_bit_kernel(first.format).empty()) return refuse_format(first.format, parts[0].name);
  Weight out{.k = parts[0].cols, .paired = options.mode == PackMode::kInterleave, .format = first.format};
  for (const HostMatrix& part : parts) out.n += part.rows;

  auto owned = std::make_unique<LowBitWeight>();
  LowBitWeight& w = *owned;
  const bool along_k = scales_along_k(format) || format.zero_point;
  w.format = first.format;
  w.k = out.k;
  w.panels = out.paired ? 2 * ((parts[0].rows + kPanel - 1) / kPanel) : (out.n + kPanel - 1) / kPanel;
  w.codes = quant::code_bits(format.code) == 4                   ? Codes::kPairs4
            : integer_sums(first.format) && int8_dot_ != nullptr ? Codes::kQuads8
                                                                 : Codes::kPairs8;
  // 255 · 127 · k stays an int32.
  if (w.codes == Codes::kQuads8 && w.k > 65536)
    return Status::invalid(parts[0].name + ": " + std::to_string(w.k) +
                           " columns are too many for int8 sums");
  w.panel_bytes = w.codes == Codes::kQuads8   ? static_cast<std::int64_t>((w.k + 3) / 4) * 4 * kPanel
                  : w.codes == Codes::kPairs8 ? static_cast<std::int64_t>((w.k + 1) / 2) * 2 * kPanel
                                              : static_cast<std::int64_t>((w.k + 1) / 2) * kPanel;
  if (w.codes != Codes::kQuads8) w.table = value_table(format.code, format.zero_point);
  if (along_k) {
    w.group = format.group > 0 ? format.group : (w.k + 1) / 2 * 2;  // zero points by row: one group
    w.groups = (w.k + w.group - 1) / w.group;
  }
  const std::size_t columns = static_cast<std::size_t>(w.panels) * kPanel;
  const std::size_t grouped = columns * static_cast<std::size_t>(w.groups);
  const auto take = [&]<typename T>(std::size_t count, T*& to) -> Status {
    SF_ASSIGN_OR_RETURN(void* memory, allocate(count * sizeof(T)));
    to = static_cast<T*>(memory);
    out.bytes += count * sizeof(T);
    return {};
  };
  std::byte* data = nullptr;
  std::uint16_t* folded = nullptr;
  float *group_scales = nullptr, *column_scale = nullptr, *multiplier = nullptr;
  std::uint8_t* shifts = nullptr;
  std::int32_t* sums = nullptr;
  SF_RETURN_IF_ERROR(
      take(static_cast<std::size_t>(w.panels) * static_cast<std::size_t>(w.panel_bytes), data));
  if (along_k && folds(format)) SF_RETURN_IF_ERROR(take(grouped, folded));
  if (along_k && !folds(format)) SF_RETURN_IF_ERROR(take(grouped, group_scales));
  if (format.zero_point) SF_RETURN_IF_ERROR(take(grouped, shifts));
  if (!along_k || (folds(format) && format.global_scale)) SF_RETURN_IF_ERROR(take(columns, column_scale));
  if (w.codes == Codes::kQuads8) SF_RETURN_IF_ERROR(take(columns, sums));
  if (!first.input_multiplier.empty()) {
    SF_RETURN_IF_ERROR(take(first.input_multiplier.size(), multiplier));
    std::copy(first.input_multiplier.begin(), first.input_multiplier.end(), multiplier);
  }
  w.data = data;
  w.folded = folded;
  w.adds_exponents = folded != nullptr && format.code == Code::kE2M1 && format.scale == ScaleCode::kE4M3;
  w.scales = group_scales;
  w.shifts = shifts;
  w.column_scale = column_scale;
  w.column_sum = sums;
  w.input_multiplier = multiplier;
  if (first.format.input.needs_calibration() && !first.input_scale)
    return Status::invalid(parts[0].name + ": format " + quant::name(first.format) +
                           " needs a calibrated input scale, and the checkpoint has none");
  if (first.format.input.needs_calibration()) w.input_scale = first.input_scale;
  w.input_zero = first.format.input.zero_point ? first.input_zero_point : 0;

  std::atomic<bool> good{true};
  pool_.parallel_for(w.panels, [&](int panel, int) {
    std::byte* codes = data + panel * w.panel_bytes;
    std::memset(codes, 0, static_cast<std::size_t>(w.panel_bytes));
    for (int column = 0; column < kPanel; ++column) {
      const Source from = source_of(parts, out.paired, panel, column);
      if (from.matrix == nullptr) continue;
      const ColumnPacker packer(w, from, panel, column);
      if (!packer.codes(codes, sums == nullptr ? nullptr : sums + panel * kPanel + column) ||
          !packer.scales(folded, group_scales, shifts, column_scale))
        good.store(false, std::memory_order_relaxed);
    }
  });
  if (!good.load()) return bad_element(parts);
  out.data = data;
  out.layout = owned.get();
  low_bit_.push_back(std::move(owned));
  return out;
}

// ---- unpacking where there is no AVX-512

void unpack_plain(const UnpackBlock& b) {
  const int group = b.group_pairs > 0 ? b.group_pairs : std::max(1, b.pairs);
  auto* out = reinterpret_cast<std::uint16_t*>(b.panel);
  for (int p = 0; p < b.pairs; ++p) {
    const std::uint8_t* shifts =
        b.group_pairs > 0 && b.shifts != nullptr ? b.shifts + p / group * kPanel : nullptr;
    const std::uint16_t* folded =
        b.group_pairs > 0 && b.folded != nullptr ? b.folded + p / group * kPanel : nullptr;
    for (int column = 0; column < kPanel; ++column)
      for (int i = 0; i < 2; ++i) {
        unsigned index = 0;
        if (b.codes == Codes::kPairs4) {
          const auto byte = static_cast<unsigned>(b.data[p * kPanel + column % 16 * 2 + i]);
          index = column < 16 ? byte & 15u : byte >> 4;
          if (shifts != nullptr) index = (index + shifts[column]) & 31u;
        } else {
          index = static_cast<unsigned>(b.data[(p * kPanel + column) * 2 + i]);
        }
        std::uint16_t bits = b.table[index];
        if (folded != nullptr) bits = bf16_bits(to_float(bf16{bits}) * to_float(bf16{folded[column]}));
        out[(p * kPanel + column) * 2 + i] = bits;
      }
  }
}

}  // namespace servoflow::ops::cpu
