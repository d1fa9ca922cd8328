// A recorded case is either refused or has its inputs in agreement with each other.
#include "core/safetensors.h"
#include "tests/fuzz/fuzz.h"
#include "toolkit/case_file.h"

using servoflow::fuzz::require;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  auto file = servoflow::SafetensorsFile::parse({reinterpret_cast<const std::byte*>(data), size}, "fuzz");
  if (!file.ok()) return 0;
  const auto read = servoflow::toolkit::case_from_file(*std::move(file), "fuzz.safetensors");
  if (!servoflow::fuzz::accepted(read)) return 0;
  require(read->noise.size() == static_cast<std::size_t>(read->horizon) * read->action_dim);
  for (const auto& image : read->images)
    require(image.rgb.size() == static_cast<std::size_t>(image.height) * image.width * 3);
  return 0;
}
