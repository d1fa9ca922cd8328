// Golden files of the public libraries (tests/golden/quant), for tests.
#pragma once

#include <gtest/gtest.h>

#include <map>
#include <string>
#include <vector>

#include "core/safetensors.h"
#include "quant/checkpoint.h"

namespace servoflow::quant {

class GoldenFile {
 public:
  explicit GoldenFile(const std::string& name) {
    Result<SafetensorsFile> file = SafetensorsFile::open("tests/golden/quant/" + name + ".safetensors");
    EXPECT_TRUE(file.ok()) << (file.ok() ? "" : file.status().message());
    if (file.ok()) file_ = std::move(*file);
  }
  std::vector<float> floats(const std::string& name) const {
    const SafeTensor* tensor = file_.find(name);
    EXPECT_NE(tensor, nullptr) << name;
    return tensor == nullptr ? std::vector<float>() : *to_floats(*tensor);
  }
  TensorLookup lookup() const {
    return [this](const std::string& name) -> std::optional<TensorView> {
      const SafeTensor* tensor = file_.find(name);
      if (tensor == nullptr) return std::nullopt;
      return TensorView{tensor->dtype, tensor->shape, tensor->bytes};
    };
  }
  // Tensors whose names start with "layer.", without the ones that only tests know.
  std::map<std::string, const SafeTensor*> layer(const std::string& layer) const {
    std::map<std::string, const SafeTensor*> found;
    for (const SafeTensor& tensor : file_.tensors())
      if (tensor.name.starts_with(layer + ".") && !tensor.name.ends_with(".decoded"))
        found[tensor.name] = &tensor;
    return found;
  }

 private:
  SafetensorsFile file_;
};

// Layer tensors in memory that a test can spoil.
class FakeTensors {
 public:
  explicit FakeTensors(const std::vector<StoredTensor>& tensors) {
    for (const StoredTensor& tensor : tensors) tensors_[tensor.name] = tensor;
  }
  StoredTensor& operator[](const std::string& name) { return tensors_[name]; }
  void erase(const std::string& name) { tensors_.erase(name); }
  TensorLookup lookup() const {
    return [this](const std::string& name) -> std::optional<TensorView> {
      const auto it = tensors_.find(name);
      if (it == tensors_.end()) return std::nullopt;
      return TensorView{it->second.dtype, it->second.shape, it->second.bytes};
    };
  }

 private:
  std::map<std::string, StoredTensor> tensors_;
};

}  // namespace servoflow::quant
