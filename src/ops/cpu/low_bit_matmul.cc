// y = epilogue(x · Wᵀ) with a weight of 8 or 4 bits. First the rows of x become codes, then tasks as in
// matmul.cc: a group of two panels by a chunk of rows. A panel that is not multiplied as it lies is unpacked
// in the thread's scratch, once per chunk and block of K (for most codes of 4 bits by the chunk's first rows
// as they pass), where it stays in the second-level cache while the other rows pass.
#include <algorithm>
#include <cstring>

#include "core/zones.h"
#include "ops/cpu/cpu_backend.h"
#include "quant/matrix.h"

namespace servoflow::ops::cpu {
namespace {

constexpr int kGroup = 2;  // panels per task
constexpr int kMaxChunkRows = 392;
constexpr int kIntegerDepth = 2048;     // of K
constexpr int kUnpackedDepth = 512;     // a panel of 32 KiB, for many rows
constexpr int kDecodedDepth = 2048;     // where decoding costs next to nothing: as for bf16
constexpr int kExactDepth = 256;        // in float32: short sums
constexpr int kChunkBytes = 400 << 10;  // of x, per block of K

int even_share(int total, int most) {
  const int parts = (total + most - 1) / most;
  return (total + parts - 1) / parts;
}
int round_up(int n, int to) { return (n + to - 1) / to * to; }

}  // namespace

// The inputs of a product as it reads them.
struct CpuBackend::Codes8 {
  const std::byte* data = nullptr;
  std::int64_t pitch = 0;  // elements
  std::size_t element = 1;
  DType dtype = DType::kBF16;
  const float* scale = nullptr;  // per row, or null
};

bool CpuBackend::need_input_codes(std::size_t bytes, std::size_t rows) {
  const std::size_t scales = rows * sizeof(float);
  if (input_codes_.bytes() < bytes) input_codes_ = HostBlock(bytes);
  if (input_scales_.bytes() < scales) input_scales_ = HostBlock(scales);
  if (input_codes_.data() != nullptr && input_scales_.data() != nullptr) return true;
  fail(Status::runtime("out of memory: " + std::to_string(bytes + scales) + " bytes of rounded inputs"));
  return false;
}

bool CpuBackend::round_inputs(const Matmul& op, const LowBitWeight& w, int rows, Codes8& out) {
  const quant::InputFormat& in = w.format.input;
  const bool integers = w.codes == Codes::kQuads8;
  const bool by_row = in.quantized() && in.granularity != quant::Granularity::kGroup && !in.zero_point;
  const bool nvfp4 = in.code == quant::Code::kE2M1 && in.scale == quant::ScaleCode::kE4M3;
  const bool untouched = !in.quantized() && w.input_multiplier == nullptr;
  out.dtype = codes_dot_ != nullptr && (!in.quantized() || bf16_holds(in)) ? DType::kBF16 : DType::kF32;
  out.element = integers ? 1 : dtype_size(out.dtype);
  if (untouched && op.x.dtype == out.dtype) {
    out.data = static_cast<const std::byte*>(op.x.data);
    out.pitch = op.x.pitch;
    return true;
  }
  const zones::Zone zone("quantize");
  out.pitch = pitch(round_up(w.k, 64), integers ? DType::kU8 : out.dtype);
  if (!need_input_codes(
          static_cast<std::size_t>(op.rows.capacity) * static_cast<std::size_t>(out.pitch) * out.element,
          static_cast<std::size_t>(op.rows.capacity)) ||
      !need_scratch(static_cast<std::size_t>(round_up(w.k, 64)) * sizeof(float)))
    return false;
  float* scales = reinterpret_cast<float*>(input_scales_.data());
  std::byte* data = input_codes_.data();
  const int per_task = std::clamp(rows / (4 * pool_.threads()), 1, 16);
  pool_.parallel_for((rows + per_task - 1) / per_task, [&](int task, int thread) {
    for (int i = task * per_task; i < std::min(rows, (task + 1) * per_task); ++i) {
      float* values = reinterpret_cast<float*>(scratch(thread));
      const InputRow row{.x = static_cast<const std::byte*>(op.x.data) +
                              static_cast<std::size_t>(i * op.x.pitch) * dtype_size(op.x.dtype),
                         .dtype = op.x.dtype,
                         .k = w.k,
                         .multiplier = w.input_multiplier,
                         .static_scale = w.input_scale,
                         .values = values};
      std::byte* to = data + static_cast<std::size_t>(i * out.pitch) * out.element;
      if (integers) {
        scales[i] = int8_row(row, w.input_zero, reinterpret_cast<std::uint8_t*>(to));
      } else if (by_row) {
        scales[i] = code_row(row, in.code, to, out.dtype);
      } else if (nvfp4) {
        scales[i] = nvfp4_row(row, to, out.dtype);
      } else {
        load_input_row(row);
        quant::fake_quantize_rows(in, values, 1, w.k, w.k, w.input_scale, w.input_zero);
        store_scaled(values, w.k, 1.0f, to, out.dtype);
      }
    }
  });
  out.data = data;
  out.scale = integers || by_row || nvfp4 ? scales : nullptr;
  return true;
}

void CpuBackend::low_bit_matmul(const Matmul& op, int rows) {
  const LowBitWeight& w = *static_cast<const LowBitWeight*>(op.w->layout);
  Codes8 x;
  if (!round_inputs(op, w, rows, x)) return;
  const bool integers = w.codes == Codes::kQuads8, dot = !integers && x.dtype == DType::kBF16;
  const int share = even_share(w.k, integers                                                ? kIntegerDepth
                                    : !dot                                                  ? kExactDepth
                                    : decodes_in_place(w.codes, w.adds_exponents, w.scales) ? kDecodedDepth
                                                                                            : kUnpackedDepth);
  const int depth = round_up(share, integers ? 4 : std::max(2, w.group));
  const int group = op.w->paired || w.panels >= 8 * pool_.threads() ? kGroup : 1;
  const int groups = (w.panels + group - 1) / group;
  const int cached_rows = kChunkBytes / (depth * static_cast<int>(x.element)) / 14 * 14;
  const int chunk = even_share(rows, std::clamp(cached_rows, 56, kMaxChunkRows));
  const int chunks = (rows + chunk - 1) / chunk;
  constexpr std::int64_t c_pitch = kGroup * kPanel;
  constexpr std::size_t c_bytes = static_cast<std::size_t>(kMaxChunkRows) * kGroup * kPanel * sizeof(float);
  const std::size_t panel_bytes = integers ? 0 : static_cast<std::size_t>(depth) * kPanel * 2;
  const std::size_t sum_bytes =
      w.scales != nullptr && !dot ? static_cast<std::size_t>(kMaxChunkRows) * kPanel * 4 : 0;
  if (!need_scratch(c_bytes + panel_bytes + sum_bytes)) return;
  const std::int64_t code_row = w.codes == Codes::kPairs4 ? kPanel : 2 * kPanel;  // bytes of a pair of k's

  pool_.parallel_for(groups * chunks, [&](int task, int thread) {
    const int first_panel = task / chunks * group, last_panel = std::min(w.panels, first_panel + group);
    const int first_row = task % chunks * chunk, count = std::min(rows, first_row + chunk) - first_row;
    float* c = reinterpret_cast<float*>(scratch(thread));
    auto* unpacked = reinterpret_cast<std::uint32_t*>(scratch(thread) + c_bytes);
    float* sum = reinterpret_cast<float*>(scratch(thread) + c_bytes + panel_bytes);
    const std::byte* a = x.data + static_cast<std::size_t>(first_row * x.pitch) * x.element;
    for (int k = 0; k < w.k; k += depth)
      for (int panel = first_panel; panel < last_panel; ++panel) {
        const int length = std::min(depth, w.k - k);
        const std::byte* codes = w.data + panel * w.panel_bytes;
        const std::byte* a_block = a + static_cast<std::size_t>(k) * x.element;
        float* c_panel = c + (panel - first_panel) * kPanel;
        if (integers) {
          int8_dot_(reinterpret_cast<const std::uint8_t*>(a_block), x.pitch, count, codes + k * kPanel,
                    (length + 3) / 4, reinterpret_cast<std::int32_t*>(c_panel), c_pitch, k > 0);
          continue;
        }
        const std::int64_t first_group =
            w.group > 0 ? (static_cast<std::int64_t>(panel) * w.groups + k / w.group) * kPanel : 0;
        const UnpackBlock block{.codes = w.codes,
                                .code = w.format.weight.code,
                                .data = codes + k / 2 * code_row,
                                .pairs = (length + 1) / 2,
                                .table = w.table.data(),
                                .group_pairs = w.group / 2,
                                .shifts = w.shifts != nullptr ? w.shifts + first_group : nullptr,
                                .folded = w.folded != nullptr ? w.folded + first_group : nullptr,
                                .adds_exponents = w.adds_exponents,
                                .panel = unpacked};
        if (dot) {
          codes_dot_(a_block, x.pitch, count, block, length,
                     w.scales != nullptr ? w.scales + first_group : nullptr, c_panel, c_pitch, k > 0);
          continue;
        }
        unpack_(block);
        if (w.scales == nullptr) {
          panel_f32_bf16(a_block, x.pitch, count, unpacked, length, c_panel, c_pitch, k > 0);
          continue;
        }
        for (int g = 0; g < length; g += w.group) {
          const void* part = a_block + static_cast<std::size_t>(g) * x.element;
          const std::uint32_t* b = unpacked + g / 2 * kPanel;
          const float* scale = w.scales + first_group + g / w.group * kPanel;
          const int terms = std::min(w.group, length - g);
          panel_f32_bf16(part, x.pitch, count, b, terms, sum, kPanel, false);
          for (int r = 0; r < count; ++r)
            for (int j = 0; j < kPanel; ++j) {
              float& to = c_panel[r * c_pitch + j];
              to = (k + g > 0 ? to : 0.0f) + sum[r * kPanel + j] * scale[j];
            }
        }
      }
    const int columns = (last_panel - first_panel) * kPanel;
    const float* column_scale = w.column_scale != nullptr ? w.column_scale + first_panel * kPanel : nullptr;
    const float* row_scale = x.scale != nullptr ? x.scale + first_row : nullptr;
    if (integers) {
      scale_ints(reinterpret_cast<std::int32_t*>(c), c_pitch, count, columns, 128 + w.input_zero,
                 w.column_sum + first_panel * kPanel, column_scale, row_scale);
    } else if (column_scale != nullptr || row_scale != nullptr) {
      scale_floats(c, c_pitch, count, columns, column_scale, row_scale);
    }
    store_product(op, first_panel, last_panel, first_row, count, c, c_pitch);
  });
}

}  // namespace servoflow::ops::cpu
