#include "serve/request.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>

namespace servoflow::serve {
namespace {

using Kind = WireValue::Kind;
constexpr std::size_t kMaxPromptBytes = std::size_t{1} << 20;
constexpr std::size_t kMaxImageSide = 16384;
constexpr int kMaxSteps = 50;
constexpr double kMaxDeadlineMs = 3.6e6;

// A key as it stands, else as a path through nested maps: "images/cam_high" is images → cam_high.
const WireValue* find_path(const WireValue& root, std::string_view key) {
  if (const WireValue* found = root.find(key)) return found;
  for (std::size_t slash = key.find('/'); slash != std::string_view::npos; slash = key.find('/', slash + 1)) {
    const WireValue* outer = root.find(key.substr(0, slash));
    if (outer == nullptr || outer->kind != Kind::kMap) continue;
    if (const WireValue* found = find_path(*outer, key.substr(slash + 1))) return found;
  }
  return nullptr;
}

Status wrong(std::string_view field, const std::string& cause) {
  return Status::invalid(std::string(field) + ": " + cause);
}

// A number from a plain value, a NumPy scalar or an array of one element.
std::optional<double> one_number(const WireValue& value) {
  if (value.is_number()) return value.number();
  const WireArray& array = value.array;
  if (value.kind == Kind::kArray && array.elements == 1 && array.type.kind != 'U' && array.type.kind != 'S')
    return array.number(0);
  return {};
}

// Whole numbers stay exact up to 2^64 - 1 where they travel as integers.
std::optional<std::uint64_t> one_whole(const WireValue& value) {
  if (value.kind == Kind::kUint) return value.whole;
  if (value.kind == Kind::kArray && value.array.elements == 1 && value.array.type.kind == 'u' &&
      value.array.type.bytes == 8 && !value.array.type.big_endian) {
    std::uint64_t whole = 0;
    std::memcpy(&whole, value.array.data.data(), 8);
    return whole;
  }
  const std::optional<double> number = value.kind == Kind::kBool ? std::nullopt : one_number(value);
  if (!number || *number < 0 || *number >= 9007199254740992.0 || *number != std::floor(*number)) return {};
  return static_cast<std::uint64_t>(*number);
}

void append_utf8(std::string& out, std::uint32_t c) {
  const auto add = [&](std::uint32_t byte) { out += static_cast<char>(byte); };
  if (c < 0x80) {
    add(c);
  } else if (c < 0x800) {
    add(0xc0 | (c >> 6));
    add(0x80 | (c & 0x3f));
  } else if (c < 0x10000) {
    add(0xe0 | (c >> 12));
    add(0x80 | ((c >> 6) & 0x3f));
    add(0x80 | (c & 0x3f));
  } else {
    add(0xf0 | (c >> 18));
    add(0x80 | ((c >> 12) & 0x3f));
    add(0x80 | ((c >> 6) & 0x3f));
    add(0x80 | (c & 0x3f));
  }
}

// Text from a string, bytes, or an array of one text element (NumPy pads these with zeros).
Result<std::string> one_text(std::string_view field, const WireValue& value) {
  std::string out;
  if (value.kind == Kind::kText || value.kind == Kind::kBytes) {
    out = value.bytes;
  } else if (value.kind == Kind::kArray && value.array.elements == 1 && value.array.type.kind == 'S') {
    out.assign(reinterpret_cast<const char*>(value.array.data.data()), value.array.data.size());
    out.resize(std::min(out.size(), out.find_last_not_of('\0') + 1));
  } else if (value.kind == Kind::kArray && value.array.elements == 1 && value.array.type.kind == 'U') {
    std::size_t end = value.array.data.size();
    const std::uint8_t* data = value.array.data.data();
    while (end >= 4 && (data[end - 4] | data[end - 3] | data[end - 2] | data[end - 1]) == 0) end -= 4;
    for (std::size_t i = 0; i < end; i += 4) {
      const bool big = value.array.type.big_endian;
      std::uint32_t c = 0;
      for (std::size_t k = 0; k < 4; ++k) c |= std::uint32_t{data[i + k]} << (8 * (big ? 3 - k : k));
      if (c > 0x10ffff || (c >= 0xd800 && c <= 0xdfff)) return wrong(field, "holds no valid text");
      append_utf8(out, c);
    }
  } else {
    return wrong(field, std::string("is ") + value.kind_name() + "; expected a string");
  }
  if (out.size() > kMaxPromptBytes)
    return wrong(field, std::to_string(out.size()) + " bytes; at most " + std::to_string(kMaxPromptBytes));
  if (!is_utf8(out)) return wrong(field, "not valid UTF-8");
  return out;
}

// The numbers of an array or of lists in each other, in C order. Each level of lists adds a side to `shape`.
Status collect_numbers(std::string_view field, const WireValue& value, std::vector<double>& out,
                       std::vector<std::size_t>& shape) {
  if (value.kind == Kind::kArray) {
    if (value.array.type.kind == 'U' || value.array.type.kind == 'S')
      return wrong(field, "dtype " + quoted(value.array.dtype) + "; expected numbers");
    for (std::size_t i = 0; i < value.array.elements; ++i) out.push_back(value.array.number(i));
    shape.insert(shape.end(), value.array.shape.begin(), value.array.shape.end());
    return {};
  }
  if (value.is_number()) {
    out.push_back(value.number());
    return {};
  }
  if (value.kind != Kind::kList)
    return wrong(field, std::string("is ") + value.kind_name() + "; expected an array of numbers");
  std::vector<std::size_t> inner;
  for (std::size_t i = 0; i < value.items.size(); ++i) {
    std::vector<std::size_t> here;
    const Status status = collect_numbers(field, value.items[i], out, here);
    if (!status.ok()) return status;
    if (i > 0 && here != inner) return wrong(field, "its lists are not equally long");
    inner = std::move(here);
  }
  shape.push_back(value.items.size());
  shape.insert(shape.end(), inner.begin(), inner.end());
  return {};
}

std::string shape_text(const std::vector<std::size_t>& shape) {
  return WireArray{.shape = shape}.shape_text();
}

bool starts_like_a_picture_file(std::string_view bytes) {
  constexpr std::string_view kPng("\x89PNG", 4), kJpeg("\xff\xd8\xff", 3);
  return bytes.substr(0, 4) == kPng || bytes.substr(0, 3) == kJpeg;
}

}  // namespace

Result<RequestSchema> RequestSchema::from_contract(const std::string& contract_json,
                                                   const PolicyInfo& policy) {
  RequestSchema out;
  try {
    const nlohmann::json contract = nlohmann::json::parse(contract_json);
    out.robot = contract.at("name");
    out.asset = contract.at("asset");
    for (const auto& camera : contract.at("cameras"))
      if (const std::string key = camera.at("key"); !key.empty())
        out.cameras.push_back({camera.at("slot"), key, camera.at("required")});
    out.ignored_images = contract.at("ignored_images").get<std::vector<std::string>>();
    for (const auto& part : contract.at("state").at("parts"))
      out.state.push_back({part.at("key"), part.at("width")});
    const auto& prompt = contract.at("prompt");
    out.prompt_key = prompt.at("key");
    if (prompt.at("default").is_string()) out.default_prompt = prompt.at("default").get<std::string>();
    out.state_in_prompt = prompt.at("mode") == "state";
    out.max_tokens = prompt.at("max_tokens");
    const auto& actions = contract.at("actions");
    out.action_width = actions.at("width");
    out.has_action_statistics = actions.at("normalization").at("kind") != "identity";
    out.truncates_floats = contract.at("resize") != "lerobot_float";
  } catch (const nlohmann::json::exception& error) {
    return Status::runtime(std::string("robot contract: not as expected: ") + error.what());
  }
  out.horizon = policy.horizon;
  out.model_action_dim = policy.model_action_dim;
  return out;
}

int RequestSchema::state_width() const {
  int width = 0;
  for (const StatePart& part : state) width += part.width;
  return width;
}

Request& Request::operator=(Request&& other) noexcept {
  schema_ = std::move(other.schema_);
  message_ = std::move(other.message_);
  converted_ = std::move(other.converted_);
  state_ = std::move(other.state_);
  prompt_ = std::move(other.prompt_);
  options_ = std::move(other.options_);
  observation_ = std::move(other.observation_);
  // A short string lies inside its object.
  if (observation_.prompt) observation_.prompt = prompt_;
  return *this;
}

Result<Request> Request::decode(std::vector<std::uint8_t> message,
                                std::shared_ptr<const RequestSchema> schema, const WireLimits& limits) {
  Request out;
  out.schema_ = std::move(schema);
  out.message_ = std::move(message);
  if (Status status = out.read(limits); !status.ok()) return status;
  return out;
}

Status Request::read(const WireLimits& limits) {
  const Result<WireValue> root = parse_message(message_, limits);
  if (!root.ok()) return root.status();
  for (const auto step :
       {&Request::read_images, &Request::read_state, &Request::read_prompt, &Request::read_options})
    if (Status status = (this->*step)(*root); !status.ok()) return status;
  return {};
}

Status Request::read_images(const WireValue& root) {
  for (const RequestSchema::Camera& camera : schema_->cameras) {
    const WireValue* value = find_path(root, camera.key);
    if (value == nullptr && camera.required)
      return wrong(camera.key, "missing; robot " + schema_->robot + " needs this camera");
    if (value == nullptr) continue;
    if (Status status = read_image(camera, *value); !status.ok()) return status;
  }
  if (observation_.images.empty()) {
    std::string known;
    for (const RequestSchema::Camera& camera : schema_->cameras)
      known += (known.empty() ? "" : ", ") + camera.key;
    return wrong("images", "none given; robot " + schema_->robot + " needs at least one of: " + known);
  }
  // A map of cameras may hold no camera that the robot does not have: its picture would be lost silently.
  for (const RequestSchema::Camera& camera : schema_->cameras) {
    const std::size_t slash = camera.key.find('/');
    if (slash == std::string::npos) continue;
    const std::string folder = camera.key.substr(0, slash);
    const WireValue* map = root.find(folder);
    if (map == nullptr || map->kind != Kind::kMap) continue;
    for (const std::string_view name : map->keys) {
      const std::string full = folder + "/" + std::string(name);
      const auto is_key = [&](const auto& part) {
        return part.key == full || part.key.starts_with(full + "/");
      };
      const bool known = std::any_of(schema_->cameras.begin(), schema_->cameras.end(), is_key) ||
                         std::any_of(schema_->state.begin(), schema_->state.end(), is_key) ||
                         schema_->prompt_key == full ||
                         std::find(schema_->ignored_images.begin(), schema_->ignored_images.end(), full) !=
                             schema_->ignored_images.end();
      if (!known) return wrong(folder, "robot " + schema_->robot + " has no camera " + quoted(name));
    }
  }
  return {};
}

Status Request::read_image(const RequestSchema::Camera& camera, const WireValue& value) {
  ImageView view{.name = camera.key};
  if (value.kind == Kind::kBytes) {
    if (!starts_like_a_picture_file(value.bytes))
      return wrong(camera.key, "bytes that are neither a PNG nor a JPEG file");
    view.layout = ImageLayout::kEncoded;
    view.bytes = {reinterpret_cast<const std::uint8_t*>(value.bytes.data()), value.bytes.size()};
    observation_.images.push_back(view);
    return {};
  }
  if (value.kind != Kind::kArray)
    return wrong(camera.key,
                 std::string("is ") + value.kind_name() + "; expected an array or a PNG or JPEG file");
  const WireArray& array = value.array;
  const std::string shown = array.shape_text();
  if (array.type.kind == 'u' && array.type.bytes == 1 && array.shape.size() == 1 &&
      starts_like_a_picture_file({reinterpret_cast<const char*>(array.data.data()), array.data.size()})) {
    view.layout = ImageLayout::kEncoded;  // a file's bytes as an array
    view.bytes = array.data;
    observation_.images.push_back(view);
    return {};
  }
  if (array.shape.size() != 3 || (array.shape[0] != 3 && array.shape[2] != 3))
    return wrong(camera.key, "shape " + shown + "; expected [height, width, 3] or [3, height, width]");
  const bool planes = array.shape[0] == 3;  // as the reference reads it
  const std::size_t height = array.shape[planes ? 1 : 0], width = array.shape[planes ? 2 : 1];
  if (height < 1 || width < 1 || height > kMaxImageSide || width > kMaxImageSide)
    return wrong(camera.key,
                 "shape " + shown + "; a side has 1 to " + std::to_string(kMaxImageSide) + " pixels");
  view.layout = planes ? ImageLayout::kCHW : ImageLayout::kHWC;
  view.height = static_cast<int>(height);
  view.width = static_cast<int>(width);
  if (array.type.kind == 'u' && array.type.bytes == 1) {
    view.bytes = array.data;
  } else if (array.type.kind == 'f' && array.type.bytes >= 4) {
    std::vector<std::uint8_t>& bytes = converted_.emplace_back(array.elements);
    for (std::size_t i = 0; i < array.elements; ++i) {
      const double x = array.number(i);
      // In the array's own precision, as NumPy multiplies.
      double scaled = array.type.bytes == 4 ? static_cast<double>(255.0f * static_cast<float>(x)) : 255.0 * x;
      if (!schema_->truncates_floats) scaled = std::nearbyint(scaled);
      if (!(scaled >= 0 && scaled < 256))
        return wrong(camera.key, "value " + std::to_string(x) + " at element " + std::to_string(i) +
                                     "; float images lie in 0 to 1");
      bytes[i] = static_cast<std::uint8_t>(scaled);
    }
    view.bytes = bytes;
  } else {
    return wrong(camera.key,
                 "dtype " + quoted(array.dtype) + "; images are uint8, or float32 or float64 in 0 to 1");
  }
  observation_.images.push_back(view);
  return {};
}

Status Request::read_state(const WireValue& root) {
  for (const RequestSchema::StatePart& part : schema_->state) {
    const WireValue* value = find_path(root, part.key);
    if (value == nullptr)
      return wrong(part.key, "missing; robot " + schema_->robot + " needs its state of " +
                                 std::to_string(part.width) + " numbers");
    const std::size_t before = state_.size();
    std::vector<std::size_t> shape;
    // Refused before it is copied: a state is short.
    if (value->kind == Kind::kArray && value->array.elements != static_cast<std::size_t>(part.width))
      return wrong(part.key, "shape " + value->array.shape_text() + "; robot " + schema_->robot + " needs [" +
                                 std::to_string(part.width) + "]");
    if (Status status = collect_numbers(part.key, *value, state_, shape); !status.ok()) return status;
    const std::size_t count = state_.size() - before;
    const bool scalar = shape.empty() && part.width == 1;
    if (count != static_cast<std::size_t>(part.width) || (shape.size() != 1 && !scalar))
      return wrong(part.key, "shape " + shape_text(shape) + "; robot " + schema_->robot + " needs [" +
                                 std::to_string(part.width) + "]");
    for (std::size_t i = before; i < state_.size(); ++i)
      if (!std::isfinite(state_[i]))
        return wrong(part.key, "element " + std::to_string(i - before) + " is not a finite number");
  }
  observation_.state = state_;
  return {};
}

Status Request::read_prompt(const WireValue& root) {
  const WireValue* value = find_path(root, schema_->prompt_key);
  if (value == nullptr) {
    if (schema_->default_prompt) {
      prompt_ = *schema_->default_prompt;
      return {};
    }
    return wrong(schema_->prompt_key, "missing; robot " + schema_->robot + " has no default prompt");
  }
  Result<std::string> text = one_text(schema_->prompt_key, *value);
  if (!text.ok()) return text.status();
  prompt_ = std::move(*text);
  observation_.prompt = prompt_;
  return {};
}

Status Request::read_noise(const WireValue& value) {
  std::vector<double> numbers;
  std::vector<std::size_t> shape;
  const std::size_t rows = static_cast<std::size_t>(schema_->horizon);
  const std::size_t columns = static_cast<std::size_t>(schema_->model_action_dim);
  const std::string expected = shape_text({rows, columns});
  if (value.kind == Kind::kArray && value.array.elements != rows * columns)
    return wrong("noise", "shape " + value.array.shape_text() + "; this policy needs " + expected);
  if (Status status = collect_numbers("noise", value, numbers, shape); !status.ok()) return status;
  if (shape != std::vector{rows, columns} && shape != std::vector<std::size_t>{1, rows, columns})
    return wrong("noise", "shape " + shape_text(shape) + "; this policy needs " + expected);
  options_.noise.reserve(numbers.size());
  for (const double number : numbers) {
    if (!(std::abs(number) <= 3.4028234663852886e38))
      return wrong("noise", "element " + std::to_string(options_.noise.size()) + " is not a finite float32");
    options_.noise.push_back(static_cast<float>(number));
  }
  return {};
}

Status Request::read_options(const WireValue& root) {
  // None in Python stands for a key that is not there.
  const auto given = [&](const char* key) {
    const WireValue* value = root.find(key);
    return value != nullptr && value->kind != Kind::kNil ? value : nullptr;
  };
  if (const WireValue* noise = given("noise"))
    if (Status status = read_noise(*noise); !status.ok()) return status;
  if (const WireValue* seed = given("seed")) {
    options_.seed = one_whole(*seed);
    if (!options_.seed) return wrong("seed", "expected a whole number of 0 to 2^64 - 1");
  }
  if (const WireValue* steps = given("num_steps")) {
    const std::optional<std::uint64_t> whole = one_whole(*steps);
    if (!whole || *whole < 1 || *whole > kMaxSteps)
      return wrong("num_steps", "expected a whole number of 1 to " + std::to_string(kMaxSteps));
    options_.steps = static_cast<int>(*whole);
  }
  if (const WireValue* reset = given("reset")) {
    if (reset->kind != Kind::kBool &&
        !(reset->kind == Kind::kArray && reset->array.type.kind == 'b' && reset->array.elements == 1))
      return wrong("reset", std::string("is ") + reset->kind_name() + "; expected true or false");
    options_.reset = *one_number(*reset) != 0;
  }
  if (const WireValue* episode = given("episode_id")) {
    if (const std::optional<std::uint64_t> whole = one_whole(*episode)) {
      options_.episode = std::to_string(*whole);
    } else {
      Result<std::string> text = one_text("episode_id", *episode);
      if (!text.ok()) return wrong("episode_id", "expected a string or a whole number");
      if (text->size() > 256)
        return wrong("episode_id", std::to_string(text->size()) + " bytes; at most 256");
      options_.episode = std::move(*text);
    }
  }
  if (const WireValue* deadline = given("deadline_ms")) {
    const std::optional<double> number = deadline->kind == Kind::kBool ? std::nullopt : one_number(*deadline);
    if (!number || !(*number > 0 && *number <= kMaxDeadlineMs))
      return wrong("deadline_ms", "expected milliseconds above 0, at most 3600000");
    options_.deadline_ms = *number;
  }
  return {};
}

}  // namespace servoflow::serve
