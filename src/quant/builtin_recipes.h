// The recipes of recipes/*.toml, compiled in.
#pragma once

#include <span>
#include <string_view>

namespace servoflow::quant {

struct BuiltinRecipe {
  std::string_view name;
  std::string_view toml;
};
std::span<const BuiltinRecipe> builtin_recipes();

}  // namespace servoflow::quant
