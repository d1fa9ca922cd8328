// The network alone: pictures, tokens and noise in, normalised actions out. What Policy, verify and bench
// share.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "core/shape.h"
#include "servoflow/action_chunk.h"
#include "servoflow/policy.h"
#include "stages/flow.h"
#include "weights/architecture.h"
#include "weights/weight_source.h"

namespace servoflow::policy {

// Sees intermediate tensors by the names of recorded cases: "vision/<index>" (index into
// ModelInput::pictures), "image/<index>" (those the network made itself), "prefix/embeddings",
// "prefix/layer<i>/k", "prefix/layer<i>/v", "t", "time/<j>", "step<j>/v", "step<j>/x".
class StageTap {
 public:
  virtual ~StageTap() = default;
  // Asked before a stage is copied out; copying only happens for wanted ones.
  virtual bool wants(std::string_view stage) const = 0;
  virtual void record(std::string_view stage, std::span<const float> values, const Shape& shape) = 0;

  // What goes into the linear layers, [rows, k]. `weights` are the tensors that read it, a space between
  // them: "….q_proj.weight ….k_proj.weight ….v_proj.weight". `step` is the denoise step, or -1 before the
  // first. Asked once a run: a device that computes whole blocks at once cannot show them, which is an error
  // for a tap that wants them.
  virtual bool wants_inputs() const { return false; }
  virtual void input(std::string_view /*weights*/, int /*step*/, std::span<const float> /*rows*/,
                     const Shape& /*shape*/) {}
};

struct NetworkOptions {
  std::string device = "auto", precision = "auto";
  int threads = 0;
  int max_batch = 1;      // 0: what pays off on the device
  int max_pictures = 3;   // per request
  int prompt_tokens = 0;  // to expect in a request, for the shapes of a device's work; 0: as many as fit
  ProgressFunction progress;
};

// What a device that records its work records at once.
struct PassShape {
  int requests = 1, pictures = 1;  // pictures: of each request
  int steps = 10;
};

struct NetworkInfo {
  std::string device, backend, precision, hardware;
  int threads = 0, max_batch = 1;
  bool raw_frames = false;  // takes frames as they are (stages::RawFrame)
  std::uint64_t parameters = 0, weight_bytes = 0, workspace_bytes = 0;
  std::vector<ComponentPrecision> components;
};

struct NetworkRequest {
  const stages::ModelInput* input = nullptr;
  std::span<const float> noise;  // [horizon, action_dim]
  std::span<float> actions;      // [horizon, action_dim], written
  // Work for the host, called at most once: while a device computes alone, or afterwards.
  const std::function<void()>* meanwhile = nullptr;
};

class Network {
 public:
  static Result<std::unique_ptr<Network>> create(std::shared_ptr<const weights::WeightSource> source,
                                                 const weights::Architecture& architecture,
                                                 const NetworkOptions& options);
  virtual ~Network() = default;
  // All requests in one ragged pass; `times` gets vision, prefix, denoise, steps and recorded. `tap` only
  // with one request.
  virtual Status run(std::span<const NetworkRequest> requests, int steps, StageTimes* times,
                     StageTap* tap) = 0;
  // Records passes of these shapes now, on a device that records: each runs once for one request of grey
  // pictures and one token. They are kept; any other shape is recorded when it comes (StageTimes::recorded).
  virtual Status prepare(std::span<const PassShape> shapes, const ProgressFunction& progress) = 0;
  // Recordings made so far; not while a pass runs.
  virtual int recordings() const = 0;
  virtual const NetworkInfo& info() const = 0;
};

}  // namespace servoflow::policy
