#include "recorded_case.h"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <stdexcept>
#include <utility>

namespace robot {
namespace {

using Json = nlohmann::json;

// Tensors by name; every range is checked against the file.
class Tensors {
 public:
  explicit Tensors(std::string_view file) {
    std::uint64_t size = 0;
    if (file.size() < sizeof(size)) throw std::runtime_error("too short for a safetensors file");
    std::memcpy(&size, file.data(), sizeof(size));
    if (size > file.size() - sizeof(size)) throw std::runtime_error("ends within its header");
    header_ = Json::parse(file.substr(sizeof(size), size));
    body_ = file.substr(sizeof(size) + size);
  }

  const Json& metadata() const { return header_.at("__metadata__"); }
  bool has(const std::string& name) const { return header_.contains(name); }

  template <class T>
  Array<T> read(const std::string& name, const char* dtype) const {
    if (!has(name)) throw std::runtime_error("has no tensor " + name + "; was it written by serve --record?");
    const Json& entry = header_.at(name);
    if (entry.at("dtype").get<std::string>() != dtype)
      throw std::runtime_error(name + ": the type is not " + dtype);
    const auto begin = entry.at("data_offsets").at(0).get<std::size_t>();
    const auto end = entry.at("data_offsets").at(1).get<std::size_t>();
    if (begin > end || end > body_.size()) throw std::runtime_error(name + ": lies outside the file");
    Array<T> out;
    std::size_t elements = 1;
    for (const Json& side : entry.at("shape")) {
      out.shape.push_back(side.get<std::size_t>());
      if (out.shape.back() < 1 || out.shape.back() > body_.size() / elements)
        throw std::runtime_error(name + ": its shape does not fit into the file");
      elements *= out.shape.back();
    }
    if (end - begin != elements * sizeof(T))
      throw std::runtime_error(name + ": its data do not fill its shape");
    out.values.resize(elements);
    std::memcpy(out.values.data(), body_.data() + begin, end - begin);
    return out;
  }

 private:
  Json header_;
  std::string_view body_;
};

// [height, width, 3] to [3, height, width], as ALOHA's cameras send it.
Array<std::uint8_t> planes_of(const Array<std::uint8_t>& frame, const std::string& name) {
  if (frame.shape.size() != 3) throw std::runtime_error(name + ": is not [height, width, 3]");
  const std::size_t pixels = frame.shape[0] * frame.shape[1], channels = frame.shape[2];
  Array<std::uint8_t> out{{channels, frame.shape[0], frame.shape[1]}, {}};
  out.values.resize(frame.values.size());
  for (std::size_t i = 0; i < pixels; ++i)
    for (std::size_t c = 0; c < channels; ++c) out.values[c * pixels + i] = frame.values[i * channels + c];
  return out;
}

// "images/cam_high" is the entry cam_high of the map `images`; other keys are used as they are.
void put(Observation& observation, const std::string& key, Value value) {
  constexpr std::string_view kImages = "images/";
  if (key.starts_with(kImages)) {
    observation.images[key.substr(kImages.size())] = std::move(value);
  } else {
    observation.fields[key] = std::move(value);
  }
}

RecordedCase parse(std::string_view file) {
  const Tensors tensors(file);
  const Json& metadata = tensors.metadata();
  const Json contract = Json::parse(metadata.at("contract").get<std::string>());
  RecordedCase out;
  put(out.observation, "noise", tensors.read<float>("input/noise", "F32"));
  put(out.observation, "num_steps", std::int64_t{std::stoi(metadata.at("steps").get<std::string>())});
  put(out.observation, contract.at("prompt").at("key"), metadata.at("prompt").get<std::string>());
  for (const Json& camera : contract.at("cameras")) {
    const std::string name = "input/image/" + camera.at("slot").get<std::string>();
    const std::string key = camera.at("key");
    if (!tensors.has(name)) continue;  // a camera that this robot need not have
    Array<std::uint8_t> frame = tensors.read<std::uint8_t>(name, "U8");
    put(out.observation, key, key.starts_with("images/") ? planes_of(frame, name) : std::move(frame));
  }
  const Array<double> state = tensors.read<double>("input/state", "F64");
  std::size_t begin = 0;
  for (const Json& part : contract.at("state").at("parts")) {
    const auto width = part.at("width").get<std::size_t>();
    if (width > state.values.size() - begin)
      throw std::runtime_error("input/state: shorter than the contract's");
    const auto first = state.values.begin() + static_cast<std::ptrdiff_t>(begin);
    put(out.observation, part.at("key"),
        Array<double>{{width}, {first, first + static_cast<std::ptrdiff_t>(width)}});
    begin += width;
  }
  Array<double> expected = tensors.read<double>("expect/actions", "F64");
  if (expected.shape.size() != 2) throw std::runtime_error("expect/actions: is not [horizon, columns]");
  out.expected = {expected.shape[0], expected.shape[1], std::move(expected.values)};
  return out;
}

}  // namespace

RecordedCase parse_case(std::string_view file) {
  try {
    return parse(file);
  } catch (const Json::exception& error) {
    throw std::runtime_error(std::string("its header is not a recorded request's: ") +
                             printable(error.what()));
  } catch (const std::logic_error&) {  // std::stoi
    throw std::runtime_error("steps: is not a whole number");
  }
}

RecordedCase read_case(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw std::runtime_error(path + ": " + std::strerror(errno));
  std::ostringstream bytes;
  bytes << in.rdbuf();
  try {
    return parse_case(bytes.view());
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(path + ": " + error.what());
  }
}

}  // namespace robot
