// A safetensors header is either refused or describes tensors that lie inside the bytes and can be read.
#include "core/safetensors.h"
#include "tests/fuzz/fuzz.h"

using servoflow::fuzz::require;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::span<const std::byte> bytes(reinterpret_cast<const std::byte*>(data), size);
  const auto file = servoflow::SafetensorsFile::parse(bytes, "fuzz");
  if (!servoflow::fuzz::accepted(file)) return 0;
  for (const servoflow::SafeTensor& tensor : file->tensors()) {
    require(file->find(tensor.name) != nullptr);
    if (!tensor.bytes.empty()) {
      require(tensor.bytes.data() >= bytes.data());
      require(tensor.bytes.data() + tensor.bytes.size() <= bytes.data() + size);
    }
    const auto floats = servoflow::to_floats(tensor);
    const auto doubles = servoflow::to_doubles(tensor);
    require(floats.ok() == doubles.ok());
    if (floats.ok()) require(floats->size() == static_cast<std::size_t>(tensor.shape.elements()));
  }
  return 0;
}
