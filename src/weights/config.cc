#include "weights/config.h"

#include "weights/fields.h"

namespace servoflow::weights {
namespace {

class Reader {
 public:
  Reader(const Json& config, Layout layout, const std::string& file)
      : file_(file), layout_(layout), top_(config, file, "", reading_.problems) {}

  ConfigReading read() {
    Architecture& a = reading_.architecture;
    if (layout_ == Layout::kLerobot) a.time_grid = TimeGrid::kRounded;
    const bool with_block = top_.has("architecture");
    if (with_block) {
      reading_.sizes_from = "architecture block";
      block_ = top_.object("architecture");
      if (block_ != nullptr)
        for (std::string& p : read_architecture(*block_, file_, "architecture.", a))
          reading_.problems.push_back(std::move(p));
    }
    read_variants(!with_block);
    if (layout_ == Layout::kLerobot) {
      read_lerobot();
    } else {
      read_openpi();
    }
    if (reading_.problems.empty())
      for (const std::string& problem : check_architecture(a))
        reading_.problems.push_back(file_ + ": " + (with_block ? "architecture." : "") + problem);
    reading_.unused = top_.unread();
    return std::move(reading_);
  }

 private:
  // With an `architecture` block the names say nothing: tiny networks carry the names of the sizes they stand
  // in for.
  void read_variants(bool decide) {
    Architecture& a = reading_.architecture;
    std::string prefix, expert;
    const bool prefix_told = top_.text("paligemma_variant", prefix, decide);
    const bool expert_told = top_.text("action_expert_variant", expert, decide);
    if (!decide || !prefix_told || !expert_told) return;
    reading_.sizes_from = prefix + ", " + expert + ", So400m/14";
    const auto resolve = [&](const char* key, const std::string& name, GemmaSizes& out) {
      Result<GemmaSizes> sizes = named_gemma(name);
      if (sizes.ok()) {
        out = *sizes;
      } else {
        top_.problem(key, sizes.status().message());
      }
    };
    resolve("paligemma_variant", prefix, a.prefix);
    resolve("action_expert_variant", expert, a.expert);
    a.vision = so400m();
    a.vocab = pi05_architecture().vocab;
  }

  // A number that config.json tells under `key` and the block may tell again under `block_key`.
  void integer(const char* key, const char* block_key, int& out, int high, bool required) {
    const bool in_block = block_ != nullptr && block_->contains(block_key);
    int value = 0;
    if (!top_.integer(key, value, 1, high, required && !in_block)) return;
    if (in_block && value != out) {
      top_.problem(
          key, std::to_string(value) + " contradicts architecture." + block_key + " " + std::to_string(out));
    } else {
      out = value;
    }
  }

  void read_openpi() {
    Architecture& a = reading_.architecture;
    std::string precision;
    top_.text("precision", precision, false);
    integer("action_dim", "action_dim", a.action_dim, kMaxActionDim, true);
    integer("action_horizon", "horizon", a.horizon, kMaxHorizon, true);
    // openpi's converter does not write these two; a hand-written file may.
    integer("max_token_len", "max_tokens", a.max_tokens, kMaxTokens, false);
    if (bool pi05 = true; top_.flag("pi05", pi05, false) && !pi05)
      top_.problem("pi05", "is false: servoflow runs pi0.5 policies only");
  }

  void read_lerobot() {
    Architecture& a = reading_.architecture;
    std::string text;
    top_.text("type", text, false);
    top_.text("dtype", text, false);
    bool flag = false;
    top_.flag("use_visual_memory", flag, false);
    top_.flag("use_proprioceptive_memory", flag, false);
    integer("max_action_dim", "action_dim", a.action_dim, kMaxActionDim, true);
    integer("chunk_size", "horizon", a.horizon, kMaxHorizon, true);
    integer("num_inference_steps", "default_steps", a.default_steps, kMaxSteps, false);
    integer("tokenizer_max_length", "max_tokens", a.max_tokens, kMaxTokens, false);
    top_.number("min_period", a.min_period, 1e-9, 1e9, false);
    top_.number("max_period", a.max_period, 1e-9, 1e9, false);
    read_resolution();
  }

  void read_resolution() {
    const char* key = "image_resolution";
    const int side = reading_.architecture.vision.image;
    if (!top_.has(key)) return;
    const Json& value = top_.any(key);
    if (!value.is_array() || value.size() != 2 || !value[0].is_number_integer() ||
        !value[1].is_number_integer()) {
      top_.problem(key, "expected two integers, found " + shown(value));
    } else if (side != 0 && (value[0] != side || value[1] != side)) {
      std::string found = shown(value[0]);
      found += " x " + shown(value[1]);
      top_.problem(key, found + " contradicts the vision tower's " + std::to_string(side) + " x " +
                            std::to_string(side));
    }
  }

  ConfigReading reading_;
  std::string file_;
  Layout layout_;
  Fields top_;
  const Json* block_ = nullptr;
};

}  // namespace

std::string layout_name(Layout layout) {
  switch (layout) {
    case Layout::kOpenpi:
      return "openpi";
    case Layout::kLerobot:
      return "lerobot";
    case Layout::kServoflow:
      return "servoflow";
  }
  return "";
}

ConfigReading read_config(const Json& config, Layout layout, const std::string& file) {
  if (config.is_object()) return Reader(config, layout, file).read();
  ConfigReading reading;
  reading.problems.push_back(file + ": expected an object, found " + shown(config));
  return reading;
}

std::string refused_by_config(const Json& config, const std::string& file) {
  if (!config.is_object()) return "";
  const auto is_true = [&](const char* key) {
    const auto it = config.find(key);
    return it != config.end() && it->is_boolean() && it->get<bool>();
  };
  if (const auto type = config.find("type"); type != config.end()) {
    if (!type->is_string()) return file + ": type: expected a string, found " + shown(*type);
    const std::string& name = type->get_ref<const std::string&>();
    if (name == "pi0")
      return file + ": type: this is a pi0 policy; servoflow runs pi0.5 (type \"pi05\") only";
    if (name == "pi0_fast" || name == "pi0fast")
      return file + ": type: this is a pi0-FAST policy; servoflow runs pi0.5 (type \"pi05\") only";
    if (name != "pi05")
      return file + ": type: \"" + printable(name) + "\" is not a policy servoflow runs; expected \"pi05\"";
  }
  for (const char* key : {"use_visual_memory", "use_proprioceptive_memory"})
    if (is_true(key))
      return file + ": " + key +
             ": is true: this is the memory variant of pi0.5, which servoflow does not run";
  return "";
}

}  // namespace servoflow::weights
