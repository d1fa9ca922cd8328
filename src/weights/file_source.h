// Weights straight out of mapped checkpoint files.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>

#include "weights/tensor_files.h"
#include "weights/weight_source.h"

namespace servoflow::weights {

class FileSource : public WeightSource {
 public:
  // `used` maps the manifest's names to stored tensors, the token table (kTokenTable) included; all of a
  // dtype that is_float. Shapes must already agree with the manifest.
  FileSource(std::shared_ptr<const TensorFiles> files, std::unordered_map<std::string, StoredTensor> used);

  bool has(const std::string& name) const override { return used_.contains(name); }
  Result<TensorData> get(const std::string& name) const override;
  void release(const std::string& name) const override;
  // The same for a part of a tensor's bytes, as get() gave them.
  void release_part(const std::string& name, std::span<const std::byte> part) const;
  Status token_rows(std::span<const std::int32_t> ids, std::span<float> out) const override;
  std::string stored_dtype() const override { return stored_dtype_; }

 private:
  std::shared_ptr<const TensorFiles> files_;
  std::unordered_map<std::string, StoredTensor> used_;
  StoredTensor table_;
  std::string stored_dtype_;
};

}  // namespace servoflow::weights
