#include <cstdlib>
#include <filesystem>
#include <system_error>

#include "weights/checkpoint.h"
#include "weights/fields.h"

namespace servoflow::weights {
namespace {

bool is_file(const std::string& path) {
  std::error_code ignored;
  return std::filesystem::is_regular_file(path, ignored);
}

constexpr char kAdvice[] =
    "pass --tokenizer FILE or set SERVOFLOW_TOKENIZER: PaliGemma's SentencePiece model, public as "
    "gs://big_vision/paligemma_tokenizer.model "
    "(https://storage.googleapis.com/big_vision/paligemma_tokenizer.model) or as "
    "tokenizer.model in google/paligemma-3b-pt-224";

}  // namespace

Result<std::string> find_tokenizer(const std::string& dir, const std::string& named_by_config,
                                   const std::string& option) {
  if (!option.empty()) {
    if (is_file(option)) return option;
    return Status::invalid("--tokenizer: " + printable(option) + ": no such file");
  }
  std::vector<std::string> candidates;
  if (!named_by_config.empty() && stays_inside(named_by_config))
    candidates.push_back(dir + "/" + named_by_config);
  for (const char* name : {"/tokenizer.model", "/tokenizer/tokenizer.model"})
    if (candidates.empty() || candidates.front() != dir + name) candidates.push_back(dir + name);
  std::string looked;
  for (const std::string& path : candidates) {
    if (is_file(path)) return path;
    looked += (looked.empty() ? "" : ", ") + path;
  }
  if (const char* variable = std::getenv("SERVOFLOW_TOKENIZER"); variable != nullptr && *variable != '\0') {
    if (is_file(variable)) return std::string(variable);
    return Status::invalid("SERVOFLOW_TOKENIZER: " + printable(variable) + ": no such file");
  }
  std::string message = "no tokenizer found (looked for " + looked + ")";
  for (const char* name : {"/tokenizer.json", "/tokenizer/tokenizer.json"})
    if (is_file(dir + name)) message += "; " + dir + name + " is of another kind and cannot be used";
  return Status::invalid(message + "; " + kAdvice);
}

}  // namespace servoflow::weights
