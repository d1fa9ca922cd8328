// Blocks of two GGUF tensor types (ggml): the bytes of a tensor's data. The container around them is not
// written here.
//
//   MXFP4 (type 39): 32 elements in 17 bytes: E8M0 exponent, then 16 bytes; byte j holds element j (low) and
//   j + 16. NVFP4 (type 40): 64 elements in 36 bytes: 4 UE4M3 block scales, then 32 bytes; byte j of the 8
//   bytes of sub-block s holds
//                    elements 16 s + j (low) and 16 s + j + 8. The global scale is a tensor of its own, F32,
//                    "<name>.scale", that multiplies after the product, like ModelOpt's weight_scale_2.
#pragma once

#include <cstdint>
#include <vector>

#include "quant/matrix.h"
#include "servoflow/status.h"

namespace servoflow::quant {

inline constexpr int kGgmlTypeMxfp4 = 39;
inline constexpr int kGgmlTypeNvfp4 = 40;

// All rows of an mxfp4 or nvfp4 matrix, one after the other. Fails where K is no multiple of 32 or 64: ggml
// has no short blocks (SigLIP's 4304 columns cannot be NVFP4 there). Scales are kept to the bit.
Result<std::vector<std::uint8_t>> gguf_blocks(const QuantizedMatrix& matrix);

}  // namespace servoflow::quant
