// Image and text tokens -> Gemma -> K/V slots. Ragged: only valid tokens exist.
#pragma once

#include <vector>

#include "ops/composite/composite.h"
#include "weights/architecture.h"
#include "weights/loader.h"

namespace servoflow::stages {

struct PrefixRun {
  ops::Matrix text;                   // token rows as gathered, [tokens, width] float32; or
  const std::int32_t* ids = nullptr;  // device, [tokens]: rows of the table on the device
  ops::Count text_rows;
  const std::int32_t* text_map = nullptr;  // row of x for each token
  ops::Matrix x;                           // [rows, width] float32; image tokens are already there
  ops::Count rows;
  ops::Segments segments;  // one per request, past = 0
  const ops::KvCache* cache = nullptr;
  const ops::RopeTable* rope = nullptr;
  ops::BlockScratch scratch;
};

class Prefix {
 public:
  static Result<Prefix> load(weights::Loader& loader, const weights::Architecture& architecture);
  // Text tokens times sqrt(width), to their rows.
  void embed(ops::Backend& backend, const PrefixRun& run) const;
  // All layers; of the last one only K and V (nobody reads the prefix's output).
  void run(ops::Backend& backend, const PrefixRun& run) const;

 private:
  weights::GemmaSizes sizes_;
  std::vector<ops::GemmaWeights> layers_;
  ops::Matrix table_;  // where the backend takes ids
};

}  // namespace servoflow::stages
