// How much arithmetic and memory traffic one inference needs, exactly: what a measured time is compared with.
//
// Counted: matrix products (2 floating-point operations per weight and row) and attention (4 per query, key
// and head column). Not counted: norms, activations, softmax, biases, position tables (below 1 %), masked
// cameras and pad tokens (never computed), everything of the last prefix layer after its K and V (its output
// is not used), and the AdaRMS modulations, which depend on the schedule only and are built once for it.
#pragma once

#include <cstdint>
#include <span>

#include "core/json.h"
#include "weights/architecture.h"

namespace servoflow::toolkit {

struct WorkShape {
  int views = 2, tokens = 200, horizon = 50, steps = 10, batch = 1;
};

struct StageWork {
  std::uint64_t weights = 0;  // of the matrices, read in every pass
  double flops = 0;           // of a pass over the whole batch
  double weight_bytes = 0;    // each weight once per pass, however many rows share it
  double cache_bytes = 0;     // K and V of the prefix: written by `prefix`, read by every step
  double bytes() const { return weight_bytes + cache_bytes; }
};

struct Work {
  StageWork vision, prefix, step, denoise, all;  // denoise = steps x step
  std::uint64_t modulation_weights = 0;          // time MLP and AdaRMS, hoisted out of the steps
};

// `weight_size` and `cache_size` are bytes per stored weight and per cached K or V element.
Work count_work(const weights::Architecture& architecture, const WorkShape& shape, double weight_size,
                double cache_size);

// The same for a batch of different requests (`batch` of each is 1): rows add up, weights are read once.
Work count_batch(const weights::Architecture& architecture, std::span<const WorkShape> requests,
                 double weight_size, double cache_size);

Json work_to_json(const StageWork& work);

}  // namespace servoflow::toolkit
