// Collects everything wrong with one file, so that its owner can mend it in one go.
#pragma once

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "servoflow/status.h"

namespace servoflow::contract {

class Problems {
 public:
  // `where` (a path) starts every line.
  explicit Problems(std::string where) : where_(std::move(where)) {}

  // Records "where: field: cause". `cause` says what is wrong and how to mend it.
  void add(const std::string& field, const std::string& cause) {
    // A hostile file can be wrong in millions of places; nobody reads beyond the first ones.
    if (lines_.size() < kMaxLines) {
      lines_.push_back(where_ + ": " + (field.empty() ? "" : field + ": ") + cause);
    } else {
      ++left_out_;
    }
  }
  bool empty() const { return lines_.empty(); }
  std::size_t count() const { return lines_.size() + left_out_; }
  const std::string& where() const { return where_; }
  const std::vector<std::string>& lines() const { return lines_; }

  // Ok when nothing was recorded, else one error with a line for each problem.
  Status status() const {
    if (lines_.empty()) return Status::ok_status();
    std::string text;
    for (const std::string& line : lines_) text += (text.empty() ? "" : "\n") + line;
    if (left_out_ > 0) text += "\n" + where_ + ": and " + std::to_string(left_out_) + " more problems";
    return Status::invalid(std::move(text));
  }

 private:
  static constexpr std::size_t kMaxLines = 40;
  std::string where_;
  std::vector<std::string> lines_;
  std::size_t left_out_ = 0;
};

// "a, b, c", or `none` for an empty list.
inline std::string join(const std::vector<std::string>& items, const std::string& none = "none") {
  std::string text;
  for (const std::string& item : items) text += (text.empty() ? "" : ", ") + item;
  return text.empty() ? none : text;
}

}  // namespace servoflow::contract
