#include "stages/preprocess/tokenizer.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "core/file.h"
#include "core/json.h"
#include "stages/preprocess/tokenizer_file.h"

namespace servoflow::stages {
namespace {

constexpr char kModel[] = "tests/golden/tokenizer/tokenizer.model";
constexpr int kVocab = 1024;

std::unique_ptr<Tokenizer> open_golden() {
  auto tokenizer = Tokenizer::open(kModel, kVocab);
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status().message();
  return std::move(*tokenizer);
}

TEST(Tokenizer, EveryRecordedCaseExactly) {
  const auto json = read_json_file("tests/golden/tokenizer/cases.json");
  ASSERT_TRUE(json.ok()) << json.status().message();
  const auto tokenizer = open_golden();
  int cases = 0;
  for (const Json& c : (*json)["cases"]) {
    const std::string prompt = c["prompt"];
    SCOPED_TRACE(prompt);
    EXPECT_EQ(clean_prompt(prompt), c["cleaned"].get<std::string>());
    contract::Prompt format;
    format.max_tokens = c["max_len"];
    std::vector<int> bins;
    if (c["state"].is_null()) {
      format.mode = contract::PromptMode::kPlain;
    } else {
      for (const double x : c["state"]) bins.push_back(state_bin(x));
    }
    std::vector<std::int32_t> ids;
    bool truncated = false;
    ASSERT_TRUE(tokenizer->encode_prompt(prompt, bins, format, ids, truncated).ok());
    EXPECT_EQ(ids, c["tokens"].get<std::vector<std::int32_t>>());
    EXPECT_EQ(static_cast<int>(ids.size()), c["valid"].get<int>());
    EXPECT_TRUE(!truncated || static_cast<int>(ids.size()) == format.max_tokens);
    ++cases;
  }
  EXPECT_EQ(cases, 184);
}

TEST(Tokenizer, SpecialLiteralsAsTransformersReadsThem) {
  const auto tokenizer = open_golden();
  const auto ids = [&](const char* text, bool special) {
    std::vector<std::int32_t> out;
    EXPECT_TRUE(tokenizer->encode(text, special, out).ok());
    return out;
  };
  // Recorded from the tokenizers library on lerobot-tiny/tokenizer/tokenizer.json.
  using Ids = std::vector<std::int32_t>;
  EXPECT_EQ(ids("Task: a <bos> b, State: 1 2;\nAction: ", true),
            (Ids{298, 991, 314, 976, 2, 277, 1009, 300, 991, 976, 984, 976, 989, 1008, 7, 299, 991, 976}));
  EXPECT_EQ(ids("Task: x<pad>y <unk> z, State: 1 2;\nAction: ", true),
            (Ids{298, 991, 758, 0,   1013, 976,  3, 976, 140, 1009, 300,
                 991, 976, 984, 976, 989,  1008, 7, 299, 991, 976}));
  EXPECT_EQ(ids("Task:  <eos> , State: 1 2;\nAction: ", true),
            (Ids{298, 991, 10, 1, 976, 1009, 300, 991, 976, 984, 976, 989, 1008, 7, 299, 991, 976}));
  EXPECT_EQ(ids("<eos>", false), (Ids{78, 978, 898, 80}));  // openpi: plain text
  EXPECT_EQ(ids("<eos>", true), (Ids{1}));
  EXPECT_EQ(ids("<bos<eos><", true).size(), ids("<bos", false).size() + 1 + ids("<", false).size());
}

TEST(StateBin, EdgesBelongToTheUpperBin) {
  for (int k = 0; k < 256; ++k) {
    const double edge = -1.0 + 2.0 * k / 256;
    EXPECT_EQ(state_bin(edge), k);
    EXPECT_EQ(state_bin(std::nextafter(edge, -10.0)), k - 1);
    EXPECT_EQ(state_bin(std::nextafter(edge, 10.0)), k);
  }
  EXPECT_EQ(state_bin(-0.0), 128);
  EXPECT_EQ(state_bin(1.0), 255);
  EXPECT_EQ(state_bin(1e300), 255);
  EXPECT_EQ(state_bin(std::numeric_limits<double>::infinity()), 255);
  EXPECT_EQ(state_bin(-1e300), -1);
}

TEST(CleanPrompt, PythonsStrip) {
  EXPECT_EQ(clean_prompt(""), "");
  EXPECT_EQ(clean_prompt(" \t\n\x1c\xc2\x85\xc2\xa0\xe2\x80\x83\xe3\x80\x80"), "");
  EXPECT_EQ(clean_prompt("\xe3\x80\x80 a_b\nc\td \x1f"), "a b c\td");
  EXPECT_EQ(clean_prompt("\xe2\x80\x8b x"), "\xe2\x80\x8b x");  // zero-width space is not space
  EXPECT_EQ(clean_prompt("_x_"), " x ");                        // stripped before "_" becomes a space
}

TEST(Utf8, RefusesWhatUnicodeRefuses) {
  EXPECT_TRUE(is_utf8("plain \xc3\xa9 \xe6\x8b\xbf \xf0\x9f\xa4\x96"));
  for (const char* bad : {"\x80", "\xc0\xaf", "\xc3", "\xe0\x80\x80", "\xed\xa0\x80", "\xf4\x90\x80\x80",
                          "\xf8\x88\x80\x80\x80", "\xff", "a\xe6\x8b"}) {
    EXPECT_FALSE(is_utf8(bad));
  }
}

TEST(Tokenizer, RefusesWrongFiles) {
  EXPECT_NE(
      Tokenizer::open("tests/golden/tokenizer/none.model", kVocab).status().message().find("none.model"),
      std::string::npos);
  EXPECT_FALSE(Tokenizer::open("tests/golden/tokenizer", kVocab).ok());
  const auto small = Tokenizer::open(kModel, 1023);
  ASSERT_FALSE(small.ok());
  EXPECT_NE(small.status().message().find("1024 pieces"), std::string::npos);
  for (const std::string& bytes : {std::string(), std::string("{}"), std::string(1000, '\0'),
                                   std::string(1000, '\xff'), std::string("not a model at all, but text")}) {
    const auto result = Tokenizer::parse(bytes, "bad.model", kVocab);
    ASSERT_FALSE(result.ok());
    EXPECT_EQ(result.status().code(), StatusCode::kInvalidInput);
    EXPECT_EQ(result.status().message().rfind("bad.model", 0), 0u);
  }
}

TEST(Tokenizer, SurvivesDamagedFiles) {
  const auto text = read_text_file(kModel, 1 << 24);
  ASSERT_TRUE(text.ok());
  for (std::size_t size = 0; size < text->size(); size += 97) {
    const auto result = Tokenizer::parse(std::string_view(*text).substr(0, size), "cut", kVocab);
    EXPECT_TRUE(result.ok() || !result.status().message().empty());
  }
  std::mt19937 random(5);
  for (int round = 0; round < 400; ++round) {
    std::string damaged = *text;
    for (int i = 0; i < 1 + round % 20; ++i) damaged[random() % damaged.size()] = static_cast<char>(random());
    const auto result = Tokenizer::parse(damaged, "damaged", 1 << 20);
    if (!result.ok()) continue;
    std::vector<std::int32_t> ids;
    const Status status =
        (*result)->encode("put the red mug\n\n on the plate <0x41> \xf0\x9f\xa4\x96", true, ids);
    EXPECT_TRUE(status.ok() || !status.message().empty());
  }
}

// A normalizer's character map whose double array points outside itself must not reach the library.
TEST(TokenizerFile, ChecksCharacterMaps) {
  const auto file = [](const std::string& map) {
    const auto field = [](int number, const std::string& content) {
      std::string out(1, static_cast<char>(number << 3 | 2));
      for (std::size_t n = content.size(); true; n >>= 7) {
        out += static_cast<char>((n & 127) | (n > 127 ? 128 : 0));
        if (n <= 127) return out + content;
      }
    };
    return field(3, field(2, map));
  };
  const auto map = [](const std::vector<std::uint32_t>& units, const std::string& text) {
    std::string out;
    const auto put = [&](std::uint32_t v) { out.append(reinterpret_cast<const char*>(&v), 4); };
    put(static_cast<std::uint32_t>(4 * units.size()));
    for (const std::uint32_t unit : units) put(unit);
    return out + text;
  };
  std::vector<std::uint32_t> units(256, 0);
  const std::string text("a\0", 2);
  EXPECT_TRUE(check_tokenizer_file(file("")).ok());
  EXPECT_TRUE(check_tokenizer_file(file(map(units, text))).ok());
  EXPECT_FALSE(check_tokenizer_file(file(map({}, text))).ok());
  EXPECT_FALSE(check_tokenizer_file(file(map(units, ""))).ok());
  EXPECT_FALSE(check_tokenizer_file(file(map(units, "no end"))).ok());
  units[0] = 1u << 10 << 8;  // offset 256: beyond the array
  EXPECT_FALSE(check_tokenizer_file(file(map(units, text))).ok());
  units[0] = (1u << 8) | (1u << 10);  // a value at unit 1 …
  units[1] = 0x80000001u;             // … which points at the text's second byte
  EXPECT_TRUE(check_tokenizer_file(file(map(units, text))).ok());
  units[1] = 0x80000002u;
  EXPECT_FALSE(check_tokenizer_file(file(map(units, text))).ok());
}

}  // namespace
}  // namespace servoflow::stages
