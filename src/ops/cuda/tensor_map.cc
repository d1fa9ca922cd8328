#include "ops/cuda/tensor_map.h"

#include <cuda_runtime.h>

namespace servoflow::ops::cuda {

namespace {

template <unsigned kDims>
bool encode(CUtensorMap& map, const void* data, const cuuint64_t (&sizes)[kDims],
            const cuuint64_t (&strides)[kDims - 1], const cuuint32_t (&box)[kDims]) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                         &found) != cudaSuccess ||
        found != cudaDriverEntryPointSuccess)
      function = nullptr;
    return reinterpret_cast<Encode>(function);
  }();
  const cuuint32_t steps[3] = {1, 1, 1};
  return encoder != nullptr &&
         encoder(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kDims, const_cast<void*>(data), sizes, strides, box,
                 steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace

bool tensor_map(CUtensorMap& map, const void* data, std::int64_t rows, std::int64_t cols, std::int64_t pitch,
                int box_rows) {
  return encode<2>(map, data, {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)},
                   {static_cast<cuuint64_t>(pitch) * 2}, {64, static_cast<cuuint32_t>(box_rows)});
}

bool tensor_map_of_rows(CUtensorMap& map, const void* data, std::int64_t rows, std::int64_t cols,
                        std::int64_t pitch, int box_rows) {
  return encode<3>(map, data, {64, static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(cols) / 64},
                   {static_cast<cuuint64_t>(pitch) * 2, 128},
                   {64, static_cast<cuuint32_t>(box_rows), static_cast<cuuint32_t>(cols / 64)});
}

}  // namespace servoflow::ops::cuda
