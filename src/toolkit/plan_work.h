// The work of one inference split further than toolkit/work.h does: per component, products apart from
// attention, so that each can be given the rate of its own precision. The sums are those of count_work to the
// bit.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "toolkit/work.h"

namespace servoflow::toolkit {

struct ComponentWork {
  std::string name;           // the trace zone's: "prefix/mlp", "denoise/attention"
  std::uint64_t weights = 0;  // of its matrices
  double products = 0;        // floating-point operations with weights, one pass over the batch
  double attention = 0;       // between activations
  double cached = 0;          // elements of K and V written (prefix) or read (denoise)
};

struct StageParts {
  std::string name;  // "vision", "prefix", "step"
  std::vector<ComponentWork> components;
  int layers = 0;
  std::uint64_t weights() const;
  double products() const, attention() const, cached() const;
};

struct PlanWork {
  StageParts vision, prefix, step;
  // Time MLP and AdaRMS: once per schedule, not per inference, where they are hoisted out of the steps.
  std::uint64_t modulation_weights = 0;
};

PlanWork count_components(const weights::Architecture& architecture, const WorkShape& shape);
// Rows of a batch of different requests add up, weights do not (count_batch).
PlanWork count_components(const weights::Architecture& architecture, std::span<const WorkShape> requests);

}  // namespace servoflow::toolkit
