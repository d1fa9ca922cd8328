#include "contract/json_fields.h"

#include <cmath>
#include <utility>

namespace servoflow::contract {

JsonFields::JsonFields(const Json& value, std::string path, Problems& problems)
    : path_(std::move(path)), problems_(problems) {
  if (value.is_object()) {
    object_ = &value;
  } else {
    problems_.add(path_, "must be an object, is " + json_kind(value));
  }
}

const Json* JsonFields::get(const std::string& key, bool required) {
  if (object_ == nullptr) return nullptr;
  known_.insert(key);
  const auto found = object_->find(key);
  if (found != object_->end()) return &*found;
  if (required) problems_.add(field(key), "missing");
  return nullptr;
}

std::string JsonFields::text(const std::string& key, const std::optional<std::string>& fallback) {
  const Json* value = get(key, !fallback);
  if (value == nullptr) return fallback.value_or("");
  if (value->is_string()) return value->get_ref<const std::string&>();
  problems_.add(field(key), "must be a string, is " + json_kind(*value));
  return fallback.value_or("");
}

bool JsonFields::boolean(const std::string& key, std::optional<bool> fallback) {
  const Json* value = get(key, !fallback);
  if (value == nullptr) return fallback.value_or(false);
  if (value->is_boolean()) return value->get<bool>();
  problems_.add(field(key), "must be true or false, is " + json_kind(*value));
  return fallback.value_or(false);
}

int JsonFields::integer(const std::string& key, int low, int high, std::optional<int> fallback) {
  const Json* value = get(key, !fallback);
  if (value == nullptr) return fallback.value_or(low);
  if (!value->is_number_integer()) {
    problems_.add(field(key), "must be an integer, is " + json_kind(*value));
    return fallback.value_or(low);
  }
  // Unsigned values above the signed range would wrap when read as signed.
  const bool huge = value->is_number_unsigned() && value->get<std::uint64_t>() > (std::uint64_t{1} << 62);
  const std::int64_t number = huge ? 0 : value->get<std::int64_t>();
  if (huge || number < low || number > high) {
    problems_.add(field(key), "must lie between " + std::to_string(low) + " and " + std::to_string(high) +
                                  ", is " + value->dump());
    return fallback.value_or(low);
  }
  return static_cast<int>(number);
}

std::vector<const Json*> JsonFields::elements(const std::string& key, bool required) {
  const Json* value = get(key, required);
  std::vector<const Json*> items;
  if (value == nullptr) return items;
  if (!value->is_array()) {
    problems_.add(field(key), "must be an array, is " + json_kind(*value));
    return items;
  }
  items.reserve(value->size());
  for (const Json& item : *value) items.push_back(&item);
  return items;
}

std::vector<double> JsonFields::numbers(const std::string& key, bool required) {
  if (!required) {
    const Json* value = get(key, false);
    if (value == nullptr || value->is_null()) return {};
  }
  std::vector<double> numbers;
  for (const Json* item : elements(key, required)) {
    if (!item->is_number() || !std::isfinite(item->get<double>())) {
      problems_.add(field(key) + "[" + std::to_string(numbers.size()) + "]",
                    "must be a finite number, is " + json_kind(*item));
      return {};
    }
    numbers.push_back(item->get<double>());
  }
  return numbers;
}

std::vector<std::string> JsonFields::texts(const std::string& key, bool required) {
  std::vector<std::string> texts;
  for (const Json* item : elements(key, required)) {
    if (!item->is_string()) {
      problems_.add(field(key) + "[" + std::to_string(texts.size()) + "]",
                    "must be a string, is " + json_kind(*item));
      return {};
    }
    texts.push_back(item->get<std::string>());
  }
  return texts;
}

void JsonFields::refuse_unknown() {
  if (object_ == nullptr) return;
  for (const auto& [key, value] : object_->items()) {
    if (known_.count(key) == 0) {
      problems_.add(field(key), "unknown key; known here: " +
                                    join(std::vector<std::string>(known_.begin(), known_.end())));
    }
  }
}

}  // namespace servoflow::contract
