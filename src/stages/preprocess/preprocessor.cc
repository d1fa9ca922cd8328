#include "stages/preprocess/preprocessor.h"

#include <algorithm>
#include <cmath>
#include <string_view>

#include "contract/normalization.h"
#include "contract/problems.h"
#include "contract/transforms.h"
#include "contract/validate.h"
#include "core/status_macros.h"

namespace servoflow::stages {
namespace {

constexpr std::size_t kMaxPromptBytes = std::size_t{1} << 20;
constexpr int kUnknown = -1, kIgnored = -2;

std::string quoted(std::string_view text) {
  // Names come from a request: they are shown in messages, not trusted to be short or printable.
  std::string out = "\"";
  for (const char c : text.substr(0, 100)) out += static_cast<unsigned char>(c) < 0x20 ? '?' : c;
  return out + (text.size() > 100 ? "…\"" : "\"");
}

// The field's name in messages: the request key of the state part that holds number `index`.
std::string state_field(const contract::Contract& contract, int index) {
  for (const contract::StatePart& part : contract.state_parts) {
    if (index < part.width) return part.key + "[" + std::to_string(index) + "]";
    index -= part.width;
  }
  return "state";
}

std::string state_fields(const contract::Contract& contract) {
  if (contract.state_parts.empty()) return "state";
  std::vector<std::string> keys;
  for (const contract::StatePart& part : contract.state_parts) keys.push_back(part.key);
  return contract::join(keys);
}

}  // namespace

Preprocessor::Preprocessor(const contract::Contract& contract, const PreprocessOptions& options)
    : contract_(contract),
      options_(options),
      letterbox_(contract.resize),
      state_width_(contract::state_width(contract)) {}

Result<std::unique_ptr<Preprocessor>> Preprocessor::create(const contract::Contract& contract,
                                                           const PreprocessOptions& options) {
  SF_RETURN_IF_ERROR(contract::validated(contract, "robot " + contract.name));
  if (options.image_size < 1 || options.image_size > 4096) {
    return Status::invalid("image_size: " + std::to_string(options.image_size) + " is not a picture side");
  }
  if (options.vocab < 1 || options.max_tokens < 1)
    return Status::invalid("vocab and max_tokens must be positive");
  if (contract.prompt.max_tokens > options.max_tokens) {
    return Status::invalid("robot " + contract.name + ": prompt.max_tokens: asks for " +
                           std::to_string(contract.prompt.max_tokens) + " tokens, the model takes at most " +
                           std::to_string(options.max_tokens) + "; lower it in the robot file");
  }
  std::unique_ptr<Preprocessor> made(new Preprocessor(contract, options));
  made->tokenizer_ = options.tokenizer;
  if (made->tokenizer_ == nullptr && !options.tokenizer_path.empty()) {
    SF_ASSIGN_OR_RETURN(made->tokenizer_, Tokenizer::open(options.tokenizer_path, options.vocab));
  }
  made->view_of_camera_.resize(contract.cameras.size());
  made->bins_.resize(static_cast<std::size_t>(made->state_width_));
  return made;
}

Status Preprocessor::run(const Observation& observation, ModelInput& out) {
  SF_RETURN_IF_ERROR(read_images(observation, out));
  SF_RETURN_IF_ERROR(read_state(observation, out));
  return read_prompt(observation, out);
}

int Preprocessor::find_camera(std::string_view name) const {
  for (std::size_t i = 0; i < contract_.cameras.size(); ++i) {
    const contract::CameraSlot& camera = contract_.cameras[i];
    if (!camera.key.empty() && (name == camera.key || name == camera.slot)) return static_cast<int>(i);
  }
  for (const std::string& ignored : contract_.ignored_images) {
    if (name == ignored) return kIgnored;
  }
  return kUnknown;
}

std::string Preprocessor::known_images() const {
  std::vector<std::string> names;
  for (const contract::CameraSlot& camera : contract_.cameras) {
    if (camera.key.empty()) continue;
    names.push_back(camera.key == camera.slot ? camera.key : camera.key + " (slot " + camera.slot + ")");
  }
  return contract::join(names);
}

Status Preprocessor::read_images(const Observation& observation, ModelInput& out) {
  std::fill(view_of_camera_.begin(), view_of_camera_.end(), -1);
  for (std::size_t i = 0; i < observation.images.size(); ++i) {
    const ImageView& view = observation.images[i];
    const int index = find_camera(view.name);
    if (index == kIgnored) continue;
    if (index == kUnknown) {
      return Status::invalid("image " + quoted(view.name) + ": robot " + contract_.name +
                             " has no such camera; it has: " + known_images());
    }
    if (view_of_camera_[index] >= 0) {
      const ImageView& other = observation.images[view_of_camera_[index]];
      return Status::invalid("image " + quoted(view.name) + ": slot " + contract_.cameras[index].slot +
                             " is given twice (also as " + quoted(other.name) + ")");
    }
    view_of_camera_[index] = static_cast<int>(i);
  }

  // Whether the reference keeps the slots' order or moves present cameras to the front, the pictures that are
  // there come in the contract's order: missing ones are masked, and masked ones are never computed.
  out.pictures.resize(std::max(out.pictures.size(), contract_.cameras.size()));
  out.picture_count = 0;
  for (std::size_t slot = 0; slot < contract_.cameras.size(); ++slot) {
    const contract::CameraSlot& camera = contract_.cameras[slot];
    if (view_of_camera_[slot] < 0) {
      if (!camera.required) continue;
      return Status::invalid("image \"" + camera.key + "\": missing; robot " + contract_.name +
                             " needs it (slot " + camera.slot + ")");
    }
    CameraPicture& picture = out.pictures[static_cast<std::size_t>(out.picture_count++)];
    picture.slot = static_cast<int>(slot);
    SF_RETURN_IF_ERROR(read_image(observation.images[view_of_camera_[slot]], camera, picture));
  }
  if (out.picture_count == 0) {
    return Status::invalid("images: none given; robot " + contract_.name +
                           " needs at least one of: " + known_images());
  }
  return Status::ok_status();
}

Status Preprocessor::read_image(const ImageView& view, const contract::CameraSlot& camera,
                                CameraPicture& picture) {
  const int size = options_.image_size;
  picture.is_raw = options_.raw_frames && view.layout != ImageLayout::kEncoded &&
                   Letterbox::fits_device(view.width, view.height);
  if (picture.is_raw) {
    const bool planes = view.layout == ImageLayout::kCHW;
    const Status described =
        letterbox_.describe(view.bytes, view.width, view.height, planes, size, picture.raw);
    return described.ok() ? described : described.with_context("image \"" + camera.key + "\"");
  }
  picture.pixels.resize(std::size_t{3} * size * size);
  std::span<const std::uint8_t> rgb = view.bytes;
  int width = view.width, height = view.height;
  Status status;
  if (view.layout == ImageLayout::kEncoded) {
    status = decode_image(view.bytes, decoded_);
    rgb = decoded_.rgb;
    width = decoded_.width;
    height = decoded_.height;
  } else if (view.layout == ImageLayout::kCHW && width > 0 && height > 0 && width <= kMaxImageSide &&
             height <= kMaxImageSide &&
             view.bytes.size() ==
                 std::size_t{3} * width * height) {  // other sizes are refused below, with the reason
    const std::size_t plane = std::size_t{1} * width * height;
    interleaved_.resize(3 * plane);
    const std::uint8_t* source = view.bytes.data();
    for (std::size_t i = 0; i < plane; ++i) {
      for (std::size_t c = 0; c < 3; ++c) interleaved_[3 * i + c] = source[c * plane + i];
    }
    rgb = interleaved_;
  }
  if (status.ok()) status = letterbox_.run(rgb, width, height, size, picture.pixels);
  return status.ok() ? status
                     : status.with_context("image \"" + camera.key + "\"");  // no text is built on success
}

Status Preprocessor::read_state(const Observation& observation, ModelInput& out) const {
  const std::size_t width = static_cast<std::size_t>(state_width_);
  if (observation.state.size() != width) {
    return Status::invalid(state_fields(contract_) + ": robot " + contract_.name + " needs " +
                           std::to_string(width) + " numbers, got " +
                           std::to_string(observation.state.size()));
  }
  for (std::size_t i = 0; i < width; ++i) {
    if (!std::isfinite(observation.state[i])) {
      return Status::invalid(state_field(contract_, static_cast<int>(i)) + ": not a finite number");
    }
  }
  out.state.assign(observation.state.begin(), observation.state.end());
  contract::transform_state(contract_.state_transforms, out.state);
  out.state_normalized.resize(width);
  contract::normalize(contract_.state_norm, out.state, out.state_normalized);
  for (std::size_t i = 0; i < width; ++i) {
    if (!std::isfinite(out.state_normalized[i])) {
      return Status::invalid(state_field(contract_, static_cast<int>(i)) +
                             ": so far from the statistics that it cannot be normalized");
    }
  }
  return Status::ok_status();
}

Status Preprocessor::take_tokens(const Observation& observation, ModelInput& out) const {
  const std::size_t count = observation.tokens.size();
  if (observation.prompt) return Status::invalid("tokens: given together with a prompt; send one of the two");
  if (count > static_cast<std::size_t>(options_.max_tokens)) {
    return Status::invalid("tokens: " + std::to_string(count) + " ids, the model takes at most " +
                           std::to_string(options_.max_tokens));
  }
  for (std::size_t i = 0; i < count; ++i) {
    const std::int32_t id = observation.tokens[i];
    if (id < 0 || id >= options_.vocab) {
      return Status::invalid("tokens[" + std::to_string(i) + "]: " + std::to_string(id) +
                             " is not below the vocabulary's size " + std::to_string(options_.vocab));
    }
  }
  out.tokens.assign(observation.tokens.begin(), observation.tokens.end());
  out.prompt_truncated = false;
  return Status::ok_status();
}

Status Preprocessor::read_prompt(const Observation& observation, ModelInput& out) {
  const std::string& field = contract_.prompt.key;
  if (!observation.tokens.empty()) return take_tokens(observation, out);
  std::string_view prompt;
  if (observation.prompt) {
    prompt = *observation.prompt;
  } else if (contract_.prompt.default_prompt) {
    prompt = *contract_.prompt.default_prompt;
  } else {
    return Status::invalid(field + ": missing; robot " + contract_.name + " has no default prompt");
  }
  if (tokenizer_ == nullptr) {
    return Status::invalid(field + ": there is no tokenizer to read it" +
                           (options_.tokenizer_hint.empty() ? "" : " (" + options_.tokenizer_hint + ")") +
                           "; pass --tokenizer with the public file paligemma_tokenizer.model (bucket "
                           "big_vision), or send token ids");
  }
  const bool in_prompt = contract_.prompt.mode == contract::PromptMode::kState;
  if (in_prompt) {
    for (std::size_t i = 0; i < bins_.size(); ++i) bins_[i] = state_bin(out.state_normalized[i]);
  }
  // A robot keeps its task for hundreds of inferences and often stands still: then nothing is tokenised
  // again.
  if (!has_last_ || prompt != last_prompt_ || (in_prompt && bins_ != last_bins_)) {
    has_last_ = false;
    if (prompt.size() > kMaxPromptBytes) {
      return Status::invalid(field + ": " + std::to_string(prompt.size()) + " bytes; at most " +
                             std::to_string(kMaxPromptBytes));
    }
    if (!is_utf8(prompt)) return Status::invalid(field + ": not valid UTF-8");
    last_tokens_.reserve(static_cast<std::size_t>(contract_.prompt.max_tokens));
    SF_RETURN_IF_ERROR(
        tokenizer_->encode_prompt(prompt, bins_, contract_.prompt, last_tokens_, last_truncated_)
            .with_context(field));
    last_prompt_ = prompt;
    last_bins_ = bins_;
    has_last_ = true;
  }
  out.tokens.assign(last_tokens_.begin(), last_tokens_.end());
  out.prompt_truncated = last_truncated_;
  return Status::ok_status();
}

}  // namespace servoflow::stages
