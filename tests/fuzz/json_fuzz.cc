// JSON is either refused with a reason or survives being printed and parsed again.
#include "core/json.h"
#include "tests/fuzz/fuzz.h"

using servoflow::fuzz::require;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto value = servoflow::parse_json(servoflow::fuzz::as_text(data, size), "fuzz");
  if (!servoflow::fuzz::accepted(value)) return 0;
  require(!servoflow::json_kind(*value).empty());
  const auto again = servoflow::parse_json(value->dump(), "fuzz");
  require(again.ok() && *again == *value);
  return 0;
}
