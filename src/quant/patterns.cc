#include "quant/patterns.h"

#include <cstddef>

namespace servoflow::quant {
namespace {
constexpr std::size_t kMaxExpression = 512;
constexpr std::size_t kMaxName = 1024;
}  // namespace

bool glob_matches(std::string_view glob, std::string_view name) {
  std::size_t g = 0, n = 0, star = std::string_view::npos, resume = 0;
  while (n < name.size()) {
    if (g < glob.size() && glob[g] == '*') {
      star = g++;
      resume = n;
    } else if (g < glob.size() && glob[g] == name[n]) {
      ++g;
      ++n;
    } else if (star != std::string_view::npos) {
      g = star + 1;
      n = ++resume;  // the star takes one more
    } else {
      return false;
    }
  }
  while (g < glob.size() && glob[g] == '*') ++g;
  return g == glob.size();
}

Result<NamePattern> NamePattern::compile(const std::string& text, bool globs) {
  NamePattern pattern;
  pattern.text_ = text;
  if (text.empty()) return Status::invalid("an empty pattern matches nothing");
  if (!text.starts_with("re:")) {
    if (globs && text.find('*') != std::string::npos) pattern.kind_ = Kind::kGlob;
    return pattern;
  }
  pattern.kind_ = Kind::kExpression;
  if (text.size() > kMaxExpression)
    return Status::invalid("expression of " + std::to_string(text.size()) + " characters; at most " +
                           std::to_string(kMaxExpression) + " are accepted");
  try {
    // The breadth-first matcher: no pattern can make it exponential, or recurse with the name's length.
    pattern.expression_ = std::make_shared<const std::regex>(
        text.substr(3), std::regex::ECMAScript | std::regex_constants::__polynomial);
  } catch (const std::regex_error& error) {
    return Status::invalid(
        "\"" + text +
        "\" is not an expression that can be used here (ECMAScript, no back references): " + error.what());
  }
  return pattern;
}

bool NamePattern::matches(std::string_view name) const {
  switch (kind_) {
    case Kind::kExact:
      return name == text_;
    case Kind::kGlob:
      return glob_matches(text_, name);
    case Kind::kExpression:
      try {
        return name.size() <= kMaxName && std::regex_search(name.begin(), name.end(), *expression_,
                                                            std::regex_constants::match_continuous);
      } catch (const std::regex_error&) {
        return false;
      }
  }
  return false;
}

}  // namespace servoflow::quant
