// The published layouts by name, and which format each can hold.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "quant/formats.h"
#include "quant/matrix.h"

namespace servoflow::quant {

// compressed-tensors' format string for a linear layer ("nvfp4-pack-quantized", "pack-quantized", …); nothing
// where it has none (E5M2, int4 weights with FP8 inputs, …).
std::optional<std::string_view> compressed_tensors_layout(const LinearFormat& format);

// ModelOpt's quant_algo; nothing where it has none. `pre_quant_scale`: inputs are multiplied first.
std::optional<std::string_view> modelopt_algorithm(const LinearFormat& format, bool pre_quant_scale);
// Inverse; `group` is its group_size, 0 for the algorithm's usual one.
std::optional<LinearFormat> modelopt_format(std::string_view algorithm, int group);

// Columns that files store: K, or the next multiple of the group. Neither library reads a short last group,
// so files hold zeros in its place.
std::int64_t stored_cols(const WeightFormat& format, std::int64_t cols);

}  // namespace servoflow::quant
