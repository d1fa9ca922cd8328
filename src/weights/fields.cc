#include "weights/fields.h"

#include <algorithm>
#include <cctype>
#include <map>

namespace servoflow::weights {
namespace {

// At most `limit` bytes, never half a UTF-8 character.
std::string clipped(const std::string& text, std::size_t limit) {
  if (text.size() <= limit) return text;
  while (limit > 0 && (static_cast<unsigned char>(text[limit]) & 0xc0) == 0x80) --limit;
  return text.substr(0, limit) + "…";
}

std::string range_text(double low, double high) { return shown(Json(low)) + " … " + shown(Json(high)); }

}  // namespace

const Json* Fields::find(const char* key, bool required, const char* expected) {
  asked_.insert(key);
  const auto it = object_.find(key);
  if (it != object_.end() && !it->is_null()) return &*it;
  if (required)
    problem(key, std::string(it == object_.end() ? "missing" : "is null") + ", expected " + expected);
  return nullptr;
}

bool Fields::integer(const char* key, int& out, int low, int high, bool required) {
  const Json* value = find(key, required, "an integer");
  if (value == nullptr) return false;
  const bool fits = value->is_number_unsigned()
                        ? value->get<std::uint64_t>() <= static_cast<std::uint64_t>(high)
                    : value->is_number_integer() ? value->get<std::int64_t>() <= high
                                                 : false;
  if (!value->is_number_integer() || !fits || value->get<std::int64_t>() < low) {
    problem(key, "expected an integer from " + std::to_string(low) + " to " + std::to_string(high) +
                     ", found " + shown(*value));
    return false;
  }
  out = value->get<int>();
  return true;
}

bool Fields::number(const char* key, double& out, double low, double high, bool required) {
  const Json* value = find(key, required, "a number");
  if (value == nullptr) return false;
  if (!value->is_number() || !(value->get<double>() >= low && value->get<double>() <= high)) {
    problem(key, "expected a number in " + range_text(low, high) + ", found " + shown(*value));
    return false;
  }
  out = value->get<double>();
  return true;
}

bool Fields::text(const char* key, std::string& out, bool required) {
  const Json* value = find(key, required, "a string");
  if (value == nullptr) return false;
  if (!value->is_string()) {
    problem(key, "expected a string, found " + shown(*value));
    return false;
  }
  out = value->get<std::string>();
  return true;
}

bool Fields::flag(const char* key, bool& out, bool required) {
  const Json* value = find(key, required, "true or false");
  if (value == nullptr) return false;
  if (!value->is_boolean()) {
    problem(key, "expected true or false, found " + shown(*value));
    return false;
  }
  out = value->get<bool>();
  return true;
}

const Json* Fields::object(const char* key, bool required) {
  const Json* value = find(key, required, "an object");
  if (value == nullptr) return nullptr;
  if (value->is_object()) return value;
  problem(key, "expected an object, found " + shown(*value));
  return nullptr;
}

const Json& Fields::any(const char* key) {
  asked_.insert(key);
  return *object_.find(key);
}

void Fields::problem(const std::string& key, const std::string& cause) {
  problems_.push_back(file_ + ": " + prefix_ + printable(key) + ": " + cause);
}

std::vector<std::string> Fields::unread() const {
  std::vector<std::string> out;
  for (const auto& [key, value] : object_.items())
    if (!asked_.contains(key)) out.push_back(key);
  return out;
}

void Fields::refuse_unread() {
  std::string known;
  for (const std::string& key : asked_) known += (known.empty() ? "" : ", ") + key;
  for (const std::string& key : unread()) problem(key, "unknown key; known here: " + known);
}

std::string shown(const Json& value) {
  if (value.is_object() || value.is_array())
    return json_kind(value) + " of " + std::to_string(value.size()) + " entries";
  return clipped(value.dump(-1, ' ', false, Json::error_handler_t::replace), 60);
}

std::string printable(const std::string& text) {
  std::string out = clipped(text, 200);
  for (char& c : out)
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  return out;
}

bool stays_inside(const std::string& relative) {
  if (relative.empty() || relative.front() == '/') return false;
  if (relative.find('\0') != std::string::npos || relative.find('\\') != std::string::npos) return false;
  for (std::size_t begin = 0; begin <= relative.size();) {
    const std::size_t end = std::min(relative.find('/', begin), relative.size());
    const std::string part = relative.substr(begin, end - begin);
    if (part.empty() || part == "." || part == "..") return false;
    begin = end + 1;
  }
  return true;
}

std::vector<std::string> collapse_layers(const std::vector<std::string>& lines) {
  constexpr std::string_view kMark = "layers.";
  struct Group {
    std::string head, tail;
    std::vector<long> layers;
    std::size_t slot;
  };
  std::vector<std::string> out;
  std::map<std::string, Group> groups;
  for (const std::string& line : lines) {
    const std::size_t at = line.find(kMark);
    std::size_t begin = at == std::string::npos ? 0 : at + kMark.size(), end = begin;
    while (at != std::string::npos && end < line.size() && end - begin < 6 && std::isdigit(line[end]) != 0)
      ++end;
    if (end == begin || end >= line.size() || line[end] != '.') {
      out.push_back(line);
      continue;
    }
    const std::string head = line.substr(0, begin), tail = line.substr(end);
    auto [it, fresh] = groups.try_emplace(head + '\n' + tail, Group{head, tail, {}, out.size()});
    if (fresh) out.emplace_back();
    it->second.layers.push_back(std::stol(line.substr(begin, end - begin)));
  }
  for (auto& [key, group] : groups) {
    std::vector<long>& n = group.layers;
    std::sort(n.begin(), n.end());
    std::string text;
    for (std::size_t i = 0; i < n.size();) {
      std::size_t j = i;
      while (j + 1 < n.size() && n[j + 1] == n[j] + 1) ++j;
      if (!text.empty()) text += ',';
      text += std::to_string(n[i]);
      if (j > i) text.append("-").append(std::to_string(n[j]));
      i = j + 1;
    }
    const bool several = n.size() > 1;
    out[group.slot] = group.head + (several ? "{" : "") + text + (several ? "}" : "") + group.tail;
  }
  return out;
}

std::string problem_text(const std::string& where, const std::vector<std::string>& problems) {
  if (problems.size() == 1) return where + ": " + problems[0];
  std::string out = where + ": " + std::to_string(problems.size()) + " problems:";
  for (const std::string& line : problems) out += "\n  " + line;
  return out;
}

}  // namespace servoflow::weights
