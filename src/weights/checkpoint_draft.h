// For tests: a small checkpoint that is right as made, to be broken in one place and written to a temporary
// directory.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "core/file.h"
#include "core/safetensors.h"
#include "weights/checkpoint.h"
#include "weights/manifest.h"
#include "weights/synth.h"

namespace servoflow::weights {

inline Architecture micro_architecture() {
  Architecture a;
  a.vision = {.width = 4, .depth = 2, .heads = 2, .mlp = 6, .patch = 2, .image = 4};
  a.prefix = {.width = 6, .depth = 3, .mlp = 8, .heads = 2, .kv_heads = 1, .head_dim = 4};
  a.expert = {.width = 10, .depth = 3, .mlp = 8, .heads = 2, .kv_heads = 1, .head_dim = 4};
  a.vocab = 11;
  a.action_dim = 3;
  a.horizon = 5;
  return a;
}

struct DraftTensor {
  DType dtype = DType::kF32;
  Shape shape;
  std::vector<std::byte> bytes;
};

class CheckpointDraft {
 public:
  explicit CheckpointDraft(Layout layout = Layout::kOpenpi) : architecture(micro_architecture()) {
    // ctest runs the executables of one build side by side.
    static int serial = 0;
    dir = testing::TempDir() + "/servoflow_draft_" + std::to_string(::getpid()) + "_" +
          std::to_string(serial++);
    std::filesystem::remove_all(dir);
    Json block = architecture_to_json(architecture);
    block.erase("action_dim");
    block.erase("horizon");
    if (layout == Layout::kLerobot) {
      prefix = "model.";
      config = {{"type", "pi05"}, {"max_action_dim", 3}, {"chunk_size", 5}, {"image_resolution", {4, 4}}};
    } else {
      config = {{"action_dim", 3}, {"action_horizon", 5}};
    }
    config["architecture"] = block;
    const SyntheticSource source(architecture, 1, DType::kF32);
    for (const TensorSpec& spec : manifest(architecture)) {
      const TensorData data = *source.get(spec.name);
      tensors[prefix + spec.name] = {data.dtype, data.shape, {data.bytes.begin(), data.bytes.end()}};
    }
  }
  ~CheckpointDraft() { std::filesystem::remove_all(dir); }
  CheckpointDraft(const CheckpointDraft&) = delete;
  CheckpointDraft& operator=(const CheckpointDraft&) = delete;

  // The tensor of this canonical name.
  DraftTensor& at(const std::string& name) { return tensors.at(prefix + name); }
  void drop(const std::string& name) { ASSERT_EQ(tensors.erase(prefix + name), 1u) << name; }
  void rename(const std::string& from, const std::string& to) {
    auto node = tensors.extract(from);
    ASSERT_FALSE(node.empty()) << from;
    node.key() = to;
    tensors.insert(std::move(node));
  }
  void add(const std::string& stored_name, Shape shape, DType dtype = DType::kF32) {
    tensors[stored_name] = {
        dtype, shape, std::vector<std::byte>(static_cast<std::size_t>(shape.elements()) * dtype_size(dtype))};
  }

  static void write_file(const std::string& path, const std::map<std::string, DraftTensor>& tensors,
                         const std::map<std::string, std::string>& metadata = {}) {
    std::vector<SafetensorsWriter::Entry> entries;
    for (const auto& [name, tensor] : tensors) entries.push_back({name, tensor.dtype, tensor.shape});
    auto writer = SafetensorsWriter::create(path, entries, metadata);
    ASSERT_TRUE(writer.ok()) << writer.status().message();
    for (const auto& [name, tensor] : tensors) ASSERT_TRUE((*writer)->write(tensor.bytes).ok());
    ASSERT_TRUE((*writer)->finish().ok());
  }
  void write_text(const std::string& name, const std::string& text) const {
    std::filesystem::create_directories(std::filesystem::path(dir + "/" + name).parent_path());
    ASSERT_TRUE(write_file_atomically(dir + "/" + name, text).ok());
  }
  void write() const {
    write_text("config.json", config.dump());
    write_file(dir + "/model.safetensors", tensors, metadata);
  }
  // Writes and opens; the error message, or nothing if it opened.
  std::string failure() const {
    write();
    const Result<Checkpoint> opened = open_checkpoint(dir);
    return opened.ok() ? "" : opened.status().message();
  }

  std::string dir, prefix;
  Architecture architecture;
  Json config;
  std::map<std::string, DraftTensor> tensors;  // by stored name
  std::map<std::string, std::string> metadata;
};

// EXPECT that `text` contains `part`, telling both.
inline void expect_contains(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), std::string::npos) << "expected: " << part << "\nin: " << text;
}

}  // namespace servoflow::weights
