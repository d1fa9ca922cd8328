// A .npy file is either refused or as long as its shape says, and comes back the same after writing.
#include "tests/fuzz/fuzz.h"
#include "toolkit/npy.h"

using servoflow::fuzz::require;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  namespace toolkit = servoflow::toolkit;
  const auto first = toolkit::parse_npy({reinterpret_cast<const std::byte*>(data), size}, "fuzz");
  if (!servoflow::fuzz::accepted(first)) return 0;
  require(first->values.size() == static_cast<std::size_t>(first->shape.elements()));
  const std::vector<std::byte> bytes =
      toolkit::npy_bytes(first->shape, std::span<const double>(first->values));
  const auto second = toolkit::parse_npy(bytes, "fuzz");
  require(second.ok() && second->shape == first->shape);
  for (std::size_t i = 0; i < first->values.size(); ++i)
    require(second->values[i] == first->values[i] || first->values[i] != first->values[i]);  // NaN stays NaN
  return 0;
}
