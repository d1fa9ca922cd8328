#include "stages/preprocess/tokenizer.h"

#include <sentencepiece_processor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <exception>

#include "core/file.h"
#include "core/status_macros.h"
#include "stages/preprocess/tokenizer_file.h"

// Exported by the library, declared in none of its installed headers. Without it a bad model file prints to
// stderr.
namespace sentencepiece::logging {
void SetMinLogLevel(int level);
}

namespace servoflow::stages {
namespace {

constexpr int kSilent = 4;  // above SentencePiece's FATAL
constexpr std::size_t kMaxModelBytes = std::size_t{256} << 20;

// The code point at `text[i]`, and how many bytes it takes; 0 bytes for what is not UTF-8.
struct CodePoint {
  std::uint32_t value = 0;
  std::size_t bytes = 0;
};

CodePoint code_point(std::string_view text, std::size_t i) {
  const auto byte = [&](std::size_t k) { return static_cast<std::uint8_t>(text[i + k]); };
  const std::uint8_t lead = byte(0);
  if (lead < 0x80) return {lead, 1};
  const std::size_t bytes = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
  if (lead < 0xc2 || lead > 0xf4 || text.size() - i < bytes) return {};
  std::uint32_t value = lead & (0x7fu >> bytes);
  for (std::size_t k = 1; k < bytes; ++k) {
    if ((byte(k) & 0xc0) != 0x80) return {};
    value = (value << 6) | (byte(k) & 0x3fu);
  }
  constexpr std::uint32_t kSmallest[] = {0, 0, 0x80, 0x800, 0x10000};
  if (value < kSmallest[bytes] || value > 0x10ffff || (value >= 0xd800 && value <= 0xdfff)) return {};
  return {value, bytes};
}

// What Python's str.isspace() is true of.
bool is_space(std::uint32_t c) {
  return (c >= 0x09 && c <= 0x0d) || (c >= 0x1c && c <= 0x20) || c == 0x85 || c == 0xa0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f ||
         c == 0x3000;
}

Status wrong(const sentencepiece::util::Status& status) { return Status::invalid(status.ToString()); }

}  // namespace

bool is_utf8(std::string_view text) {
  for (std::size_t i = 0; i < text.size();) {
    const CodePoint c = code_point(text, i);
    if (c.bytes == 0) return false;
    i += c.bytes;
  }
  return true;
}

std::string clean_prompt(std::string_view text) {
  std::size_t begin = text.size(), end = 0;
  for (std::size_t i = 0; i < text.size();) {
    const CodePoint c = code_point(text, i);
    const std::size_t bytes = std::max<std::size_t>(c.bytes, 1);
    if (!is_space(c.value)) {
      begin = std::min(begin, i);
      end = i + bytes;
    }
    i += bytes;
  }
  std::string cleaned(begin < end ? text.substr(begin, end - begin) : std::string_view());
  for (char& c : cleaned) {
    if (c == '_' || c == '\n') c = ' ';
  }
  return cleaned;
}

int state_bin(double x) {
  if (!(x >= -1.0)) return -1;
  if (x >= 1.0) return 255;
  // The edges are exact in binary, but x + 1 rounds: correct the guess by comparing with the edges
  // themselves.
  int bin = std::min(static_cast<int>((x + 1.0) * 128.0), 255);
  if (-1.0 + bin / 128.0 > x) --bin;
  if (bin < 255 && -1.0 + (bin + 1) / 128.0 <= x) ++bin;
  return bin;
}

std::string state_prompt(std::string_view cleaned, std::span<const int> bins) {
  std::string text = "Task: ";
  text += cleaned;
  text += ", State: ";
  for (std::size_t i = 0; i < bins.size(); ++i) {
    if (i > 0) text += ' ';
    text += std::to_string(bins[i]);
  }
  text += ";\nAction: ";
  return text;
}

struct Tokenizer::Impl {
  sentencepiece::SentencePieceProcessor processor;
  std::int32_t bos = 0;
  struct Literal {
    std::string text;
    std::int32_t id = 0;
  };
  std::vector<Literal> literals;
};

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::~Tokenizer() = default;

Result<std::unique_ptr<Tokenizer>> Tokenizer::open(const std::string& path, int vocab) {
  SF_ASSIGN_OR_RETURN(const std::string bytes, read_text_file(path, kMaxModelBytes));
  return parse(bytes, path, vocab);
}

Result<std::unique_ptr<Tokenizer>> Tokenizer::parse(std::string_view bytes, const std::string& where,
                                                    int vocab) {
  auto impl = std::make_unique<Impl>();
  SF_RETURN_IF_ERROR(check_tokenizer_file(bytes).with_context(where));
  sentencepiece::logging::SetMinLogLevel(kSilent);
  try {
    const auto status = impl->processor.LoadFromSerializedProto({bytes.data(), bytes.size()});
    if (!status.ok())
      return Status::invalid(where + ": not a usable SentencePiece model: " + status.ToString());
  } catch (const std::exception& error) {
    return Status::invalid(where + ": not a usable SentencePiece model: " + error.what());
  }
  const int pieces = impl->processor.GetPieceSize();
  if (pieces > vocab) {
    return Status::invalid(where + ": has " + std::to_string(pieces) +
                           " pieces, but the model's token table only " + std::to_string(vocab) +
                           " rows; this tokenizer belongs to another model");
  }
  impl->bos = impl->processor.bos_id();
  if (impl->bos < 0) return Status::invalid(where + ": has no begin-of-sequence piece; pi0.5 needs one");
  for (const char* text : {"<bos>", "<eos>", "<pad>", "<unk>"}) {
    const int id = impl->processor.PieceToId(text);
    if (impl->processor.IdToPiece(id) == text) impl->literals.push_back({text, id});
  }
  return std::unique_ptr<Tokenizer>(new Tokenizer(std::move(impl)));
}

Status Tokenizer::encode(std::string_view text, bool special_literals, std::vector<std::int32_t>& ids) const {
  std::vector<int> piece_ids;
  while (!text.empty()) {
    // Up to the first special literal; its neighbours are tokenised apart, as transformers does.
    std::size_t stop = text.size();
    const Impl::Literal* literal = nullptr;
    if (special_literals) {
      for (const Impl::Literal& candidate : impl_->literals) {
        const std::size_t at = text.find(candidate.text);
        if (at < stop) {
          stop = at;
          literal = &candidate;
        }
      }
    }
    if (stop > 0) {
      try {
        const auto status = impl_->processor.Encode({text.data(), stop}, &piece_ids);
        if (!status.ok()) return wrong(status);
      } catch (const std::exception& error) {
        return Status::runtime(std::string("tokenizer: ") + error.what());
      }
      ids.insert(ids.end(), piece_ids.begin(), piece_ids.end());
    }
    if (literal == nullptr) break;
    ids.push_back(literal->id);
    text.remove_prefix(stop + literal->text.size());
  }
  return Status::ok_status();
}

Status Tokenizer::encode_prompt(std::string_view prompt, std::span<const int> bins,
                                const contract::Prompt& format, std::vector<std::int32_t>& ids,
                                bool& truncated) const {
  const std::string cleaned = clean_prompt(prompt);
  ids.clear();
  ids.push_back(impl_->bos);
  if (format.mode == contract::PromptMode::kState) {
    SF_RETURN_IF_ERROR(encode(state_prompt(cleaned, bins), format.special_literals, ids));
  } else {
    SF_RETURN_IF_ERROR(encode(cleaned, format.special_literals, ids));
    SF_RETURN_IF_ERROR(encode("\n", false, ids));
  }
  const std::size_t limit = static_cast<std::size_t>(format.max_tokens);
  truncated = ids.size() > limit;
  if (truncated) ids.resize(limit);
  return Status::ok_status();
}

}  // namespace servoflow::stages
