#include "core/memory.h"

#include <sys/mman.h>

#include <cstdint>

namespace servoflow {
namespace {
constexpr std::size_t kHugePage = std::size_t{2} << 20;
}

HostBlock::HostBlock(std::size_t bytes) {
  if (bytes == 0) return;
  const bool huge = bytes >= kHugePage / 2;
  const std::size_t page = huge ? kHugePage : 4096;
  const std::size_t size = (bytes + page - 1) / page * page;
  // Over-allocate by one huge page and trim, so that the block starts on a huge-page boundary.
  const std::size_t slack = huge ? kHugePage : 0;
  void* raw = ::mmap(nullptr, size + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) return;
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(raw);
  const std::uintptr_t aligned = (begin + page - 1) / page * page;
  if (aligned > begin) ::munmap(raw, aligned - begin);
  if (const std::size_t tail = slack - (aligned - begin); slack > 0 && tail > 0)
    ::munmap(reinterpret_cast<void*>(aligned + size), tail);
  if (huge) ::madvise(reinterpret_cast<void*>(aligned), size, MADV_HUGEPAGE);
  data_ = reinterpret_cast<std::byte*>(aligned);
  bytes_ = size;
}

HostBlock::~HostBlock() {
  if (data_ != nullptr) ::munmap(data_, bytes_);
}

}  // namespace servoflow
