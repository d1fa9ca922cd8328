// Reading one JSON object strictly: every field typed and ranged, every unread key an error.
#pragma once

#include <optional>
#include <set>
#include <string>
#include <vector>

#include "contract/problems.h"
#include "core/json.h"

namespace servoflow::contract {

// What is wrong is added to `problems` under `path.key`; the reading functions then return their fallback.
class JsonFields {
 public:
  JsonFields(const Json& value, std::string path, Problems& problems);

  // The field's value, marked as read; nullptr when it is absent (an error if `required`).
  const Json* get(const std::string& key, bool required);
  std::string text(const std::string& key, const std::optional<std::string>& fallback = std::nullopt);
  bool boolean(const std::string& key, std::optional<bool> fallback = std::nullopt);
  int integer(const std::string& key, int low, int high, std::optional<int> fallback = std::nullopt);
  // Finite numbers. `required` false: an absent or null field is an empty list.
  std::vector<double> numbers(const std::string& key, bool required = true);
  std::vector<std::string> texts(const std::string& key, bool required = true);
  // The elements of an array field; none when it is absent.
  std::vector<const Json*> elements(const std::string& key, bool required = true);
  // Names every key that was not asked for.
  void refuse_unknown();

  bool is_object() const { return object_ != nullptr; }
  std::string field(const std::string& key) const { return path_.empty() ? key : path_ + "." + key; }
  Problems& problems() { return problems_; }

 private:
  const Json* object_ = nullptr;
  std::string path_;
  Problems& problems_;
  std::set<std::string> known_;
};

}  // namespace servoflow::contract
