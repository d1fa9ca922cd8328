// One message of a robot to one observation: which keys a robot's contract reads, and what they may hold.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "serve/wire.h"
#include "servoflow/observation.h"
#include "servoflow/policy.h"
#include "servoflow/status.h"

namespace servoflow::serve {

// What a contract says about requests and replies, read from its canonical JSON (Session::contract_json).
struct RequestSchema {
  struct Camera {
    std::string slot, key;
    bool required = false;
  };
  struct StatePart {
    std::string key;
    int width = 0;
  };
  std::string robot, asset;
  std::vector<Camera> cameras;  // those with a key, in the model's order
  std::vector<std::string> ignored_images;
  std::vector<StatePart> state;
  std::string prompt_key;
  std::optional<std::string> default_prompt;
  bool state_in_prompt = false;
  int max_tokens = 0;
  int action_width = 0;
  bool has_action_statistics = false;  // then actions leave as float64, else as float32
  bool truncates_floats = true;  // 255 times a float image is cut to a byte, as openpi does; else rounded
  int horizon = 0, model_action_dim = 0;  // of `noise`

  static Result<RequestSchema> from_contract(const std::string& contract_json, const PolicyInfo& policy);
  int state_width() const;
};

// The optional keys that the stock server does not know.
struct RequestOptions {
  std::vector<float> noise;            // [horizon, model_action_dim], or empty
  std::optional<std::uint64_t> seed;   // the session's noise starts anew from it
  int steps = 0;                       // `num_steps`; 0: the checkpoint's default
  bool reset = false;                  // a new episode begins with this request
  std::optional<std::string> episode;  // `episode_id`; a change resets like `reset`
  std::optional<double> deadline_ms;   // from receipt
};

// A decoded request; owns all that its observation borrows. Moved freely: nothing moves in memory with it.
class Request {
 public:
  // Takes the message, whose bytes stay where they are. Every error names the field and the cause.
  static Result<Request> decode(std::vector<std::uint8_t> message,
                                std::shared_ptr<const RequestSchema> schema, const WireLimits& limits);
  const Observation& observation() const { return observation_; }
  const RequestOptions& options() const { return options_; }
  const std::string& prompt() const { return prompt_; }
  std::size_t message_bytes() const { return message_.size(); }

  Request(Request&& other) noexcept { *this = std::move(other); }
  Request& operator=(Request&& other) noexcept;

 private:
  Request() = default;
  Status read(const WireLimits& limits);
  Status read_images(const WireValue& root);
  Status read_image(const RequestSchema::Camera& camera, const WireValue& value);
  Status read_state(const WireValue& root);
  Status read_prompt(const WireValue& root);
  Status read_options(const WireValue& root);
  Status read_noise(const WireValue& value);

  std::shared_ptr<const RequestSchema> schema_;
  std::vector<std::uint8_t> message_;
  std::list<std::vector<std::uint8_t>> converted_;  // images that had to be made bytes
  std::vector<double> state_;
  std::string prompt_;
  RequestOptions options_;
  Observation observation_;
};

}  // namespace servoflow::serve
