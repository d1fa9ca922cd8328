// The whole way of a robot's message to an observation, for each built-in robot: it is either refused with a
// reason, or everything the observation points to lies in memory and agrees with its sizes.
#include <cmath>

#include "serve/messages_for_tests.h"
#include "serve/request.h"
#include "tests/fuzz/fuzz.h"

namespace serve = servoflow::serve;
using servoflow::fuzz::require;

namespace {

std::shared_ptr<const serve::RequestSchema> schema(const char* robot) {
  servoflow::PolicyInfo policy;
  policy.horizon = 2;
  policy.model_action_dim = 4;
  return std::make_shared<serve::RequestSchema>(
      serve::RequestSchema::from_contract(serve::testing::contract_json(robot), policy).value());
}

void check(const servoflow::Observation& o, const serve::Request& request, int state_width) {
  volatile std::uint8_t touched = 0;
  require(!o.images.empty());
  for (const servoflow::ImageView& image : o.images) {
    require(!image.name.empty());
    if (image.layout != servoflow::ImageLayout::kEncoded)
      require(image.height > 0 && image.width > 0 &&
              image.bytes.size() == std::size_t{3} * static_cast<std::size_t>(image.height) *
                                        static_cast<std::size_t>(image.width));
    for (const std::uint8_t byte : image.bytes) touched = touched ^ byte;
  }
  require(o.state.size() == static_cast<std::size_t>(state_width));
  for (const double x : o.state) require(std::isfinite(x));
  require(o.prompt && serve::is_utf8(*o.prompt));
  const serve::RequestOptions& options = request.options();
  require(options.noise.empty() || options.noise.size() == 8);
  require(options.steps >= 0 && options.steps <= 50);
  require(!options.deadline_ms || *options.deadline_ms > 0);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const std::shared_ptr<const serve::RequestSchema> schemas[] = {schema("libero"), schema("droid"),
                                                                        schema("aloha")};
  for (const auto& robot : schemas) {
    auto request = serve::Request::decode({data, data + size}, robot, {});
    if (!servoflow::fuzz::accepted(request)) continue;
    const serve::Request moved = *std::move(request);
    check(moved.observation(), moved, robot->state_width());
  }
  return 0;
}
