// Any text that a robot sends as its task: refused, or ids inside the vocabulary and never more than allowed.
#include "stages/preprocess/tokenizer.h"
#include "tests/fuzz/fuzz.h"

using servoflow::fuzz::require;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  namespace stages = servoflow::stages;
  constexpr int kVocab = 1024;
  static const auto tokenizer = stages::Tokenizer::open(SF_GOLDEN "/tokenizer/tokenizer.model", kVocab);
  require(tokenizer.ok());
  const std::string_view text = servoflow::fuzz::as_text(data, size);
  if (!stages::is_utf8(text)) return 0;  // refused before it gets here
  require(stages::is_utf8(stages::clean_prompt(text)));
  const int bins[] = {-1, 0, 128, 255};
  for (const auto mode : {servoflow::contract::PromptMode::kPlain, servoflow::contract::PromptMode::kState}) {
    servoflow::contract::Prompt format;
    format.mode = mode;
    format.max_tokens = 48;
    format.special_literals = size % 2 == 0;
    std::vector<std::int32_t> ids;
    bool truncated = false;
    if (!servoflow::fuzz::accepted((*tokenizer)->encode_prompt(text, bins, format, ids, truncated))) continue;
    require(!ids.empty() && ids.size() <= 48);
    for (const std::int32_t id : ids) require(id >= 0 && id < kVocab);
  }
  return 0;
}
