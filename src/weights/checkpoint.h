// Opening a checkpoint directory: which layout it has, whether it is a pi0.5 at all, and whether every tensor
// is there in the shape its sizes demand. Strict: whatever is missing, extra or contradictory is told in one
// list.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/json.h"
#include "servoflow/status.h"
#include "weights/architecture.h"
#include "weights/config.h"
#include "weights/weight_source.h"

namespace servoflow::weights {

// Linear layers of one part of the network that are stored alike.
struct StoredPrecision {
  std::string component;  // as component_of names it
  // By the quantization config "int8-w8a8", "nvfp4-w4a16", …; for layers in floating point their dtype:
  // "bf16", "fp32", "fp16", "fp64".
  std::string precision;
  std::string group;   // of the config; empty for layers in floating point
  std::string layout;  // that group's ("nvfp4-pack-quantized")
  int layers = 0;
  std::uint64_t parameters = 0, bytes = 0;  // bytes with the scales
};

struct Checkpoint {
  std::string path;
  Layout layout = Layout::kOpenpi;
  Architecture architecture;
  Json config;  // config.json; object keys are sorted, so read the file itself where its order counts
  std::shared_ptr<const WeightSource> source;
  std::vector<std::string> ignored;  // names, as stored, of allowed tensors the network does not use
  std::uint64_t parameters = 0;      // of the tensors it uses
  std::vector<StoredPrecision> precisions;
};

// Opens a directory. One error lists every problem: missing, extra or misshapen tensors, dtypes,
// contradictory sizes. pi0, pi0-FAST, memory variants, JAX directories and bare adapters are recognised and
// refused by name. Tensor data is mapped, not read.
Result<Checkpoint> open_checkpoint(const std::string& dir);

// Tensors, parameters and bytes of one kind.
struct TensorCount {
  std::string what;  // a dtype ("BF16") or a component ("vision")
  std::uint64_t tensors = 0, parameters = 0, bytes = 0;
};

struct IgnoredTensor {
  std::string name;  // as stored
  std::string reason;
};

// Everything `servoflow inspect` shows of the weights.
struct Inspection {
  std::string path;
  std::optional<Layout> layout;              // absent if nothing tells it
  std::optional<Architecture> architecture;  // absent if config.json does not give sound sizes
  std::string sizes_from;                    // "architecture block" or the variants' names
  Json config;
  std::vector<std::string> files;  // weight files, relative to the directory
  std::uint64_t stored_tensors = 0, stored_bytes = 0;
  std::vector<TensorCount> dtypes;      // of the used tensors
  std::vector<TensorCount> components;  // of the used tensors, in the order of the network
  std::uint64_t parameters = 0;
  std::string quantization;  // whose config: "compressed-tensors" | "modelopt"; empty: in floating point
  std::vector<StoredPrecision> precisions;  // in the order of the network
  std::string token_table;                  // stored name the token table is read from
  std::vector<IgnoredTensor> ignored;
  std::vector<std::string> unused_config;  // keys of config.json that say nothing about the network
  std::string tokenizer;                   // the tokenizer file that would be used; empty if none was found
  std::vector<std::string> problems;       // empty: open_checkpoint succeeds
};

// Never fails as a whole: what is wrong is in `problems`, what could be found out is in the other fields.
Inspection inspect_checkpoint(const std::string& dir);

// The SentencePiece model: `option` (--tokenizer) if not empty, else the config's architecture.tokenizer,
// DIR/tokenizer.model, DIR/tokenizer/tokenizer.model, $SERVOFLOW_TOKENIZER. The error says which public file
// to pass.
Result<std::string> find_tokenizer(const Checkpoint& checkpoint, const std::string& option);
Result<std::string> find_tokenizer(const std::string& dir, const std::string& named_by_config,
                                   const std::string& option);

}  // namespace servoflow::weights
