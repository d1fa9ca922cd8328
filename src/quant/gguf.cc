#include "quant/gguf.h"

#include <string>

#include "quant/pack.h"

namespace servoflow::quant {

Result<std::vector<std::uint8_t>> gguf_blocks(const QuantizedMatrix& m) {
  const WeightFormat& format = m.format.weight;
  if (format.code != Code::kE2M1 || !m.group_of_column.empty())
    return Status::invalid("GGUF: " + name(m.format) + " is neither nvfp4 nor mxfp4");
  const bool nvfp4 = format.global_scale;
  const std::int64_t block = nvfp4 ? 64 : 32, sub = nvfp4 ? 16 : 32;
  if (m.cols % block != 0)
    return Status::invalid("GGUF: " + std::to_string(m.cols) + " columns are no multiple of " +
                           std::to_string(block) + ", and ggml has no shorter blocks");
  const std::int64_t subs = block / sub;
  std::vector<std::uint8_t> out;
  out.reserve(static_cast<std::size_t>(m.rows * m.cols / block * (subs + block / 2)));
  for (std::int64_t r = 0; r < m.rows; ++r) {
    const std::uint8_t* row = m.codes.data() + static_cast<std::size_t>(r) * m.pitch;
    for (std::int64_t k = 0; k < m.cols; k += block) {
      for (std::int64_t s = 0; s < subs; ++s) {
        const std::uint8_t scale = m.scales[static_cast<std::size_t>(m.scale_index(r, k + s * sub))];
        out.push_back(nvfp4 ? scale & 0x7f : scale);
      }
      for (std::int64_t s = 0; s < subs; ++s)
        for (std::int64_t j = 0; j < sub / 2; ++j) {
          const std::int64_t low = k + s * sub + j;
          out.push_back(static_cast<std::uint8_t>(nibble(row, low) | nibble(row, low + sub / 2) << 4));
        }
    }
  }
  return out;
}

}  // namespace servoflow::quant
