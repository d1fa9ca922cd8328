#include "toolkit/case_file.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <set>
#include <string_view>

#include "contract/canonical.h"
#include "core/json.h"
#include "core/status_macros.h"

namespace servoflow::toolkit {
namespace {

constexpr std::string_view kGroups[] = {
    "state_normalized",   "image",  "vision", "prefix/embeddings", "k", "v", "t", "time", "velocity", "x",
    "actions_normalized", "actions"};

// The tolerances of files that carry none (README of the goldens, "Tolerances").
ToleranceTable layout_fp32(bool lerobot) {
  const auto pick = [&](double openpi, double other) { return Gates{.max = lerobot ? other : openpi}; };
  return {{"state_normalized", pick(1e-6, 1e-6)},
          {"image", pick(1e-6, 1e-4)},
          {"vision", pick(2e-5, 1e-4)},
          {"prefix/embeddings", pick(2e-5, 1e-4)},
          {"k", pick(3e-4, 3e-4)},
          {"v", pick(2e-4, 2e-4)},
          {"t", pick(0, 0)},
          {"time", pick(5e-6, 5e-6)},
          {"velocity", pick(5e-4, 1e-3)},
          {"x", pick(2.5e-4, 5e-4)},
          {"actions_normalized", pick(2.5e-4, 5e-4)},
          {"actions", pick(2.5e-4, 5e-4)}};
}
ToleranceTable layout_bf16() { return {{"actions_normalized", {.rms = 0.04, .cosine = 0.9995}}}; }

// "layer12" with stem "layer" → 12; nothing for "layer012", "layer-1" or "layer".
std::optional<int> numbered(std::string_view text, std::string_view stem) {
  if (text.substr(0, stem.size()) != stem) return {};
  text.remove_prefix(stem.size());
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || text[0] == '-') return {};
  if (text.size() > 1 && text[0] == '0') return {};
  return value;
}

std::vector<std::string> split_words(const std::string& text) {
  std::vector<std::string> out;
  std::string word;
  for (char c : text + ' ') {
    if (c != ' ') {
      word += c;
    } else if (!word.empty()) {
      out.push_back(word);
      word.clear();
    }
  }
  return out;
}

// Collects every problem of one file instead of stopping at the first.
class Reader {
 public:
  Reader(SafetensorsFile file, const std::string& path) : path_(path) {
    out_.file = std::move(file);
    out_.name = std::filesystem::path(path).stem().string();
  }

  Result<CaseFile> read() {
    read_metadata();
    read_inputs();
    read_expectations();
    read_tokens();
    check_stages();
    if (!problems_.empty()) return Status::invalid(problems_);
    return std::move(out_);
  }

 private:
  void problem(const std::string& field, const std::string& cause) {
    if (!problems_.empty()) problems_ += '\n';
    problems_ += path_ + ": " + field + ": " + cause;
  }

  const std::string* meta(const std::string& key) const {
    const auto it = out_.file.metadata().find(key);
    return it == out_.file.metadata().end() ? nullptr : &it->second;
  }
  std::string text(const std::string& key, const std::string& fallback = "") const {
    return meta(key) ? *meta(key) : fallback;
  }
  int count(const std::string& key, int low, int high, std::optional<int> fallback = {}) {
    const std::string* value = meta(key);
    if (value == nullptr && fallback) return *fallback;
    const std::optional<int> parsed = value ? numbered(*value, "") : std::nullopt;
    if (parsed && *parsed >= low && *parsed <= high) return *parsed;
    problem("metadata " + key,
            (value ? "\"" + value->substr(0, 40) + "\" is" : std::string("is missing, expected")) +
                (value ? " not" : "") + " a whole number of " + std::to_string(low) + " to " +
                std::to_string(high));
    return low;
  }
  // The value's position among the allowed ones.
  std::size_t choice(const std::string& key, const std::string& value,
                     const std::vector<std::string>& allowed) {
    const auto it = std::find(allowed.begin(), allowed.end(), value);
    if (it != allowed.end()) return static_cast<std::size_t>(it - allowed.begin());
    std::string list;
    for (const std::string& a : allowed) list += (list.empty() ? "" : ", ") + a;
    problem("metadata " + key, "\"" + value.substr(0, 40) + "\" is none of " + list);
    return 0;
  }

  void read_metadata() {
    const int version = count("format_version", 1, 2, 1);
    out_.format = text("format");
    const bool lerobot = choice("format", out_.format, {"openpi", "lerobot"}) == 1;
    out_.robot = text("robot", "none");
    out_.about = text("about");
    out_.prompt = text("prompt");
    out_.steps = count("steps", 1, 1000);
    out_.slots = split_words(text("slots"));
    if (std::set(out_.slots.begin(), out_.slots.end()).size() != out_.slots.size())
      problem("metadata slots", "a camera is listed twice");

    // Version 1 tells these by other keys.
    const bool given = text("inputs") == "token ids given";
    const std::string entry = version == 2 ? text("entry") : given ? "tokens" : "frames";
    out_.entry = choice("entry", entry, {"frames", "tokens"}) == 1 ? CaseEntry::kTokens : CaseEntry::kFrames;
    const std::string mode = version == 2                                     ? text("prompt_mode")
                             : given                                          ? "none"
                             : text("discrete_state_input", "true") == "true" ? "state"
                                                                              : "plain";
    const CasePrompt modes[] = {CasePrompt::kState, CasePrompt::kPlain, CasePrompt::kNone};
    out_.prompt_mode = modes[choice("prompt_mode", mode, {"state", "plain", "none"})];
    if (out_.entry == CaseEntry::kFrames && out_.prompt_mode == CasePrompt::kNone)
      problem("metadata prompt_mode", "\"none\" goes with entry \"tokens\" only");
    out_.max_tokens = count("max_tokens", 1, 1 << 20, version == 2 ? std::optional<int>() : 200);
    if (version == 2 && text("action_width") != "none") {
      out_.action_width = count("action_width", 1, 1 << 16);
    } else if (version == 1 && (out_.robot == "libero" || out_.robot == "droid")) {
      out_.action_width = out_.robot == "libero" ? 7 : 8;
    }
    if (const std::string* contract = meta("contract")) read_contract(*contract);
    if (const std::string* tolerances = meta("tolerances")) {
      read_tolerances(*tolerances);
    } else {
      out_.tolerances = {{"fp32", layout_fp32(lerobot)}, {"bf16", layout_bf16()}};
      out_.notes.push_back("no tolerances in the file: those of its layout (" + out_.format + ") are used");
    }
  }

  void add_problems(const std::string& message) { problems_ += (problems_.empty() ? "" : "\n") + message; }

  void read_contract(const std::string& json) {
    const Result<Json> root = parse_json(json, path_ + ": metadata contract");
    if (!root.ok()) return add_problems(root.status().message());
    Result<contract::Contract> read = contract::contract_from_json(*root, path_ + ": metadata contract");
    if (!read.ok()) return add_problems(read.status().message());
    out_.contract = std::move(*read);
  }

  void read_tolerances(const std::string& json) {
    const Result<Json> root = parse_json(json, path_ + ": metadata tolerances");
    if (!root.ok()) return add_problems(root.status().message());
    if (!root->is_object()) return problem("metadata tolerances", "not an object");
    for (const auto& [precision, stages] : root->items()) {
      if (!stages.is_object()) {
        problem("metadata tolerances: " + precision, "not an object");
        continue;
      }
      ToleranceTable& table = out_.tolerances[precision];
      for (const auto& [group, gates] : stages.items()) {
        const std::string where = "metadata tolerances: " + precision + ": " + group;
        if (std::find(std::begin(kGroups), std::end(kGroups), group) == std::end(kGroups))
          problem(where, "no such stage");
        else if (!gates.is_object() || gates.empty())
          problem(where, "expected an object of max, rms, cosine");
        else
          read_gates(where, gates, table[group]);
      }
    }
  }

  void read_gates(const std::string& where, const Json& json, Gates& gates) {
    for (const auto& [kind, value] : json.items()) {
      std::optional<double>* gate = kind == "max"      ? &gates.max
                                    : kind == "rms"    ? &gates.rms
                                    : kind == "cosine" ? &gates.cosine
                                                       : nullptr;
      if (gate == nullptr) {
        problem(where, "unknown gate \"" + kind + "\", expected max, rms or cosine");
      } else if (!value.is_number() || !std::isfinite(value.get<double>()) || value.get<double>() < 0) {
        problem(where, kind + " is not a number of 0 or more");
      } else {
        *gate = value.get<double>();
      }
    }
  }

  void read_inputs() {
    std::map<std::string, CaseImage> images;
    for (const SafeTensor& tensor : out_.file.tensors()) {
      const std::string& name = tensor.name;
      if (name.rfind("input/image/", 0) == 0) {
        const std::string slot = name.substr(12);
        if (tensor.dtype != DType::kU8 || tensor.shape.rank() != 3 || tensor.shape[2] != 3 ||
            tensor.shape[0] < 1 || tensor.shape[1] < 1 || tensor.shape[0] > (1 << 15) ||
            tensor.shape[1] > (1 << 15)) {
          problem(name, "expected u8 [height, width, 3], found " + std::string(dtype_name(tensor.dtype)) +
                            " " + tensor.shape.to_string());
          continue;
        }
        images[slot] = {slot,
                        static_cast<int>(tensor.shape[0]),
                        static_cast<int>(tensor.shape[1]),
                        {reinterpret_cast<const std::uint8_t*>(tensor.bytes.data()), tensor.bytes.size()}};
      } else if (name == "input/state") {
        if (tensor.shape.rank() != 1 || !is_float(tensor.dtype) || tensor.shape[0] > (1 << 16))
          problem(name, "expected floats [width], found " + tensor.shape.to_string());
        else if (Result<std::vector<double>> values = to_doubles(tensor); values.ok())
          out_.state = std::move(*values);
      } else if (name == "input/noise") {
        read_noise(tensor);
      } else if (name.rfind("expect/", 0) != 0 && name.rfind("expect_bf16/", 0) != 0) {
        problem(name,
                "unknown tensor; a case has input/image/<slot>, input/state, input/noise, expect/… and "
                "expect_bf16/…");
      }
    }
    if (out_.noise.empty()) problem("input/noise", "is missing: the starting point of the flow");
    if (out_.entry == CaseEntry::kFrames && out_.state.empty()) problem("input/state", "is missing");
    for (const std::string& slot : out_.slots) {
      const auto it = images.find(slot);
      if (it == images.end()) {
        problem("input/image/" + slot, "is missing, metadata slots lists it");
      } else {
        out_.images.push_back(it->second);
        images.erase(it);
      }
    }
    for (const auto& [slot, image] : images)
      problem("input/image/" + slot, "is not listed in metadata slots");
  }

  void read_noise(const SafeTensor& tensor) {
    if (tensor.shape.rank() != 2 || !is_float(tensor.dtype) || tensor.shape[0] < 1 || tensor.shape[1] < 1 ||
        tensor.shape[0] > (1 << 16) || tensor.shape[1] > (1 << 16))
      return problem(tensor.name, "expected floats [horizon, action_dim], found " + tensor.shape.to_string());
    Result<std::vector<float>> values = to_floats(tensor);
    if (!values.ok()) return problem(tensor.name, values.status().message());
    if (!std::all_of(values->begin(), values->end(), [](float x) { return std::isfinite(x); }))
      return problem(tensor.name, "holds a value that is not finite");
    out_.noise = std::move(*values);
    out_.horizon = static_cast<int>(tensor.shape[0]);
    out_.action_dim = static_cast<int>(tensor.shape[1]);
  }

  void read_expectations() {
    int bf16 = 0;
    for (const SafeTensor& tensor : out_.file.tensors()) {
      const bool reference_bf16 = tensor.name.rfind("expect_bf16/", 0) == 0;
      if (!reference_bf16 && tensor.name.rfind("expect/", 0) != 0) continue;
      const std::optional<StageName> stage = parse_stage_name(tensor.name.substr(reference_bf16 ? 12 : 7));
      if (!stage)
        problem(tensor.name, "unknown stage (the file may come from a newer recorder)");
      else if (reference_bf16)
        ++bf16;
      else
        out_.expected.push_back({*stage, nullptr});
    }
    // Pointers are taken last: the file has been moved into place by now.
    for (ExpectedStage& e : out_.expected) e.tensor = out_.file.find("expect/" + e.stage.name);
    if (out_.expected.empty()) problem("expect/", "there is nothing to compare with");
    if (bf16 > 0)
      out_.notes.push_back(
          std::to_string(bf16) +
          " expect_bf16 tensors show a reference's own bfloat16 run; the gates apply to expect/");
  }

  void read_tokens() {
    const SafeTensor* ids = out_.file.find("expect/tokens");
    const SafeTensor* mask = out_.file.find("expect/token_mask");
    if (out_.entry == CaseEntry::kTokens && (ids == nullptr || mask == nullptr))
      return problem("expect/tokens", "entry \"tokens\" needs expect/tokens and expect/token_mask");
    if (ids == nullptr || mask == nullptr) {
      if ((ids == nullptr) != (mask == nullptr))
        problem("expect/tokens", "expect/tokens and expect/token_mask come together");
      return;
    }
    if (ids->dtype != DType::kI32 || ids->shape.rank() != 1)
      return problem(ids->name, "expected i32 [tokens]");
    if ((mask->dtype != DType::kBool && mask->dtype != DType::kU8) || !(mask->shape == ids->shape))
      return problem(mask->name, "expected bool " + ids->shape.to_string());
    for (std::size_t i = 0; i < mask->bytes.size(); ++i) {
      if (mask->bytes[i] == std::byte{0}) continue;
      std::int32_t id = 0;
      std::memcpy(&id, ids->bytes.data() + 4 * i, 4);
      out_.tokens.push_back(id);
    }
  }

  // Stages the metadata rules out would otherwise be compared with nothing.
  void check_stages() {
    for (const ExpectedStage& e : out_.expected) {
      const StageName& stage = e.stage;
      if (!stage.slot.empty() &&
          std::find(out_.slots.begin(), out_.slots.end(), stage.slot) == out_.slots.end())
        problem("expect/" + stage.name, "its camera is not in metadata slots");
      const bool stepped = stage.group == "time" || stage.group == "velocity" || stage.group == "x";
      if (stepped && stage.index >= out_.steps)
        problem("expect/" + stage.name, "metadata steps is " + std::to_string(out_.steps));
      if (stage.name == "actions" && !out_.action_width && out_.format == "openpi")
        problem("expect/actions", "metadata action_width says there are normalised actions only");
      if (stage.name == "actions" && out_.file.find("expect/actions_normalized") == nullptr)
        problem("expect/actions", "is judged on the scale of expect/actions_normalized, which is missing");
      if (!stage.exact && !is_float(e.tensor->dtype))
        problem("expect/" + stage.name, "is not floating-point");
    }
  }

  std::string path_, problems_;
  CaseFile out_;
};

}  // namespace

std::optional<StageName> parse_stage_name(const std::string& name) {
  StageName out{.name = name, .group = name};
  if (name == "tokens" || name == "token_mask") {
    out.exact = true;
    return out;
  }
  if (name == "state_normalized" || name == "prefix/embeddings" || name == "t" ||
      name == "actions_normalized" || name == "actions")
    return out;
  const std::size_t slash = name.find('/');
  if (slash == std::string::npos || slash + 1 == name.size()) return {};
  const std::string head = name.substr(0, slash), tail = name.substr(slash + 1);
  out.group = head;
  if (head == "image" || head == "vision") {
    out.slot = tail;
    return out;
  }
  std::optional<int> index;
  if (head == "time") {
    index = numbered(tail, "");
  } else if (head == "prefix" && tail.size() > 2 && (tail.ends_with("/k") || tail.ends_with("/v"))) {
    index = numbered(tail.substr(0, tail.size() - 2), "layer");
    out.group = tail.back();
  } else if (tail == "v" || tail == "x") {
    index = numbered(head, "step");
    out.group = tail == "v" ? "velocity" : "x";
  }
  if (!index) return {};
  out.index = *index;
  return out;
}

int pipeline_rank(const std::string& group) {
  static const std::map<std::string, int> kRank = {{"state_normalized", 0},
                                                   {"tokens", 1},
                                                   {"token_mask", 2},
                                                   {"image", 3},
                                                   {"vision", 4},
                                                   {"prefix/embeddings", 5},
                                                   {"k", 6},
                                                   {"v", 6},
                                                   {"t", 7},
                                                   {"time", 8},
                                                   {"velocity", 9},
                                                   {"x", 9},
                                                   {"actions_normalized", 10},
                                                   {"actions", 11}};
  return kRank.at(group);
}

Result<CaseFile> case_from_file(SafetensorsFile file, const std::string& path) {
  return Reader(std::move(file), path).read();
}

Result<CaseFile> read_case(const std::string& path) {
  SF_ASSIGN_OR_RETURN(SafetensorsFile file, SafetensorsFile::open(path));
  return case_from_file(std::move(file), path);
}

Result<std::vector<CaseFile>> read_cases(const std::string& directory) {
  namespace fs = std::filesystem;
  std::error_code error;
  std::vector<std::string> paths;
  for (fs::directory_iterator it(directory, error), end; !error && it != end; it.increment(error))
    if (it->path().extension() == ".safetensors") paths.push_back(it->path().string());
  if (error)
    return Status::invalid(directory + ": cannot list recorded cases: " + error.message() +
                           " (name their folder with --cases DIR)");
  if (paths.empty()) return Status::invalid(directory + ": no recorded case (*.safetensors) in it");
  std::sort(paths.begin(), paths.end());

  std::vector<CaseFile> cases;
  std::string problems;
  for (const std::string& path : paths) {
    Result<CaseFile> one = read_case(path);
    if (one.ok())
      cases.push_back(std::move(*one));
    else
      problems += (problems.empty() ? "" : "\n") + one.status().message();
  }
  if (!problems.empty()) return Status::invalid(problems);
  return cases;
}

}  // namespace servoflow::toolkit
