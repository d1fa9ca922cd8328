#include "weights/checkpoint.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <set>
#include <system_error>
#include <unordered_map>

#include "core/status_macros.h"
#include "quant/checkpoint.h"
#include "weights/fields.h"
#include "weights/file_source.h"
#include "weights/manifest.h"
#include "weights/tensor_files.h"

namespace servoflow::weights {
namespace {

namespace fs = std::filesystem;

constexpr char kConfigFile[] = "config.json";
constexpr char kModelOptFile[] = "hf_quant_config.json";
constexpr std::size_t kMaxConfigBytes = std::size_t{4} << 20;
constexpr std::string_view kLerobotPrefix = "model.";

bool is_file(const std::string& path) {
  std::error_code ignored;
  return fs::is_regular_file(path, ignored);
}
bool is_dir(const std::string& path) {
  std::error_code ignored;
  return fs::is_directory(path, ignored);
}
bool has_weights(const std::string& dir) {
  return is_file(dir + "/" + kModelFile) || is_file(dir + "/" + kShardIndex);
}

// Orbax checkpoints keep one array store under params/ (or are given that folder itself).
bool is_jax(const std::string& dir) {
  std::error_code ignored;
  for (const std::string& base : {dir, dir + "/params"})
    for (const char* mark : {"/manifest.ocdbt", "/ocdbt.process_0", "/_METADATA"})
      if (fs::exists(base + mark, ignored)) return true;
  return is_dir(dir + "/params");
}

// Why a directory without weight files has none, as far as one can tell.
std::string no_weights(const std::string& dir) {
  std::error_code ignored;
  if (!fs::exists(dir, ignored)) return "no such directory";
  if (!is_dir(dir)) return "is a file; pass the checkpoint directory that holds it";
  if (is_jax(dir))
    return "is a JAX checkpoint (Orbax/OCDBT params); convert it first with openpi's "
           "examples/convert_jax_model_to_pytorch.py, which writes model.safetensors";
  if (is_file(dir + "/adapter_model.safetensors") || is_file(dir + "/adapter_config.json"))
    return "is a LoRA/PEFT adapter without base weights; merge it into its base model and save that";
  for (const char* sub : {"pretrained_model", "checkpoints/last/pretrained_model"})
    if (has_weights(dir + "/" + sub))
      return std::string("holds no model.safetensors; did you mean ") + dir + "/" + sub + "?";
  return std::string("holds neither ") + kModelFile + " nor " + kShardIndex +
         "; expected an openpi (torch) or lerobot pi0.5 checkpoint";
}

std::string tensor_text(const std::string& name) { return "tensor \"" + printable(name) + "\""; }

// What --precision calls a dtype that is_float.
std::string_view float_precision(DType dtype) {
  return dtype == DType::kBF16  ? "bf16"
         : dtype == DType::kF16 ? "fp16"
         : dtype == DType::kF64 ? "fp64"
                                : "fp32";
}

// Looks at one directory and writes down what it sees. Each step leaves what it found in `seen`.
class Examination {
 public:
  explicit Examination(const std::string& dir) : dir_(dir) { seen.path = dir; }

  void run() {
    if (!is_dir(dir_) || !has_weights(dir_)) {
      seen.problems.push_back(no_weights(dir_));
      return;
    }
    read_config_file();
    read_quantization();
    files_ = TensorFiles::open(dir_, seen.problems);
    seen.files = files_->names();
    seen.stored_tensors = files_->tensors().size();
    seen.stored_bytes = files_->bytes();
    name_tensors();
    decide_layout();
    if (std::string why = refusal(); !why.empty()) {
      seen.problems.push_back(std::move(why));
      return;
    }
    if (config_ok_) read_sizes();
    if (seen.architecture && !files_->tensors().empty()) compare();
  }

  Inspection seen;
  std::unordered_map<std::string, StoredTensor> used;   // canonical name -> stored
  std::unordered_map<std::string, StoredLayer> layers;  // of a quantized checkpoint, by the weight's name
  const std::shared_ptr<const TensorFiles>& files() const { return files_; }

 private:
  void read_config_file() {
    const std::string path = dir_ + "/" + kConfigFile;
    if (!is_file(path)) {
      seen.problems.push_back(
          "config.json: missing; an openpi checkpoint needs {\"action_dim\": 32, \"action_horizon\": H, "
          "\"paligemma_variant\": \"gemma_2b\", \"action_expert_variant\": \"gemma_300m\"}");
      return;
    }
    Result<Json> config = read_json_file(path, kMaxConfigBytes);
    if (!config.ok()) {
      const std::string& message = config.status().message();
      seen.problems.push_back(message.starts_with(path) ? kConfigFile + message.substr(path.size())
                                                        : message);
      return;
    }
    seen.config = std::move(*config);
    config_ok_ = true;
  }

  // compressed-tensors and ModelOpt name their schemes in config.json, ModelOpt also in a file of its own.
  void read_quantization() {
    if (!config_ok_ || !seen.config.is_object()) return;
    Result<std::optional<quant::QuantConfig>> found = quant::find_quant_config(seen.config, kConfigFile);
    if (found.ok() && !*found && is_file(dir_ + "/" + kModelOptFile)) {
      Result<Json> document = read_json_file(dir_ + "/" + kModelOptFile, kMaxConfigBytes);
      if (document.ok()) {
        Result<quant::QuantConfig> parsed = quant::parse_modelopt(*document, kModelOptFile);
        found = parsed.ok() ? Result<std::optional<quant::QuantConfig>>(std::optional(std::move(*parsed)))
                            : Result<std::optional<quant::QuantConfig>>(parsed.status());
      } else {
        found = document.status();
      }
    }
    if (found.ok()) {
      quantization_ = std::move(*found);
      if (quantization_) seen.quantization = quant::convention_name(quantization_->convention);
    } else {
      seen.problems.push_back(found.status().message());
    }
  }

  // The tensors of a quantized layer; false where the layer is in floating point.
  bool locate_layer(const TensorSpec& spec, std::set<const SafeTensor*>& taken,
                    std::vector<std::string>& problems) {
    constexpr std::string_view kWeight = ".weight";
    if (!quantization_ || !is_linear_weight(spec)) return false;
    const std::string linear = spec.name.substr(0, spec.name.size() - kWeight.size());
    const quant::ConfigGroup* group = quantization_->group_of(linear);
    if (group == nullptr) return false;
    const quant::LayerTensors expected = quant::layer_tensors(linear, *group, quantization_->convention);
    StoredLayer layer{*group, quantization_->convention, spec.shape[0], spec.shape[1], {}};
    bool whole = true;
    for (const bool required : {true, false})
      for (const std::string& name : required ? expected.required : expected.optional) {
        const StoredTensor stored = locate(name);
        if (stored) {
          taken.insert(stored.tensor);
          layer.tensors.emplace(name, stored);
        } else if (required) {
          problems.push_back(tensor_text(name) + ": missing; the layer is " + group->layout + " (" +
                             quant::name(group->format) + ") by the checkpoint's quantization config");
          whole = false;
        }
      }
    std::uint64_t bytes = 0;
    for (const auto& [name, stored] : layer.tensors) bytes += stored.tensor->bytes.size();
    count_layer(spec, quant::name(group->format), bytes, group);
    if (!whole) return true;
    for (const auto& [name, stored] : layer.tensors)
      count(spec, stored, name == layer.tensors.begin()->first);
    layers.emplace(spec.name, std::move(layer));
    return true;
  }

  // Canonical names: openpi's. lerobot prefixes them with "model.", newer or hand-made files may not.
  void name_tensors() {
    for (const StoredTensor& stored : files_->tensors()) {
      const std::string& name = stored.tensor->name;
      const bool prefixed = name.starts_with(kLerobotPrefix);
      prefixed_ |= prefixed;
      const std::string canonical = prefixed ? name.substr(kLerobotPrefix.size()) : name;
      if (!stored_.emplace(canonical, stored).second)
        seen.problems.push_back(tensor_text(canonical) +
                                ": stored both with and without the prefix \"model.\"");
    }
  }

  void decide_layout() {
    const auto type = seen.config.is_object() ? seen.config.find("type") : seen.config.end();
    const bool pi05_type = type != seen.config.end() && type->is_string();
    if (is_file(dir_ + "/contract.json")) {
      seen.layout = Layout::kServoflow;
    } else if (prefixed_ || pi05_type) {
      seen.layout = Layout::kLerobot;
    } else if (!files_->tensors().empty()) {
      seen.layout = Layout::kOpenpi;
    }
  }

  bool has(const std::string& canonical) const { return stored_.contains(canonical); }

  // What these tensors are, if they are not a pi0.5.
  std::string refusal() const {
    if (config_ok_)
      if (std::string why = refused_by_config(seen.config, kConfigFile); !why.empty()) return why;
    if (has("proprio_history_proj.weight") || has("proprio_history_proj.bias"))
      return "tensor \"proprio_history_proj\": this is the memory variant of pi0.5, which servoflow does not "
             "run";
    if (stored_.empty()) return "";
    const std::string expert = kExpertPrefix;
    const bool adaptive =
        has(expert + "norm.dense.weight") || has(expert + "layers.0.input_layernorm.dense.weight");
    const bool plain = has(expert + "norm.weight") || has(expert + "layers.0.input_layernorm.weight");
    const bool pi0_time = has("action_time_mlp_in.weight") && !has("time_mlp_in.weight");
    if (!adaptive && (plain || pi0_time)) {
      std::string signs = plain ? "the expert's norms have plain weights instead of AdaRMS" : "";
      if (pi0_time) signs += std::string(plain ? ", " : "") + "action_time_mlp_in instead of time_mlp_in";
      if (has("state_proj.weight")) signs += ", a state_proj";
      return "this is a pi0 checkpoint (" + signs + "); servoflow runs pi0.5 only";
    }
    if (!adaptive && !has("action_in_proj.weight") && has(std::string(kLanguagePrefix) + "norm.weight"))
      return "there is a language model but no action expert: this looks like pi0-FAST or a bare PaliGemma; "
             "servoflow "
             "runs pi0.5 only";
    return "";
  }

  void read_sizes() {
    ConfigReading reading = read_config(seen.config, seen.layout.value_or(Layout::kOpenpi), kConfigFile);
    seen.sizes_from = std::move(reading.sizes_from);
    seen.unused_config = std::move(reading.unused);
    if (quantization_)
      std::erase_if(seen.unused_config, [](const std::string& key) {
        return key == "quantization_config" || key == "compression_config";
      });
    if (reading.problems.empty()) seen.architecture = reading.architecture;
    for (std::string& problem : reading.problems) seen.problems.push_back(std::move(problem));
  }

  // Where a tensor of the manifest is stored.
  StoredTensor locate(const std::string& canonical) {
    const auto direct = [&](const std::string& name) -> StoredTensor {
      if (const auto it = stored_.find(name); it != stored_.end()) return it->second;
      if (const StoredTensor alias = files_->find(name)) return alias;
      return files_->find(std::string(kLerobotPrefix) + name);
    };
    if (canonical == kTokenTable) {
      // openpi ties the two, and lm_head is what is loaded last; lerobot computes with embed_tokens where
      // both exist.
      const bool embed_first = seen.layout == Layout::kLerobot;
      if (const StoredTensor first = direct(embed_first ? kEmbedTokens : kTokenTable)) return first;
      return direct(embed_first ? kTokenTable : kEmbedTokens);
    }
    if (const StoredTensor found = direct(canonical)) return found;
    // lerobot's loader takes pi0's name for the time MLP of a pi0.5.
    if (seen.layout == Layout::kLerobot && canonical.starts_with("time_mlp_"))
      return direct("action_" + canonical);
    return {};
  }

  // Why a stored tensor that the manifest does not use may be there; empty if it may not.
  std::string excuse(const std::string& canonical) const {
    if (canonical == kExpertHead) return "the expert's output head; pi0.5 does not use it";
    if (canonical == kTokenTable || canonical == kEmbedTokens)
      return "second copy of the token table; " + printable(seen.token_table) + " is used";
    if (seen.layout == Layout::kLerobot &&
        (canonical == "state_proj.weight" || canonical == "state_proj.bias"))
      return "pi0's state projection; pi0.5 reads the state from the prompt";
    return "";
  }

  void compare() {
    std::vector<std::string> problems;
    std::set<const SafeTensor*> taken;
    for (const TensorSpec& spec : manifest(*seen.architecture)) {
      if (locate_layer(spec, taken, problems)) continue;
      const StoredTensor stored = locate(spec.name);
      if (!stored) {
        problems.push_back(
            tensor_text(spec.name) + ": missing, expected " + spec.shape.to_string() +
            (spec.name == kTokenTable ? std::string(" under this name or as ") + kEmbedTokens : ""));
        continue;
      }
      taken.insert(stored.tensor);
      if (spec.name == kTokenTable) seen.token_table = stored.tensor->name;
      bool sound = true;
      if (!(stored.tensor->shape == spec.shape)) {
        problems.push_back(tensor_text(stored.tensor->name) + ": shape " + stored.tensor->shape.to_string() +
                           ", expected " + spec.shape.to_string() + " from the sizes in config.json");
        sound = false;
      }
      if (!is_float(stored.tensor->dtype)) {
        problems.push_back(tensor_text(stored.tensor->name) + ": dtype " +
                           std::string(dtype_name(stored.tensor->dtype)) +
                           ", expected BF16, F32, F16 or F64");
        sound = false;
      }
      if (sound) {
        used.emplace(spec.name, stored);
        count(spec, stored);
        if (is_linear_weight(spec))
          count_layer(spec, std::string(float_precision(stored.tensor->dtype)), stored.tensor->bytes.size());
      }
    }
    for (const StoredTensor& stored : files_->tensors()) {
      if (taken.contains(stored.tensor)) continue;
      const std::string& name = stored.tensor->name;
      const std::string canonical =
          name.starts_with(kLerobotPrefix) ? name.substr(kLerobotPrefix.size()) : name;
      if (std::string reason = excuse(canonical); !reason.empty()) {
        seen.ignored.push_back({name, std::move(reason)});
      } else {
        problems.push_back(tensor_text(name) + ": not part of a pi0.5 network of these sizes, shape " +
                           stored.tensor->shape.to_string());
      }
    }
    for (std::string& line : collapse_layers(problems)) seen.problems.push_back(std::move(line));
  }

  // `whole`: with the parameters of the layer, which count once however many tensors hold it.
  void count(const TensorSpec& spec, const StoredTensor& stored, bool whole = true) {
    const std::uint64_t elements = whole ? static_cast<std::uint64_t>(spec.shape.elements()) : 0;
    const auto add = [&](std::vector<TensorCount>& list, std::string_view what) {
      auto it = std::find_if(list.begin(), list.end(), [&](const TensorCount& c) { return c.what == what; });
      if (it == list.end()) it = list.insert(list.end(), TensorCount{std::string(what)});
      ++it->tensors;
      it->parameters += elements;
      it->bytes += stored.tensor->bytes.size();
    };
    add(seen.dtypes, dtype_name(stored.tensor->dtype));
    add(seen.components, component_of(spec.name));
    seen.parameters += elements;
  }

  // A layer that is part of `group`, or of none.
  void count_layer(const TensorSpec& spec, const std::string& precision, std::uint64_t bytes,
                   const quant::ConfigGroup* group = nullptr) {
    StoredPrecision layer{.component = std::string(component_of(spec.name)), .precision = precision};
    if (group != nullptr) {
      layer.group = group->name;
      layer.layout = group->layout;
    }
    auto it = std::find_if(seen.precisions.begin(), seen.precisions.end(), [&](const StoredPrecision& p) {
      return p.component == layer.component && p.precision == layer.precision && p.group == layer.group;
    });
    if (it == seen.precisions.end()) it = seen.precisions.insert(it, std::move(layer));
    ++it->layers;
    it->parameters += static_cast<std::uint64_t>(spec.shape.elements());
    it->bytes += bytes;
  }

  std::string dir_;
  bool config_ok_ = false;
  bool prefixed_ = false;
  std::shared_ptr<const TensorFiles> files_;
  std::map<std::string, StoredTensor> stored_;  // by canonical name
  std::optional<quant::QuantConfig> quantization_;
};

}  // namespace

Result<Checkpoint> open_checkpoint(const std::string& dir) {
  Examination examination(dir);
  examination.run();
  Inspection& seen = examination.seen;
  if (!seen.problems.empty()) return Status::invalid(problem_text(dir, seen.problems));
  Checkpoint out;
  out.path = dir;
  out.layout = *seen.layout;
  out.architecture = *seen.architecture;
  out.config = std::move(seen.config);
  out.source = std::make_shared<FileSource>(examination.files(), std::move(examination.used),
                                            std::move(examination.layers));
  for (const IgnoredTensor& tensor : seen.ignored) out.ignored.push_back(tensor.name);
  out.parameters = seen.parameters;
  out.precisions = std::move(seen.precisions);
  return out;
}

Inspection inspect_checkpoint(const std::string& dir) {
  Examination examination(dir);
  examination.run();
  Inspection& seen = examination.seen;
  const std::string named = seen.architecture ? seen.architecture->tokenizer : "";
  if (Result<std::string> tokenizer = find_tokenizer(dir, named, ""); tokenizer.ok())
    seen.tokenizer = *tokenizer;
  return std::move(seen);
}

Result<std::string> find_tokenizer(const Checkpoint& checkpoint, const std::string& option) {
  return find_tokenizer(checkpoint.path, checkpoint.architecture.tokenizer, option);
}

}  // namespace servoflow::weights
