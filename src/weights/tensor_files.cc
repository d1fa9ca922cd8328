#include "weights/tensor_files.h"

#include <filesystem>
#include <map>
#include <system_error>

#include "weights/fields.h"

namespace servoflow::weights {
namespace {

// Opens DIR/name; problems start with `name` instead of the full path.
std::unique_ptr<SafetensorsFile> open_one(const std::string& dir, const std::string& name,
                                          std::vector<std::string>& problems) {
  const std::string path = dir + "/" + name;
  Result<SafetensorsFile> file = SafetensorsFile::open(path);
  if (file.ok()) return std::make_unique<SafetensorsFile>(std::move(*file));
  const std::string& message = file.status().message();
  problems.push_back(message.starts_with(path) ? printable(name) + message.substr(path.size()) : message);
  return nullptr;
}

std::string tensor_text(const std::string& name) { return "tensor \"" + printable(name) + "\""; }

}  // namespace

std::shared_ptr<const TensorFiles> TensorFiles::open(const std::string& dir,
                                                     std::vector<std::string>& problems) {
  auto files = std::make_shared<TensorFiles>();
  std::error_code ignored;
  // As transformers does: a whole file wins over an index beside it.
  if (!std::filesystem::exists(dir + "/" + kModelFile, ignored) &&
      std::filesystem::exists(dir + "/" + kShardIndex, ignored)) {
    files->open_shards(dir, problems);
  } else {
    files->open_single(dir, problems);
  }
  return files;
}

Result<std::shared_ptr<const TensorFiles>> TensorFiles::open(const std::string& dir) {
  std::vector<std::string> problems;
  std::shared_ptr<const TensorFiles> files = open(dir, problems);
  if (!problems.empty()) return Status::invalid(problem_text(dir, problems));
  return files;
}

void TensorFiles::add(const SafetensorsFile& file) {
  for (const SafeTensor& tensor : file.tensors()) {
    index_.emplace(tensor.name, tensors_.size());
    tensors_.push_back({&file, &tensor});
  }
}

void TensorFiles::open_single(const std::string& dir, std::vector<std::string>& problems) {
  std::unique_ptr<SafetensorsFile> file = open_one(dir, kModelFile, problems);
  if (file == nullptr) return;
  names_.push_back(kModelFile);
  add(*file);
  files_.push_back(std::move(file));
}

void TensorFiles::open_shards(const std::string& dir, std::vector<std::string>& problems) {
  const std::string where = kShardIndex;
  Result<Json> index = read_json_file(dir + "/" + where);
  if (!index.ok()) {
    problems.push_back(index.status().message());
    return;
  }
  const auto map = index->is_object() ? index->find("weight_map") : index->end();
  if (map == index->end() || !map->is_object() || map->empty()) {
    problems.push_back(where + ": weight_map: missing, or not an object that maps tensor names to files");
    return;
  }
  std::map<std::string, std::vector<std::string>> shards;  // file -> tensors the index expects there
  for (const auto& [tensor, file] : map->items()) {
    if (!file.is_string()) {
      problems.push_back(where + ": " + tensor_text(tensor) + ": expected a file name, found " + shown(file));
    } else if (!stays_inside(file.get_ref<const std::string&>())) {
      problems.push_back(where + ": " + tensor_text(tensor) + ": \"" + printable(file.get<std::string>()) +
                         "\" is not a file inside the checkpoint directory");
    } else {
      shards[file.get<std::string>()].push_back(tensor);
    }
  }
  for (const auto& [name, expected] : shards) {
    std::unique_ptr<SafetensorsFile> file = open_one(dir, name, problems);
    if (file == nullptr) continue;
    for (const std::string& tensor : expected)
      if (file->find(tensor) == nullptr)
        problems.push_back(printable(name) + ": " + tensor_text(tensor) + ": missing, though " + where +
                           " places it here");
    for (const SafeTensor& tensor : file->tensors()) {
      const auto it = map->find(tensor.name);
      if (it == map->end()) {
        problems.push_back(printable(name) + ": " + tensor_text(tensor.name) + ": not listed in " + where);
      } else if (*it != name) {
        problems.push_back(printable(name) + ": " + tensor_text(tensor.name) + ": stored here, though " +
                           where + " places it in " + shown(*it));
      }
    }
    names_.push_back(name);
    add(*file);
    files_.push_back(std::move(file));
  }
}

StoredTensor TensorFiles::find(const std::string& name) const {
  if (const auto it = index_.find(name); it != index_.end()) return tensors_[it->second];
  // Tied tensors are stored once; save_model notes the other names in the metadata as alias -> stored name.
  for (const auto& file : files_) {
    const auto alias = file->metadata().find(name);
    if (alias == file->metadata().end()) continue;
    if (const SafeTensor* tensor = file->find(alias->second)) return {file.get(), tensor};
  }
  return {};
}

std::uint64_t TensorFiles::bytes() const {
  std::uint64_t total = 0;
  for (const StoredTensor& t : tensors_) total += t.tensor->bytes.size();
  return total;
}

}  // namespace servoflow::weights
