// The end of one step and the beginning of the next as a kernel: a block per row.
#include "ops/cuda/expert_edge.cuh"

namespace servoflow::ops::cuda {
namespace {

__global__ void __launch_bounds__(kEdgeThreads) expert_edge_kernel(const __grid_constant__ ExpertEdge op) {
  __shared__ __align__(16) EdgeMemory memory;
  wait_for_inputs();
  release_successor();
  const int row = static_cast<int>(blockIdx.x);
  if (row >= valid(op.rows)) return;
  edge_row(op, row, [row](int column) { return tiled_at(row, column, kExpertWidth); },
           static_cast<int>(threadIdx.x), memory, [] { __syncthreads(); });
}

}  // namespace

cudaError_t expert_edge(const Stream& s, const ExpertEdge& op) {
  return launch(s, dim3(static_cast<unsigned>(op.rows.capacity)), kEdgeThreads, 0, expert_edge_kernel, op);
}

}  // namespace servoflow::ops::cuda
