#include "toolkit/plan_toml.h"

// As in contract/toml_robot.cc: toml++ asserts on malformed headers that it reports as errors anyway, and its
// search for white space runs into undefined behaviour on some characters beyond ASCII.
#ifdef NDEBUG
#undef NDEBUG
#endif
#define TOML_ASSERT(expression) static_cast<void>(0)
#define TOML_EXCEPTIONS 0
#define TOML_HEADER_ONLY 1
#define TOML_ENABLE_FORMATTERS 0
#include <toml++/toml.h>

#include <cmath>

#include "contract/problems.h"
#include "core/file.h"
#include "core/status_macros.h"

namespace servoflow::toolkit {
namespace {

constexpr std::size_t kMaxBytes = std::size_t{1} << 20;

// The text without what comments hold beyond ASCII.
Result<std::string> to_ascii(std::string_view text, const std::string& where) {
  std::string out;
  out.reserve(text.size());
  int line = 1;
  char quote = 0;  // of the string we are in, '#' in a comment
  const auto refuse = [&](const char* why) {
    return Status::invalid(where + ": line " + std::to_string(line) + ": " + why);
  };
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (static_cast<unsigned char>(c) >= 0x80) {
      if (quote != '#') return refuse("characters beyond ASCII may stand in comments only");
      continue;
    }
    out += c;
    if (c == '\n') {
      ++line;
      quote = 0;
    } else if (quote == 0 && (c == '"' || c == '\'' || c == '#')) {
      if (c != '#' && text.substr(i, 3) == std::string(3, c))
        return refuse("multi-line strings are not read");
      quote = c;
    } else if (quote == '"' && c == '\\' && i + 1 < text.size() && text[i + 1] != '\n' &&
               static_cast<unsigned char>(text[i + 1]) < 0x80) {
      out += text[++i];
    } else if (quote == c && c != '#') {
      quote = 0;
    }
  }
  return out;
}

Json to_json(const toml::node& node, const std::string& path, contract::Problems& problems) {
  if (const toml::table* table = node.as_table()) {
    Json object = Json::object();
    for (const auto& [key, value] : *table) {
      const std::string name(key.str());
      object[name] = to_json(value, path.empty() ? name : path + "." + name, problems);
    }
    return object;
  }
  if (const toml::array* array = node.as_array()) {
    Json list = Json::array();
    for (const toml::node& value : *array)
      list.push_back(to_json(value, path + "[" + std::to_string(list.size()) + "]", problems));
    return list;
  }
  if (const auto* text = node.as_string()) return text->get();
  if (const auto* integer = node.as_integer()) return integer->get();
  if (const auto* flag = node.as_boolean()) return flag->get();
  if (const auto* number = node.as_floating_point(); number != nullptr && std::isfinite(number->get()))
    return number->get();
  problems.add(path,
               node.is_floating_point() ? "must be a finite number" : "dates and times have no meaning here");
  return nullptr;
}

}  // namespace

Result<Json> parse_toml(std::string_view text, const std::string& where) {
  if (text.size() > kMaxBytes) return Status::invalid(where + ": larger than 1 MiB");
  SF_ASSIGN_OR_RETURN(const std::string ascii, to_ascii(text, where));
  const toml::parse_result parsed = toml::parse(ascii, where);
  if (!parsed)
    return Status::invalid(where + ": line " + std::to_string(parsed.error().source().begin.line) +
                           ": not valid TOML: " + std::string(parsed.error().description()));
  contract::Problems problems(where);
  Json json = to_json(parsed.table(), "", problems);
  SF_RETURN_IF_ERROR(problems.status());
  return json;
}

Result<Json> read_toml_file(const std::string& path) {
  SF_ASSIGN_OR_RETURN(const std::string text, read_text_file(path, kMaxBytes));
  return parse_toml(text, path);
}

}  // namespace servoflow::toolkit
