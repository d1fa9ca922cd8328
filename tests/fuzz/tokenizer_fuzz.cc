// A damaged SentencePiece model is refused before it can make the library read outside its memory.
#include "stages/preprocess/tokenizer.h"
#include "tests/fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  constexpr int kVocab = 2048;
  const auto tokenizer =
      servoflow::stages::Tokenizer::parse(servoflow::fuzz::as_text(data, size), "fuzz", kVocab);
  if (!servoflow::fuzz::accepted(tokenizer)) return 0;
  std::vector<std::int32_t> ids;
  if (!servoflow::fuzz::accepted((*tokenizer)->encode("pick up the red cup, State: 12 255;\n", true, ids)))
    return 0;
  for (const std::int32_t id : ids) servoflow::fuzz::require(id >= 0 && id < kVocab);
  return 0;
}
