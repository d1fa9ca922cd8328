// The safetensors container: u64 little-endian header length, a JSON header, then raw little-endian tensor
// data.
//
// The reader maps the file and copies nothing. It trusts nothing either: header length, names, dtypes, shapes
// and offsets are checked (overflow, overlap, holes, duplicates, size against dtype and shape) before a
// tensor is handed out. Non-goals: writing in place, alignment guarantees (tensor data may start at any byte
// offset).
#pragma once

#include <cstddef>
#include <cstdio>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/dtype.h"
#include "core/file.h"
#include "core/shape.h"
#include "servoflow/status.h"

namespace servoflow {

struct SafeTensor {
  std::string name;
  DType dtype = DType::kF32;
  Shape shape;
  std::span<const std::byte> bytes;  // inside the mapping; may be unaligned
};

class SafetensorsFile {
 public:
  // Opens one file. Every problem of the header is an error that names the path and the tensor.
  static Result<SafetensorsFile> open(const std::string& path);
  // The same checks on bytes in memory (fuzzing, tests); `bytes` must outlive the result.
  static Result<SafetensorsFile> parse(std::span<const std::byte> bytes, const std::string& where);

  const std::vector<SafeTensor>& tensors() const { return tensors_; }  // in file order
  const SafeTensor* find(const std::string& name) const;
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const std::string& path() const { return path_; }
  // The tensor's pages will not be read again.
  void release(const SafeTensor& tensor) const;

 private:
  std::string path_;
  std::shared_ptr<MappedFile> file_ = std::make_shared<MappedFile>();
  std::vector<SafeTensor> tensors_;
  std::unordered_map<std::string, std::size_t> index_;
  std::map<std::string, std::string> metadata_;
};

// Converts tensor elements to float or double, whatever float or integer dtype they are stored in.
// Fails for dtypes without a value meaning here (F8).
Result<std::vector<float>> to_floats(const SafeTensor& tensor);
Result<std::vector<double>> to_doubles(const SafeTensor& tensor);

// Writes a file front to back: declare all tensors, then give each one's bytes in that order, in pieces of
// any size. The file appears under its name only when finish() succeeds; an abandoned writer leaves nothing
// behind.
class SafetensorsWriter {
 public:
  struct Entry {
    std::string name;
    DType dtype = DType::kF32;
    Shape shape;
  };
  static Result<std::unique_ptr<SafetensorsWriter>> create(
      const std::string& path, const std::vector<Entry>& entries,
      const std::map<std::string, std::string>& metadata);
  ~SafetensorsWriter();
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;
  Status write(std::span<const std::byte> bytes);
  // Fails unless exactly the declared number of bytes was written.
  Status finish();

 private:
  SafetensorsWriter() = default;
  std::string path_, temporary_;
  std::FILE* file_ = nullptr;
  std::uint64_t expected_ = 0, written_ = 0;
};

}  // namespace servoflow
