// Reading whole files under a size limit, mapping large ones, and writing without leaving half a file behind.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "servoflow/status.h"

namespace servoflow {

// The whole file as text or bytes. Fails, naming the path, when it is missing, a directory or larger than
// max_bytes.
Result<std::string> read_text_file(const std::string& path, std::size_t max_bytes);
Result<std::vector<std::uint8_t>> read_binary_file(const std::string& path, std::size_t max_bytes);

// Writes to a temporary name beside `path` and renames it, so that readers see the old file or the new one.
Status write_file_atomically(const std::string& path, std::span<const std::byte> bytes);
Status write_file_atomically(const std::string& path, const std::string& text);

// A read-only private mapping of a whole file.
class MappedFile {
 public:
  static Result<MappedFile> open(const std::string& path);
  MappedFile() = default;
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  std::span<const std::byte> bytes() const { return {data_, size_}; }
  const std::string& path() const { return path_; }
  // Tells the kernel that these bytes will not be read again, so that they leave the resident set.
  void release(std::span<const std::byte> part) const;
  // Starts reading these bytes ahead.
  void prefetch(std::span<const std::byte> part) const;

 private:
  std::string path_;
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace servoflow
