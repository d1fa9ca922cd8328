// What comes back: a chunk of future actions, and how it was made.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace servoflow {

// Milliseconds of one inference, by stage: wall clock, and the device's own clock for what it recorded.
struct StageTimes {
  double preprocess = 0, vision = 0, prefix = 0, denoise = 0, postprocess = 0, total = 0;
  double device = 0;          // from the first copy in to the last copy out; 0 where the device has no clock
  std::vector<double> steps;  // each denoise step
  // The device had to record this combination of requests, pictures and steps first, and `total` includes it:
  // such a call takes several times as long (PolicyOptions::prepare_steps).
  bool recorded = false;
};

struct ActionChunk {
  int horizon = 0, action_dim = 0;  // of `actions`
  std::vector<double> actions;      // [horizon, action_dim], robot units
  int model_dim = 0;                // columns of `normalized`
  std::vector<float> normalized;    // [horizon, model_dim], as the flow left them
  std::vector<float> noise;         // [horizon, model_dim], where the flow began; only if asked for
  StageTimes times;
  int prefix_tokens = 0;                   // valid image and text tokens the prefix ran on
  bool prompt_truncated = false;           // the prompt was longer than the model's token limit
  std::uint64_t request = 0;               // the session's inference index, part of the noise counter
  std::string device, backend, precision;  // what actually ran: "cpu", "cpu/avx512_bf16", "bf16"
  std::string contract_hash;               // SHA-256 of the robot contract, its labels left out
};

}  // namespace servoflow
