#include "core/file.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>

namespace servoflow {
namespace {

namespace fs = std::filesystem;

class File : public testing::Test {
 protected:
  File() : dir_(testing::TempDir() + "/file_test_" + std::to_string(::getpid())) {
    fs::remove_all(dir_);
    fs::create_directories(dir_);
  }
  ~File() override { fs::remove_all(dir_); }
  std::string path(const std::string& name) const { return dir_ + "/" + name; }
  std::size_t entries() const {
    return static_cast<std::size_t>(std::distance(fs::directory_iterator(dir_), fs::directory_iterator()));
  }

  std::string dir_;
};

TEST_F(File, WritesAndReadsBack) {
  ASSERT_TRUE(write_file_atomically(path("a"), std::string("hello")).ok());
  ASSERT_TRUE(write_file_atomically(path("a"), std::string("a\0b", 3)).ok());  // replaces
  EXPECT_EQ(*read_text_file(path("a"), 3), std::string("a\0b", 3));
  EXPECT_EQ(*read_binary_file(path("a"), 3), (std::vector<std::uint8_t>{'a', 0, 'b'}));
  EXPECT_EQ(entries(), 1u);  // no temporary file stays
}

TEST_F(File, RefusesWhatItCannotRead) {
  ASSERT_TRUE(write_file_atomically(path("a"), std::string("hello")).ok());
  const auto failure = [](const Result<std::string>& r) {
    return r.ok() ? std::string() : r.status().message();
  };
  EXPECT_NE(failure(read_text_file(path("a"), 4)).find("the limit"), std::string::npos);
  EXPECT_NE(failure(read_text_file(path("b"), 4)).find(path("b") + ": cannot open"), std::string::npos);
  EXPECT_NE(failure(read_text_file(dir_, 4)).find("is a directory"), std::string::npos);
  ASSERT_EQ(::mkfifo(path("pipe").c_str(), 0600), 0);  // must neither block nor be read
  EXPECT_NE(failure(read_text_file(path("pipe"), 4)).find("not a regular file"), std::string::npos);
}

TEST_F(File, FailedWritesLeaveNothing) {
  EXPECT_FALSE(write_file_atomically(path("missing/a"), std::string("x")).ok());
  fs::create_directories(path("taken/full"));
  EXPECT_FALSE(write_file_atomically(path("taken"), std::string("x")).ok());
  EXPECT_EQ(entries(), 1u);
}

TEST_F(File, MapsAndReleases) {
  std::string text(100000, 'x');
  text[50000] = 'y';
  ASSERT_TRUE(write_file_atomically(path("a"), text).ok());
  Result<MappedFile> file = MappedFile::open(path("a"));
  ASSERT_TRUE(file.ok());
  EXPECT_EQ(file->path(), path("a"));
  ASSERT_EQ(file->bytes().size(), text.size());
  EXPECT_EQ(std::memcmp(file->bytes().data(), text.data(), text.size()), 0);
  file->prefetch(file->bytes());
  file->release(
      file->bytes().subspan(40001, 20003));  // pages come back from the file when they are read again
  EXPECT_EQ(std::memcmp(file->bytes().data(), text.data(), text.size()), 0);
  const MappedFile moved = std::move(*file);
  EXPECT_EQ(moved.bytes()[50000], std::byte{'y'});
}

TEST_F(File, MapsEmptyFilesAndRefusesOthers) {
  ASSERT_TRUE(write_file_atomically(path("empty"), std::string()).ok());
  const Result<MappedFile> empty = MappedFile::open(path("empty"));
  ASSERT_TRUE(empty.ok());
  EXPECT_TRUE(empty->bytes().empty());
  EXPECT_FALSE(MappedFile::open(path("missing")).ok());
  EXPECT_FALSE(MappedFile::open(dir_).ok());
}

}  // namespace
}  // namespace servoflow
