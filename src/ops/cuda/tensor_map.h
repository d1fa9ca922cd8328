// Descriptions of matrices for the bulk tensor copy engine, made by the driver.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace servoflow::ops::cuda {

// A bf16 matrix [rows, cols], `pitch` elements from row to row, read in boxes of 64 columns and `box_rows`
// rows with the 128-byte swizzle; what lies outside reads as zero. False if the driver refuses.
bool tensor_map(CUtensorMap& map, const void* data, std::int64_t rows, std::int64_t cols, std::int64_t pitch,
                int box_rows);

// Likewise in boxes of `box_rows` whole rows: 64 columns of all of them, then the next 64. `cols` is a
// multiple of 64.
bool tensor_map_of_rows(CUtensorMap& map, const void* data, std::int64_t rows, std::int64_t cols,
                        std::int64_t pitch, int box_rows);

}  // namespace servoflow::ops::cuda
