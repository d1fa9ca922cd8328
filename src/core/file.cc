#include "core/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>

#include "core/status_macros.h"

namespace servoflow {
namespace {

std::string why() { return std::strerror(errno); }

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

// Opens a regular file and tells its size.
Result<std::size_t> regular_size(int fd, const std::string& path) {
  struct stat info {};
  if (fd < 0 || ::fstat(fd, &info) != 0) return Status::invalid(path + ": cannot open: " + why());
  if (S_ISDIR(info.st_mode)) return Status::invalid(path + ": is a directory, expected a file");
  if (!S_ISREG(info.st_mode)) return Status::invalid(path + ": is not a regular file");
  return static_cast<std::size_t>(info.st_size);
}

template <typename Container>
Result<Container> read_all(const std::string& path, std::size_t max_bytes) {
  const Descriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  SF_ASSIGN_OR_RETURN(const std::size_t size, regular_size(fd.get(), path));
  if (size > max_bytes)
    return Status::invalid(path + ": " + std::to_string(size) +
                           " bytes, the limit for this kind of file is " + std::to_string(max_bytes));
  Container out(size, 0);
  for (std::size_t done = 0; done < size;) {
    const ssize_t n = ::read(fd.get(), out.data() + done, size - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return Status::runtime(path + ": read error: " + why());
    if (n == 0) return Status::invalid(path + ": the file became shorter while it was read");
    done += static_cast<std::size_t>(n);
  }
  return out;
}

}  // namespace

Result<std::string> read_text_file(const std::string& path, std::size_t max_bytes) {
  return read_all<std::string>(path, max_bytes);
}

Result<std::vector<std::uint8_t>> read_binary_file(const std::string& path, std::size_t max_bytes) {
  return read_all<std::vector<std::uint8_t>>(path, max_bytes);
}

Status write_file_atomically(const std::string& path, std::span<const std::byte> bytes) {
  static std::atomic<unsigned> serial{0};
  const std::string temporary = path + ".tmp" + std::to_string(::getpid()) + "." + std::to_string(serial++);
  {
    const Descriptor fd(::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
    if (fd.get() < 0) return Status::invalid(path + ": cannot write: " + why());
    for (std::size_t done = 0; done < bytes.size();) {
      const ssize_t n = ::write(fd.get(), bytes.data() + done, bytes.size() - done);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) {
        const Status status = Status::runtime(path + ": write error: " + why());
        ::unlink(temporary.c_str());
        return status;
      }
      done += static_cast<std::size_t>(n);
    }
  }
  if (::rename(temporary.c_str(), path.c_str()) != 0) {
    const Status status = Status::invalid(path + ": cannot write: " + why());
    ::unlink(temporary.c_str());
    return status;
  }
  return {};
}

Status write_file_atomically(const std::string& path, const std::string& text) {
  return write_file_atomically(path, std::as_bytes(std::span(text.data(), text.size())));
}

Result<MappedFile> MappedFile::open(const std::string& path) {
  const Descriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  SF_ASSIGN_OR_RETURN(const std::size_t size, regular_size(fd.get(), path));
  MappedFile file;
  file.path_ = path;
  file.size_ = size;
  if (size == 0) return file;
  void* data = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd.get(), 0);
  if (data == MAP_FAILED) return Status::runtime(path + ": cannot map: " + why());
  file.data_ = static_cast<const std::byte*>(data);
  return file;
}

MappedFile::MappedFile(MappedFile&& other) noexcept { *this = std::move(other); }

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

namespace {
void advise(std::span<const std::byte> part, int advice) {
  if (part.empty()) return;
  const std::uintptr_t page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(part.data()) / page * page;
  const std::uintptr_t end = reinterpret_cast<std::uintptr_t>(part.data() + part.size());
  ::madvise(reinterpret_cast<void*>(begin), end - begin,
            advice);  // advice only: failing changes nothing but speed
}
}  // namespace

void MappedFile::release(std::span<const std::byte> part) const { advise(part, MADV_DONTNEED); }
void MappedFile::prefetch(std::span<const std::byte> part) const { advise(part, MADV_WILLNEED); }

}  // namespace servoflow
