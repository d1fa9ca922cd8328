#include "core/json.h"

#include <set>
#include <vector>

#include "core/file.h"
#include "core/status_macros.h"

namespace servoflow {
namespace {

constexpr int kMaxDepth = 64;

// Builds the document while it refuses duplicate keys and deep nesting, which nlohmann's own parser accepts.
class StrictBuilder : public nlohmann::json_sax<Json> {
 public:
  explicit StrictBuilder(Json& root) : dom_(root, false) {}
  bool null() override { return dom_.null(); }
  bool boolean(bool v) override { return dom_.boolean(v); }
  bool number_integer(number_integer_t v) override { return dom_.number_integer(v); }
  bool number_unsigned(number_unsigned_t v) override { return dom_.number_unsigned(v); }
  bool number_float(number_float_t v, const string_t& s) override { return dom_.number_float(v, s); }
  bool string(string_t& v) override { return dom_.string(v); }
  bool binary(binary_t& v) override { return dom_.binary(v); }
  bool start_object(std::size_t n) override {
    keys_.emplace_back();
    return deeper() && dom_.start_object(n);
  }
  bool key(string_t& k) override {
    if (!keys_.back().insert(k).second) {
      error = "duplicate key \"" + k + "\"";
      return false;
    }
    return dom_.key(k);
  }
  bool end_object() override {
    keys_.pop_back();
    --depth_;
    return dom_.end_object();
  }
  bool start_array(std::size_t n) override { return deeper() && dom_.start_array(n); }
  bool end_array() override {
    --depth_;
    return dom_.end_array();
  }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception& e) override {
    std::string what = e.what();
    if (const auto colon = what.find("] "); colon != std::string::npos) what = what.substr(colon + 2);
    error = "not valid JSON at byte " + std::to_string(position) + ": " + what;
    return false;
  }
  std::string error;

 private:
  bool deeper() {
    if (++depth_ <= kMaxDepth) return true;
    error = "nested deeper than " + std::to_string(kMaxDepth) + " levels";
    return false;
  }
  nlohmann::detail::json_sax_dom_parser<Json> dom_;
  std::vector<std::set<std::string>> keys_;
  int depth_ = 0;
};

}  // namespace

Result<Json> parse_json(std::string_view text, const std::string& where) {
  Json root;
  StrictBuilder builder(root);
  if (!Json::sax_parse(text.begin(), text.end(), &builder)) {
    return Status::invalid(where + ": " + (builder.error.empty() ? "not valid JSON" : builder.error));
  }
  return root;
}

Result<Json> read_json_file(const std::string& path, std::size_t max_bytes) {
  SF_ASSIGN_OR_RETURN(const std::string text, read_text_file(path, max_bytes));
  return parse_json(text, path);
}

std::string json_kind(const Json& value) { return value.type_name(); }

}  // namespace servoflow
