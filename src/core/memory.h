// Large page-aligned blocks of zeroed host memory, backed by huge pages where the system grants them.
#pragma once

#include <cstddef>
#include <utility>

namespace servoflow {

class HostBlock {
 public:
  HostBlock() = default;
  // Zero bytes. data() is null if the system refuses. Blocks below 1 MiB use plain pages.
  explicit HostBlock(std::size_t bytes);
  HostBlock(HostBlock&& other) noexcept { *this = std::move(other); }
  HostBlock& operator=(HostBlock&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~HostBlock();
  std::byte* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace servoflow
