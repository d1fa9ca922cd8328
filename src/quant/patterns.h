// Patterns over the names of layers, as plans and the configs of both libraries write them.
#pragma once

#include <memory>
#include <regex>
#include <string>
#include <string_view>

#include "servoflow/status.h"

namespace servoflow::quant {

class NamePattern {
 public:
  enum class Kind { kExact, kExpression, kGlob };

  // "re:…" is an ECMAScript expression that must match from the name's start, not to its end (Python's
  // re.match, which compressed-tensors uses). With `globs`, a text with a * is a glob, in which * stands for
  // any characters. All else is an exact name. Fails for expressions that do not compile, are longer than 512
  // characters or need backtracking.
  static Result<NamePattern> compile(const std::string& text, bool globs);

  Kind kind() const { return kind_; }
  const std::string& text() const { return text_; }
  // Time is polynomial in pattern and name, whatever they are.
  bool matches(std::string_view name) const;

 private:
  Kind kind_ = Kind::kExact;
  std::string text_;
  std::shared_ptr<const std::regex> expression_;
};

bool glob_matches(std::string_view glob, std::string_view name);

}  // namespace servoflow::quant
