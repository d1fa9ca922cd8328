// Reading the fields of a user's JSON object: every wrong one becomes a line in a list of problems, none
// stops the reading.
#pragma once

#include <set>
#include <string>
#include <vector>

#include "core/json.h"

namespace servoflow::weights {

class Fields {
 public:
  // `object` must be a JSON object. Problems read "FILE: PREFIXkey: cause"; `prefix` is empty or ends with a
  // dot.
  Fields(const Json& object, std::string file, std::string prefix, std::vector<std::string>& problems)
      : object_(object), file_(std::move(file)), prefix_(std::move(prefix)), problems_(problems) {}

  bool has(const char* key) const { return object_.contains(key); }
  // Each leaves `out` as it is when the key is absent, which is a problem only if it is required, or wrong.
  // They return whether `out` was set.
  bool integer(const char* key, int& out, int low, int high, bool required = true);
  bool number(const char* key, double& out, double low, double high, bool required = true);
  bool text(const char* key, std::string& out, bool required = true);
  bool flag(const char* key, bool& out, bool required = true);
  // The object under `key`, or null.
  const Json* object(const char* key, bool required = true);
  // The value under a key that is there, of any kind.
  const Json& any(const char* key);
  // Adds a problem about this key.
  void problem(const std::string& key, const std::string& cause);
  // Keys nobody has asked for.
  std::vector<std::string> unread() const;
  // Every unread key is a problem that lists the known ones.
  void refuse_unread();

 private:
  const Json* find(const char* key, bool required, const char* expected);

  const Json& object_;
  std::string file_, prefix_;
  std::vector<std::string>& problems_;
  std::set<std::string> asked_;
};

// A JSON value for an error message: one line, at most 60 characters.
std::string shown(const Json& value);
// A name that came out of a file, for a message: control characters replaced, at most 200 characters.
std::string printable(const std::string& text);
// Whether a relative path, as found in a file, stays inside the directory it is relative to.
bool stays_inside(const std::string& relative);
// Lines that differ only in a layer number become one: "…layers.{0-3,7}.mlp…". The order of first lines is
// kept.
std::vector<std::string> collapse_layers(const std::vector<std::string>& lines);
// "WHERE: cause", or "WHERE: N problems:" with one indented line each.
std::string problem_text(const std::string& where, const std::vector<std::string>& problems);

}  // namespace servoflow::weights
