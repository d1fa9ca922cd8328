// The robot files compiled into the library; the definition is generated from robots/*.toml.
#pragma once

#include <span>
#include <string_view>

namespace servoflow::contract {

struct BuiltinRobot {
  std::string_view name, toml;
};
std::span<const BuiltinRobot> builtin_robots();

}  // namespace servoflow::contract
