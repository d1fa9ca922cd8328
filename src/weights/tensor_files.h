// The safetensors files of one checkpoint directory behind one lookup: model.safetensors, or the shards named
// by model.safetensors.index.json.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/safetensors.h"
#include "servoflow/status.h"

namespace servoflow::weights {

struct StoredTensor {
  const SafetensorsFile* file = nullptr;
  const SafeTensor* tensor = nullptr;
  explicit operator bool() const { return tensor != nullptr; }
};

class TensorFiles {
 public:
  // Opens what is there. Everything wrong goes into `problems` ("file: …: cause", paths relative to `dir`);
  // what could be opened can be looked at all the same.
  static std::shared_ptr<const TensorFiles> open(const std::string& dir, std::vector<std::string>& problems);
  // One error instead of a list.
  static Result<std::shared_ptr<const TensorFiles>> open(const std::string& dir);

  // The tensor of this name, or the one that the file's metadata names as stored in its place.
  StoredTensor find(const std::string& name) const;
  const std::vector<StoredTensor>& tensors() const { return tensors_; }  // file by file, in file order
  const std::vector<std::string>& names() const { return names_; }       // files, relative to the directory
  std::uint64_t bytes() const;                                           // of all tensors

 private:
  void open_single(const std::string& dir, std::vector<std::string>& problems);
  void open_shards(const std::string& dir, std::vector<std::string>& problems);
  void add(const SafetensorsFile& file);

  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::vector<std::string> names_;
  std::vector<StoredTensor> tensors_;
  std::unordered_map<std::string, std::size_t> index_;
};

inline constexpr char kModelFile[] = "model.safetensors";
inline constexpr char kShardIndex[] = "model.safetensors.index.json";

}  // namespace servoflow::weights
