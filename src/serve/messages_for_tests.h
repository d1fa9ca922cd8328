// Robots' messages as bytes, honest and otherwise, for tests and fuzzing.
#pragma once

#include <cstdint>
#include <functional>
#include <msgpack.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace servoflow::serve::testing {

using Packer = msgpack::packer<msgpack::sbuffer>;
using Part = std::function<void(Packer&)>;
using Entries = std::vector<std::pair<std::string, Part>>;

inline Part text(std::string value) {
  return [value](Packer& p) { p.pack(value); };
}
inline Part bytes(std::string value) {
  return [value](Packer& p) {
    p.pack_bin(static_cast<std::uint32_t>(value.size()));
    p.pack_bin_body(value.data(), static_cast<std::uint32_t>(value.size()));
  };
}
inline Part number(double value) {
  return [value](Packer& p) { p.pack(value); };
}
inline Part whole(std::int64_t value) {
  return [value](Packer& p) { p.pack(value); };
}
inline Part boolean(bool value) {
  return [value](Packer& p) { p.pack(value); };
}
inline Part nil() {
  return [](Packer& p) { p.pack_nil(); };
}
inline Part list(std::vector<Part> items) {
  return [items](Packer& p) {
    p.pack_array(static_cast<std::uint32_t>(items.size()));
    for (const Part& item : items) item(p);
  };
}
inline Part map(Entries entries, bool byte_keys = false) {
  return [entries, byte_keys](Packer& p) {
    p.pack_map(static_cast<std::uint32_t>(entries.size()));
    for (const auto& [key, value] : entries) {
      (byte_keys ? bytes(key) : text(key))(p);
      value(p);
    }
  };
}
inline Part shape_of(const std::vector<std::int64_t>& shape) {
  std::vector<Part> sides;
  for (std::int64_t side : shape) sides.push_back(whole(side));
  return list(sides);
}
// As openpi's packer writes arrays.
inline Part array(const std::string& dtype, std::vector<std::int64_t> shape, std::string data) {
  return map({{"__ndarray__", boolean(true)},
              {"data", bytes(std::move(data))},
              {"dtype", text(dtype)},
              {"shape", shape_of(shape)}},
             true);
}
template <typename T>
Part array_of(const std::string& dtype, std::vector<std::int64_t> shape, const std::vector<T>& values) {
  return array(dtype, std::move(shape),
               std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)));
}
inline Part image(std::int64_t height, std::int64_t width, char fill = 7) {
  return array("|u1", {height, width, 3}, std::string(static_cast<std::size_t>(height * width * 3), fill));
}
inline std::vector<std::uint8_t> message(const Part& part) {
  msgpack::sbuffer buffer;
  Packer packer(buffer);
  part(packer);
  return {buffer.data(), buffer.data() + buffer.size()};
}

inline Entries libero() {
  return {{"observation/image", image(8, 10)},
          {"observation/wrist_image", image(8, 10)},
          {"observation/state", array_of<double>("<f8", {8}, {1, 2, 3, 4, 5, 6, 7, 8})},
          {"prompt", text("open the drawer")}};
}
// `entries` with that key's value replaced, or added.
inline Entries with(Entries entries, const std::string& key, const Part& value) {
  for (auto& [name, part] : entries)
    if (name == key) return part = value, entries;
  entries.emplace_back(key, value);
  return entries;
}
inline Entries without(const Entries& entries, const std::string& key) {
  Entries out;
  for (const auto& entry : entries)
    if (entry.first != key) out.push_back(entry);
  return out;
}

// Canonical contract JSON, as far as requests depend on it.
inline std::string contract_json(const std::string& robot) {
  const auto make = [](const std::string& name, const std::string& cameras, const std::string& ignored,
                       const std::string& parts, const std::string& mode, int width) {
    return "{\"name\":\"" + name + "\",\"asset\":\"tiny\",\"resize\":\"pillow\",\"cameras\":[" + cameras +
           "],\"ignored_images\":[" + ignored + "],\"state\":{\"parts\":[" + parts +
           "]},\"prompt\":{\"key\":\"prompt\",\"mode\":\"" + mode +
           "\",\"max_tokens\":200,\"default\":null},\"actions\":{\"width\":" + std::to_string(width) +
           ",\"normalization\":{\"kind\":\"quantile\"}}}";
  };
  const auto camera = [](const std::string& slot, const std::string& key, bool required) {
    return "{\"slot\":\"" + slot + "\",\"key\":\"" + key +
           "\",\"required\":" + (required ? "true" : "false") + "}";
  };
  const auto part = [](const std::string& key, int width) {
    return "{\"key\":\"" + key + "\",\"width\":" + std::to_string(width) + "}";
  };
  if (robot == "libero")
    return make("libero",
                camera("base_0_rgb", "observation/image", true) + "," +
                    camera("left_wrist_0_rgb", "observation/wrist_image", true) + "," +
                    camera("right_wrist_0_rgb", "", false),
                "", part("observation/state", 8), "plain", 7);
  if (robot == "droid")
    return make("droid",
                camera("base_0_rgb", "observation/exterior_image_1_left", true) + "," +
                    camera("left_wrist_0_rgb", "observation/wrist_image_left", true),
                "", part("observation/joint_position", 7) + "," + part("observation/gripper_position", 1),
                "state", 8);
  return make("aloha",
              camera("base_0_rgb", "images/cam_high", true) + "," +
                  camera("left_wrist_0_rgb", "images/cam_left_wrist", false) + "," +
                  camera("right_wrist_0_rgb", "images/cam_right_wrist", false),
              "\"images/cam_low\"", part("state", 14), "state", 14);
}

// Whether a message says that.
inline bool contains(const std::string& message, const std::string& part) {
  return message.find(part) != std::string::npos;
}

}  // namespace servoflow::serve::testing

#define EXPECT_SAYS(message, part) EXPECT_PRED2(contains, message, part)
