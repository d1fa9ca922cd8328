// Where a network's tensors come from: published files or the synthetic generator. The engine sees only this.
//
// Tensor names are openpi's, without a leading "model.":
// "paligemma_with_expert.gemma_expert.model.layers.0…". The token table goes by its own accessor, because it
// is used in place (mapped, or regenerated row by row).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/shape.h"
#include "ops/backend.h"
#include "quant/matrix.h"
#include "servoflow/status.h"

namespace servoflow::weights {

// A tensor's elements in host memory, row-major. `owner` keeps generated data alive; mapped data lives as
// long as its source. Dropping the view of a mapped tensor changes nothing: call WeightSource::release when
// it was packed.
struct TensorData {
  DType dtype = DType::kF32;  // kF32, kBF16, kF16 or kF64
  Shape shape;
  std::span<const std::byte> bytes;  // may be unaligned
  std::shared_ptr<const void> owner;
  std::optional<ops::Sequence> sequence = {};  // instead of bytes (WeightSource::describe)
};

class WeightSource {
 public:
  virtual ~WeightSource() = default;
  virtual bool has(const std::string& name) const = 0;
  // Thread-safe. Fails for a name the manifest does not know.
  virtual Result<TensorData> get(const std::string& name) const = 0;
  // The same for a backend that generates: a generated tensor comes as its sequence, without bytes.
  virtual Result<TensorData> describe(const std::string& name) const { return get(name); }
  // The tensor's pages will not be read again (a hint; no-op for generated data).
  virtual void release(const std::string& name) const = 0;
  // Rows of the token table as float32, each `width` wide, into `out` [ids.size(), width]. Ids outside the
  // table fail. Allocates nothing. Thread-safe.
  virtual Status token_rows(std::span<const std::int32_t> ids, std::span<float> out) const = 0;
  // A quantized layer's weight as it is stored, by the weight's tensor name; nothing for one in floating
  // point. `get` gives the same dequantized, in float32.
  virtual Result<std::optional<quant::QuantizedMatrix>> quantized(const std::string& /*name*/) const {
    return std::optional<quant::QuantizedMatrix>();
  }
  // Its format, without reading it.
  virtual std::optional<quant::LinearFormat> format_of(const std::string& /*name*/) const { return {}; }
  // The formats of all quantized layers, each once, and their names for reports; empty if there are none.
  virtual std::vector<quant::LinearFormat> formats() const { return {}; }
  std::string quantization() const;
  // How the weights are stored, for reports: "BF16", "F32", "mixed".
  virtual std::string stored_dtype() const = 0;
};

inline std::string WeightSource::quantization() const {
  std::string out;
  for (const quant::LinearFormat& format : formats()) out += (out.empty() ? "" : "+") + quant::name(format);
  return out;
}

}  // namespace servoflow::weights
