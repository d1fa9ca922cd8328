#include "toolkit/calibration.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <functional>
#include <limits>
#include <map>
#include <random>

#include "weights/checkpoint_draft.h"

namespace servoflow::toolkit {
namespace {

namespace fs = std::filesystem;
using weights::DraftTensor;

// A statistics file as calibrate writes it, to be broken in one place.
class CalibrationFile : public ::testing::Test {
 protected:
  void SetUp() override {
    path_ = (fs::temp_directory_path() / ("servoflow-statistics-" + std::to_string(::getpid()))).string();
    good_ = {.weights = "w", .checkpoint = "tiny", .precision = "fp32", .denoise_steps = 2};
    good_.moments = {"with*"};
    good_.cases = {{"one", "abc"}};
    std::mt19937 random(3);
    std::normal_distribution<float> draw;
    for (const char* name : {"plain", "with.moment"}) {
      SiteStatistics& s = good_.sites[name];
      s.width = 18;
      if (name[0] == 'w') s.moment.emplace(18);
      for (int step = 0; step < (s.moment ? 2 : 1); ++step) {
        std::vector<float> x(18 * 5);
        for (float& v : x) v = draw(random) * static_cast<float>(step + 1);
        s.add(step, x);
      }
    }
    ASSERT_TRUE(write_calibration(good_, path_).ok());
    const SafetensorsFile file = *SafetensorsFile::open(path_);
    metadata = file.metadata();
    for (const SafeTensor& t : file.tensors())
      tensors[t.name] = {t.dtype, t.shape, {t.bytes.begin(), t.bytes.end()}};
  }
  void TearDown() override { fs::remove(path_); }

  template <typename T>
  T& value(const std::string& tensor, std::size_t i) {
    return reinterpret_cast<T*>(tensors.at(tensor).bytes.data())[i];
  }
  double& channel(int row, int c) {
    return value<double>("plain/channels", static_cast<std::size_t>(row * 18 + c));
  }
  // The first row's bins, then those of the next.
  std::uint64_t& bin(const std::string& histogram, std::size_t i) {
    return value<std::uint64_t>(histogram, i);
  }

  Result<CalibrationStatistics> parsed() {
    weights::CheckpointDraft::write_file(path_, tensors, metadata);
    return calibration_from_file(*SafetensorsFile::open(path_));
  }
  // Breaks the file; the parser, which knows no digest, must say `words` and name the file.
  void refused(const std::string& words, const std::function<void()>& damage) {
    const auto before_tensors = tensors;
    const auto before_metadata = metadata;
    damage();
    const auto r = parsed();
    tensors = before_tensors;
    metadata = before_metadata;
    ASSERT_FALSE(r.ok()) << words;
    EXPECT_NE(r.status().message().find(words), std::string::npos)
        << "expected: " << words << "\nin: " << r.status().message();
    EXPECT_TRUE(r.status().message().starts_with(path_)) << r.status().message();
  }

  std::string path_;
  CalibrationStatistics good_;
  std::map<std::string, DraftTensor> tensors;
  std::map<std::string, std::string> metadata;
};

TEST_F(CalibrationFile, RoundTrips) {
  const auto read = read_calibration(path_);
  ASSERT_TRUE(read.ok()) << read.status().message();
  EXPECT_EQ(read->digest(), good_.digest());
  EXPECT_EQ(read->sites.at("plain").channel_amax, good_.sites.at("plain").channel_amax);
  const auto again = parsed();
  ASSERT_TRUE(again.ok()) << again.status().message();
  EXPECT_EQ(again->digest(), good_.digest());
}

TEST_F(CalibrationFile, TheDigestIsCheckedAfterEverythingElse) {
  channel(2, 3) += 1;
  const auto edited = parsed();
  ASSERT_TRUE(edited.ok()) << "a plausible file";
  EXPECT_NE(edited->digest(), good_.digest());
  const auto read = read_calibration(path_);
  ASSERT_FALSE(read.ok());
  EXPECT_NE(read.status().message().find("SHA-256"), std::string::npos);
}

TEST_F(CalibrationFile, ChannelsAreWhatFloat32InputsLeave) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  refused("plain/channels: largest magnitude of channel 4 is 1e+39: beyond float32",
          [&] { channel(0, 4) = 1e39; });
  refused("plain/channels: largest magnitude of channel 0 is -1: negative", [&] { channel(0, 0) = -1; });
  refused("plain/channels: sum of magnitudes of channel 17 is nan: not finite",
          [&] { channel(1, 17) = std::numeric_limits<double>::quiet_NaN(); });
  refused("plain/channels: sum of channel 2 is -inf: not finite", [&] { channel(2, 2) = -kInf; });
  refused("plain/channels: sum of squares of channel 1 is -0.5: negative", [&] { channel(3, 1) = -0.5; });
  // Finite and in float32, but not the inputs that the histograms saw.
  refused("plain/channels: largest magnitude 3e+38, plain/histogram has", [&] { channel(0, 4) = 3e38; });
}

TEST_F(CalibrationFile, CountsAndLengthsAgree) {
  refused("plain/rows: is 0, expected 1", [&] { value<std::uint64_t>("plain/rows", 0) = 0; });
  refused("plain/rows: is 18446744073709551615",
          [&] { value<std::uint64_t>("plain/rows", 0) = ~std::uint64_t{0}; });
  refused("plain/histogram: holds 90 finite values and 0 others, 6 rows of 18 are 108",
          [&] { value<std::uint64_t>("plain/rows", 0) = 6; });
  refused("plain/histogram: holds 91 finite values", [&] { ++bin("plain/histogram", 0); });
  refused("plain/histogram: holds 90 finite values and 1 others",
          [&] { value<std::uint64_t>("plain/histogram/not_finite", 0) = 1; });
  refused("plain/tokens: holds 6 finite values and 0 others, expected 5 in all",
          [&] { ++bin("plain/tokens", 0); });
  refused("plain/blocks: holds 11 finite values and 0 others, expected 10 in all",
          [&] { ++bin("plain/blocks", 0); });
  refused("with.moment/histogram: counts overflow", [&] {
    bin("with.moment/histogram", 0) = std::uint64_t{1} << 61;
    bin("with.moment/histogram", 2048) = (std::uint64_t{1} << 61) + 1;
  });
  refused("histogram: counts overflow", [&] { bin("plain/histogram", 0) = ~std::uint64_t{0}; });
  refused("plain/histogram: row 0: histogram: 2048 bins, limit 3",
          [&] { value<float>("plain/histogram/range", 0) = 3; });
  refused("limit 3.94430453e-31", [&] { value<float>("plain/histogram/range", 0) = 0x1p-101f; });
  refused("the last bin with values", [&] { value<float>("plain/histogram/range", 1) /= 2; });
}

TEST_F(CalibrationFile, TensorsAreThoseOfTheSites) {
  refused("plain/rows: missing, expected U64 [1]", [&] { tensors.erase("plain/rows"); });
  refused("plain/histogram: missing", [&] { tensors.erase("plain/histogram"); });
  refused("plain/channels: is F64 [3, 18], expected F64 [4, 18]", [&] {
    tensors["plain/channels"].shape = {3, 18};
    tensors["plain/channels"].bytes.resize(3 * 18 * 8);
  });
  refused("plain/channels: has 0 channels", [&] {
    tensors["plain/channels"].shape = {4, 0};
    tensors["plain/channels"].bytes.clear();
  });
  refused("plain/histogram: has 0 steps", [&] {
    tensors["plain/histogram"].shape = {0, 2048};
    tensors["plain/histogram"].bytes.clear();
  });
  refused("with.moment/histogram: has 2 steps, the schedule in the metadata has 1",
          [&] { metadata["denoise_steps"] = "1"; });
  refused("stray: belongs to none of the sites", [&] { tensors["stray"] = tensors["plain/rows"]; });
  refused("with.moment/moment: second moment: not symmetric",
          [&] { value<double>("with.moment/moment", 1) += 1; });
  refused("with.moment/moment: is F64 [18], expected F64 [18, 18]", [&] {
    tensors["with.moment/moment"].shape = {18};
    tensors["with.moment/moment"].bytes.resize(18 * 8);
  });
}

TEST_F(CalibrationFile, MetadataIsReadStrictly) {
  refused("not a calibration statistics file", [&] { metadata.erase("servoflow_calibration"); });
  refused("version 2, this program reads version 1", [&] { metadata["servoflow_calibration"] = "2"; });
  for (const char* steps : {"", "0", "51", "-1", "1e1", "99999999999"})
    refused("metadata denoise_steps", [&] { metadata["denoise_steps"] = steps; });
  refused("metadata sites: names plain twice", [&] { metadata["sites"] = R"(["plain", "plain"])"; });
  refused("metadata sites[0]: is no text", [&] { metadata["sites"] = "[3]"; });
  refused("metadata cases: is no list", [&] { metadata["cases"] = "{}"; });
  refused("metadata cases[1]: has no name and sha256",
          [&] { metadata["cases"] = R"([{"name": "a", "sha256": "b"}, {"name": "a"}])"; });
  refused("metadata moments", [&] { metadata["moments"] = "["; });
  refused("metadata moments: missing", [&] { metadata.erase("moments"); });
}

}  // namespace
}  // namespace servoflow::toolkit
