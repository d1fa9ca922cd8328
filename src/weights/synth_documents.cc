#include "weights/synth_documents.h"

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "core/json.h"

namespace servoflow::weights {
namespace {

constexpr char kPrefixVariant[] = "gemma_2b", kExpertVariant[] = "gemma_300m";
constexpr char kPublishedTokenizer[] = "google/paligemma-3b-pt-224";

std::string precision_name(const SynthOptions& options) {
  return options.dtype == DType::kBF16 ? "bfloat16" : "float32";
}

// The `architecture` block, without what the layout tells elsewhere; null where the variants' names say it
// all.
Json architecture_block(const SynthOptions& options) {
  const auto block_of = [&](Architecture a) {
    a.tokenizer.clear();
    Json block = architecture_to_json(a);
    for (const char* key : {"action_dim", "horizon", "time_grid"}) block.erase(key);
    if (options.layout == Layout::kLerobot)
      for (const char* key : {"max_tokens", "default_steps", "min_period", "max_period"}) block.erase(key);
    return block;
  };
  Json block = block_of(options.architecture);
  if (block == block_of(pi05_architecture())) return nullptr;
  if (!options.tokenizer.empty()) block["tokenizer"] = "tokenizer.model";
  return block;
}

void add_architecture(const SynthOptions& options, OrderedJson& config) {
  if (const Json block = architecture_block(options); !block.is_null())
    config["architecture"] = OrderedJson::parse(block.dump());
}

OrderedJson statistics(int width) {
  const auto all = [&](double value) { return std::vector<double>(static_cast<std::size_t>(width), value); };
  return {{"mean", all(0)}, {"std", all(1)}, {"q01", all(-1)}, {"q99", all(1)}};
}

OrderedJson feature(const char* type, std::vector<int> shape) {
  return {{"type", type}, {"shape", std::move(shape)}};
}

OrderedJson input_features(const SynthOptions& options) {
  const int side = options.architecture.vision.image;
  OrderedJson out;
  for (const char* camera : {"base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"})
    out[std::string("observation.images.") + camera] = feature("VISUAL", {3, side, side});
  out["observation.state"] = feature("STATE", {options.state_width});
  return out;
}

OrderedJson norm_map() { return {{"VISUAL", "IDENTITY"}, {"STATE", "QUANTILES"}, {"ACTION", "QUANTILES"}}; }

OrderedJson step(const char* name, OrderedJson config = OrderedJson::object()) {
  return {{"registry_name", name}, {"config", std::move(config)}};
}

OrderedJson device_step() { return step("device_processor", {{"device", "cpu"}, {"float_dtype", nullptr}}); }

OrderedJson strings(std::initializer_list<const char*> values) {
  OrderedJson out = OrderedJson::array();
  for (const char* value : values) out.push_back(value);
  return out;
}

}  // namespace

OrderedJson openpi_config(const SynthOptions& options) {
  OrderedJson out = {{"action_dim", options.architecture.action_dim},
                     {"action_horizon", options.architecture.horizon},
                     {"paligemma_variant", kPrefixVariant},
                     {"action_expert_variant", kExpertVariant},
                     {"precision", precision_name(options)}};
  add_architecture(options, out);
  return out;
}

OrderedJson openpi_norm_stats(const SynthOptions& options) {
  OrderedJson stats;
  stats["state"] = statistics(options.state_width);
  stats["actions"] = statistics(options.action_width);
  OrderedJson out;
  out["norm_stats"] = std::move(stats);
  return out;
}

OrderedJson lerobot_config(const SynthOptions& options) {
  const Architecture& a = options.architecture;
  OrderedJson out;
  out["type"] = "pi05";
  out["n_obs_steps"] = 1;
  out["input_features"] = input_features(options);
  out["output_features"]["action"] = feature("ACTION", {options.action_width});
  out["device"] = "cpu";
  out["use_amp"] = false;
  out["push_to_hub"] = false;
  out["repo_id"] = nullptr;
  out["private"] = nullptr;
  out["tags"] = nullptr;
  out["license"] = nullptr;
  out["paligemma_variant"] = kPrefixVariant;
  out["action_expert_variant"] = kExpertVariant;
  out["dtype"] = precision_name(options);
  out["chunk_size"] = a.horizon;
  out["n_action_steps"] = a.horizon;
  out["max_state_dim"] = std::max(32, options.state_width);
  out["max_action_dim"] = a.action_dim;
  out["num_inference_steps"] = a.default_steps;
  out["time_sampling_beta_alpha"] = 1.5;
  out["time_sampling_beta_beta"] = 1.0;
  out["time_sampling_scale"] = 0.999;
  out["time_sampling_offset"] = 0.001;
  out["min_period"] = a.min_period;
  out["max_period"] = a.max_period;
  out["image_resolution"] = {a.vision.image, a.vision.image};
  out["empty_cameras"] = 0;
  out["tokenizer_max_length"] = a.max_tokens;
  out["normalization_mapping"] = norm_map();
  out["gradient_checkpointing"] = false;
  out["compile_model"] = false;
  out["compile_mode"] = "max-autotune";
  out["optimizer_lr"] = 2.5e-05;
  out["optimizer_betas"] = {0.9, 0.95};
  out["optimizer_eps"] = 1e-08;
  out["optimizer_weight_decay"] = 0.01;
  out["optimizer_grad_clip_norm"] = 1.0;
  out["scheduler_warmup_steps"] = 1000;
  out["scheduler_decay_steps"] = 30000;
  out["scheduler_decay_lr"] = 2.5e-06;
  add_architecture(options, out);
  return out;
}

OrderedJson lerobot_preprocessor(const SynthOptions& options, const std::string& state_file) {
  OrderedJson features = input_features(options);
  features["action"] = feature("ACTION", {options.action_width});
  OrderedJson normalizer = step("normalizer_processor");
  normalizer["config"] = {{"eps", 1e-08}, {"features", std::move(features)}, {"norm_map", norm_map()}};
  normalizer["state_file"] = state_file;
  OrderedJson steps = OrderedJson::array();
  steps.push_back(step("rename_observations_processor", {{"rename_map", OrderedJson::object()}}));
  steps.push_back(step("to_batch_processor"));
  steps.push_back(
      step("relative_actions_processor",
           {{"enabled", false}, {"exclude_joints", strings({"gripper"})}, {"action_names", nullptr}}));
  steps.push_back(std::move(normalizer));
  steps.push_back(step("pi05_prepare_state_tokenizer_processor_step"));
  steps.push_back(step("tokenizer_processor", {{"max_length", options.architecture.max_tokens},
                                               {"task_key", "task"},
                                               {"padding_side", "right"},
                                               {"padding", "max_length"},
                                               {"truncation", true},
                                               {"tokenizer_name", kPublishedTokenizer}}));
  steps.push_back(device_step());
  return {{"name", "policy_preprocessor"}, {"steps", std::move(steps)}};
}

OrderedJson lerobot_postprocessor(const SynthOptions& options, const std::string& state_file) {
  OrderedJson features;
  features["action"] = feature("ACTION", {options.action_width});
  OrderedJson unnormalizer = step("unnormalizer_processor");
  unnormalizer["config"] = {{"eps", 1e-08}, {"features", std::move(features)}, {"norm_map", norm_map()}};
  unnormalizer["state_file"] = state_file;
  OrderedJson steps = OrderedJson::array();
  steps.push_back(std::move(unnormalizer));
  steps.push_back(step("absolute_actions_processor", {{"enabled", false}}));
  steps.push_back(device_step());
  return {{"name", "policy_postprocessor"}, {"steps", std::move(steps)}};
}

}  // namespace servoflow::weights
