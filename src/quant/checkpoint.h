// Quantized checkpoints of two libraries, compressed-tensors and NVIDIA ModelOpt: their configs and their
// tensors, read and written.
//
// Everything works on a lookup, tensor name -> bytes, so that safetensors files, tests and fuzzers serve
// alike. The lookup takes the engine's names (openpi's, without a leading "model."); where the file's own
// names differ, it translates. docs/quantization-formats.md has the layouts.
#pragma once

#include <cstddef>
#include <functional>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/dtype.h"
#include "core/json.h"
#include "core/shape.h"
#include "quant/matrix.h"
#include "quant/precision_plan.h"
#include "servoflow/status.h"

namespace servoflow::quant {

struct TensorView {
  DType dtype = DType::kF32;
  Shape shape;
  std::span<const std::byte> bytes;  // row-major, little-endian, may be unaligned
};
using TensorLookup = std::function<std::optional<TensorView>(const std::string& name)>;

// One scheme of a config and the layers it is for.
struct ConfigGroup {
  std::string name;                  // "group_0"; ModelOpt: the algorithm
  std::vector<std::string> targets;  // exact name, "re:" expression, class ("Linear"), ModelOpt: globs
  std::string layout;                // "nvfp4-pack-quantized", …; ModelOpt: "NVFP4", "W4A16_AWQ", …
  LinearFormat format;
};

struct QuantConfig {
  Convention convention = Convention::kCompressedTensors;
  std::vector<ConfigGroup> groups;
  std::vector<std::string> ignore;

  // The group that layer `linear_name` falls under; null when it stays in floating point. Exact names beat
  // expressions, those beat class names; ignored layers fall under none. Names are compared with and without
  // a leading "model.".
  const ConfigGroup* group_of(const std::string& linear_name) const;
};

// Finds the quantization in a checkpoint's config.json ("quantization_config", also inside "text_config", or
// "compression_config") and parses it; nothing when it has none. Other methods (awq, gptq, bitsandbytes, …)
// are errors.
Result<std::optional<QuantConfig>> find_quant_config(const Json& config, const std::string& where);
// A quantization_config object; hf_quant_config.json's document. All problems at once.
Result<QuantConfig> parse_compressed_tensors(const Json& config, const std::string& where);
Result<QuantConfig> parse_modelopt(const Json& document, const std::string& where);

// Names of the tensors that hold layer `linear_name` in this group, required ones first: what belongs to the
// layer in a strict check of a checkpoint. Its bias is not among them.
struct LayerTensors {
  std::vector<std::string> required, optional;
};
LayerTensors layer_tensors(const std::string& linear_name, const ConfigGroup& group, Convention convention);

// Reads one layer. `rows`, `cols`: the network's own sizes. Every contradiction between config, dtypes,
// shapes and values (NaN scales, zero points outside the codes, …) is an error that names the tensor. Codes
// and scales are views into the lookup's bytes where the layouts agree; the result then lives as long as
// those. The result's format has the scales' type that the tensors have, which a config does not tell; all
// else is the group's format.
Result<QuantizedMatrix> read_linear(const std::string& linear_name, const ConfigGroup& group,
                                    Convention convention, std::int64_t rows, std::int64_t cols,
                                    const TensorLookup& lookup);

struct StoredTensor {
  std::string name;
  DType dtype = DType::kF32;
  Shape shape;
  std::vector<std::byte> bytes;
};
// The tensors of one layer in the convention's layout. Fails for a format that the library has no layout for
// (asymmetric int4 in ModelOpt, …). A global scale read from the other library is inverted; what this file
// held itself is written back bit for bit.
Result<std::vector<StoredTensor>> write_linear(const std::string& linear_name, const QuantizedMatrix& matrix,
                                               Convention convention);

// The config for a network whose linear layers, all of them, have these formats (one that is missing here
// would count as quantized to readers): `quantization_config` for config.json (compressed-tensors), or the
// document of hf_quant_config.json (ModelOpt). Layers in fp32 or bf16 are listed as ignored.
// `producer_version` goes into the document. Layers named in `pre_quant_scaled` have an input_multiplier,
// which only ModelOpt can say.
Result<Json> write_config(std::span<const Linear> linears, std::span<const LinearFormat> formats,
                          Convention convention, const std::string& producer_version,
                          const std::set<std::string>& pre_quant_scaled = {});
// What ModelOpt's readers look for in config.json: the same data with quant_method "modelopt".
Json modelopt_config_json(const Json& hf_quant_config);

}  // namespace servoflow::quant
