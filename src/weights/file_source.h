// Weights straight out of mapped checkpoint files.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>

#include "quant/checkpoint.h"
#include "weights/tensor_files.h"
#include "weights/weight_source.h"

namespace servoflow::weights {

// A quantized layer: its scheme and its tensors, by the engine's names.
struct StoredLayer {
  quant::ConfigGroup group;
  quant::Convention convention = quant::Convention::kCompressedTensors;
  std::int64_t rows = 0, cols = 0;
  std::unordered_map<std::string, StoredTensor> tensors;
};

class FileSource : public WeightSource {
 public:
  // `used` maps the manifest's names to stored tensors, the token table (kTokenTable) included; all of a
  // dtype that is_float. Shapes must already agree with the manifest. `layers`: what is quantized instead, by
  // the name of its weight.
  FileSource(std::shared_ptr<const TensorFiles> files, std::unordered_map<std::string, StoredTensor> used,
             std::unordered_map<std::string, StoredLayer> layers = {});

  bool has(const std::string& name) const override { return used_.contains(name) || layers_.contains(name); }
  Result<TensorData> get(const std::string& name) const override;
  Result<std::optional<quant::QuantizedMatrix>> quantized(const std::string& name) const override;
  std::optional<quant::LinearFormat> format_of(const std::string& name) const override;
  std::vector<quant::LinearFormat> formats() const override { return formats_; }
  void release(const std::string& name) const override;
  // The same for a part of a tensor's bytes, as get() gave them.
  void release_part(const std::string& name, std::span<const std::byte> part) const;
  Status token_rows(std::span<const std::int32_t> ids, std::span<float> out) const override;
  std::string stored_dtype() const override { return stored_dtype_; }

 private:
  std::shared_ptr<const TensorFiles> files_;
  std::unordered_map<std::string, StoredTensor> used_;
  std::unordered_map<std::string, StoredLayer> layers_;
  std::vector<quant::LinearFormat> formats_;
  StoredTensor table_;
  std::string stored_dtype_;
};

}  // namespace servoflow::weights
