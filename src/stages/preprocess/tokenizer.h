// From a task and a state to token ids: pi0.5's two prompt formats on a SentencePiece model.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "contract/contract.h"
#include "servoflow/status.h"

namespace servoflow::stages {

// Whether `text` is UTF-8 as Unicode defines it: no overlong forms, no surrogates, nothing beyond U+10FFFF.
bool is_utf8(std::string_view text);

// The text as the policy was trained to see it: Python's str.strip(), then "_" and newlines become spaces.
// Case, tabs and carriage returns inside stay. `text` must be UTF-8.
std::string clean_prompt(std::string_view text);

// Which of 256 levels a normalised state number falls into: the number of edges -1 + 2k/256 (k = 0 … 255)
// that are <= x, less one. -1 for x below -1, 255 from the last edge on, without an upper end.
int state_bin(double x);

// "Task: {cleaned}, State: {bins};\nAction: "
std::string state_prompt(std::string_view cleaned, std::span<const int> bins);

class Tokenizer {
 public:
  // Loads a SentencePiece model file. `vocab` is the number of rows of the model's token table; the error
  // names the path when the file is damaged, has more pieces than that, or has no begin-of-sequence piece.
  static Result<std::unique_ptr<Tokenizer>> open(const std::string& path, int vocab);
  // The same from the file's bytes; `where` starts every error message.
  static Result<std::unique_ptr<Tokenizer>> parse(std::string_view bytes, const std::string& where,
                                                  int vocab);
  ~Tokenizer();

  // Appends the text's ids. With `special_literals` a literal "<bos>", "<eos>", "<pad>" or "<unk>" becomes
  // that token.
  Status encode(std::string_view text, bool special_literals, std::vector<std::int32_t>& ids) const;

  // Begin-of-sequence, then the prompt in one of its formats, cut to `max_tokens`. `bins` matter in state
  // mode only.
  Status encode_prompt(std::string_view prompt, std::span<const int> bins, const contract::Prompt& format,
                       std::vector<std::int32_t>& ids, bool& truncated) const;

 private:
  struct Impl;
  explicit Tokenizer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace servoflow::stages
