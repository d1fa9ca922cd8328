#include "contract/toml_json.h"

// toml++ asserts on some malformed headers ("[%") that it then reports as errors anyway; with NDEBUG it would
// even assume that they do not occur. Neither may happen with a user's file.
#ifdef NDEBUG
#undef NDEBUG
#endif
#define TOML_ASSERT(expression) static_cast<void>(0)
#define TOML_EXCEPTIONS 0
#define TOML_HEADER_ONLY 1
#define TOML_ENABLE_FORMATTERS 0
#include <toml++/toml.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>

namespace servoflow::contract {
namespace {

// The code point that starts at text[i] and its length in bytes; length 0 if this is not UTF-8.
struct CodePoint {
  char32_t value = 0;
  std::size_t length = 0;
};

CodePoint code_point(std::string_view text, std::size_t i) {
  const auto lead = static_cast<unsigned char>(text[i]);
  const std::size_t length = lead < 0xC2 ? 0 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF5 ? 4 : 0;
  if (length == 0 || i + length > text.size()) return {};
  char32_t value = lead & (0x7Fu >> length);
  for (std::size_t k = 1; k < length; ++k) {
    const auto next = static_cast<unsigned char>(text[i + k]);
    if ((next & 0xC0) != 0x80) return {};
    value = value << 6 | (next & 0x3Fu);
  }
  constexpr std::array<char32_t, 5> kSmallest = {0, 0, 0x80, 0x800, 0x10000};
  const bool is_surrogate = value >= 0xD800 && value < 0xE000;
  if (value < kSmallest[length] || is_surrogate || value > 0x10FFFF) return {};
  return {value, length};
}

// The same TOML in ASCII: characters beyond it become escapes in strings and vanish from comments. toml++ 3.3
// cannot be given any other character: its search for white space runs into undefined behaviour on some of
// them, also while it words an error. `problem` is empty or says what has no ASCII form, with its line.
std::string to_ascii(std::string_view toml, std::string& problem) {
  std::string ascii;
  ascii.reserve(toml.size());
  int line = 1;
  char quote = 0;  // of the string we are in, '#' in a comment
  const auto refuse = [&](const char* why) {
    problem = "line " + std::to_string(line) + ": " + why;
    return std::string();
  };
  for (std::size_t i = 0; i < toml.size(); ++i) {
    const char c = toml[i];
    if (static_cast<unsigned char>(c) < 0x80) {
      ascii += c;
      if (c == '\n') {
        ++line;
        quote = 0;  // a string that is cut short is the parser's to refuse
      } else if (quote == 0 && (c == '"' || c == '\'' || c == '#')) {
        if (c != '#' && toml.substr(i, 3) == std::string(3, c)) {
          return refuse("multi-line strings have no place here");
        }
        quote = c;
      } else if (quote == '"' && c == '\\' && i + 1 < toml.size() && toml[i + 1] != '\n') {
        if (static_cast<unsigned char>(toml[i + 1]) >= 0x80) return refuse("not valid TOML: unknown escape");
        ascii += toml[++i];
      } else if (quote == c && c != '#') {
        quote = 0;
      }
      continue;
    }
    if (quote == '#') continue;
    if (quote == 0) return refuse("not valid TOML: only ASCII may stand outside of strings and comments");
    if (quote == '\'') return refuse("characters beyond ASCII need a string in double quotes");
    const CodePoint point = code_point(toml, i);
    if (point.length == 0) return refuse("not valid TOML: a string is not UTF-8");
    std::array<char, 11> escape{};
    std::snprintf(escape.data(), escape.size(), "\\U%08X", static_cast<unsigned>(point.value));
    ascii += escape.data();
    i += point.length - 1;
  }
  return ascii;
}

Json to_json(const toml::node& node, const std::string& path, Problems& problems) {
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
    for (const toml::node& value : *array) {
      list.push_back(to_json(value, path + "[" + std::to_string(list.size()) + "]", problems));
    }
    return list;
  }
  if (const auto* text = node.as_string()) return text->get();
  if (const auto* integer = node.as_integer()) return integer->get();
  if (const auto* flag = node.as_boolean()) return flag->get();
  if (const auto* number = node.as_floating_point(); number != nullptr && std::isfinite(number->get())) {
    return number->get();
  }
  problems.add(path,
               node.is_floating_point() ? "must be a finite number" : "dates and times have no meaning here");
  return nullptr;
}

}  // namespace

Result<Json> parse_toml(std::string_view toml, const std::string& where, Problems& problems) {
  std::string problem;
  const std::string ascii = to_ascii(toml, problem);
  if (!problem.empty()) return Status::invalid(where + ": " + problem);
  const toml::parse_result parsed = toml::parse(ascii, where);
  if (!parsed) {
    const toml::parse_error& error = parsed.error();
    return Status::invalid(where + ": line " + std::to_string(error.source().begin.line) +
                           ": not valid TOML: " + std::string(error.description()));
  }
  return to_json(parsed.table(), "", problems);
}

}  // namespace servoflow::contract
