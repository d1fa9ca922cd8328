// A robot file is either refused or gives a contract that can be printed and hashed.
#include "contract/canonical.h"
#include "contract/toml_robot.h"
#include "tests/fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto robot = servoflow::contract::parse_robot(servoflow::fuzz::as_text(data, size), "fuzz");
  if (!servoflow::fuzz::accepted(robot)) return 0;
  servoflow::fuzz::require(servoflow::contract::contract_hash(*robot).size() == 64);
  return 0;
}
