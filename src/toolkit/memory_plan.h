// How much memory a checkpoint will take once it runs, told before anything is loaded.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/json.h"
#include "weights/architecture.h"

namespace servoflow::toolkit {

struct MemoryPlan {
  std::string precision;          // "fp32", "bf16"
  std::string unavailable;        // why this machine cannot run it; empty: it can
  std::uint64_t weights = 0;      // packed matrices, and vectors in float32
  std::uint64_t workspace = 0;    // activations, K/V slots, staging: one block, planned once
  std::uint64_t token_table = 0;  // stays mapped in the checkpoint's file; only rows in use become resident
  std::uint64_t total() const { return weights + workspace; }
};

// `stored_size` is bytes per element of the token table in the file; `pictures` is how many camera slots
// there are.
std::vector<MemoryPlan> plan_memory(const weights::Architecture& architecture, int pictures,
                                    double stored_size);

// What is packed of the weights: matrices at `matrix_size` bytes per element, the rest in float32; without
// the token table and without what only the prefix's unused output needs.
std::uint64_t packed_weight_bytes(const weights::Architecture& architecture, double matrix_size);

Json memory_to_json(const std::vector<MemoryPlan>& plans);

// "3.7 GB", "41 MB", "512 B": three digits, decimal units.
std::string bytes_text(double bytes);

}  // namespace servoflow::toolkit
