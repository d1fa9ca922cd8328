// The policy API: open a checkpoint once, then one session per robot.
//
//   auto policy = servoflow::Policy::open("checkpoint/", {.device = "auto", .precision = "bf16"});
//   auto session = policy->new_session({.robot = "libero", .seed = 7});
//   auto chunk = session->infer(observation, {.steps = 10});
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "servoflow/action_chunk.h"
#include "servoflow/observation.h"
#include "servoflow/status.h"

namespace servoflow {

// How far opening has come: parameters packed so far, of all.
using ProgressFunction = std::function<void(std::uint64_t done, std::uint64_t total)>;

struct PolicyOptions {
  // auto | cpu | cuda[:N]; several GPUs are cuda:0,1 or cuda:all: the weights on each, sessions spread over
  // them.
  std::string device = "auto";
  // auto (a quantized checkpoint as it is, else bf16 where the device has it) | fp32 | bf16 (a quantized
  // checkpoint is dequantized) | a recipe ("int8-w8a8") | a plan's file: a float checkpoint is rounded to
  // nearest while it is loaded.
  std::string precision = "auto";
  int threads = 0;           // 0: one per core this process may use
  std::string tokenizer;     // SentencePiece model file; empty: search as documented
  std::string robot;         // of sessions that name none
  bool check_robot = false;  // read that robot's contract (or the checkpoint's own) before any weight
  std::string assets;        // statistics folder under assets/; empty: the robot's, else the only one
  int max_batch = 1;  // most sessions of one device in one infer_batch call; 0: what pays off there, 4 on a
                      // GPU, 1 on a CPU
  // A GPU records a whole inference for every combination of requests, pictures and steps, and replays it.
  // What is to be expected is recorded before the policy is ready: these numbers of steps (up to four; empty:
  // the checkpoint's default) with 1 to max_batch requests of as many pictures each as the contract of
  // `robot` (or the checkpoint's own) allows; 1 to all camera slots where none is known. What comes beyond
  // that is recorded when it comes and says so: StageTimes::recorded. The CPU records nothing.
  std::vector<int> prepare_steps;
  int prompt_tokens = 0;  // to expect; a GPU shapes its work for them and takes any number; 0: as many as fit
  ProgressFunction progress;   // called from the opening thread
  ProgressFunction preparing;  // the same for records: made so far, of all
};

struct SessionOptions {
  // Built-in name or contract file; empty: the policy's, else the checkpoint's own contract; "none": model
  // slots by name, token ids or a plain prompt, no state, actions as the flow left them.
  std::string robot;
  std::uint64_t seed = 0;  // of the session's noise
};

struct InferOptions {
  int steps = 0;                 // Euler steps, 1..50; 0: the checkpoint's default (10)
  std::span<const float> noise;  // [horizon, model action_dim] at t = 1; empty: seeded noise
  bool keep_noise = false;       // also return it, ActionChunk::noise: the inference can then be repeated
};

struct DeviceInfo {
  std::string device, backend, hardware;  // "cuda:1", "cuda/sm_90a_bf16", the GPU and its driver
  std::uint64_t weight_bytes = 0, workspace_bytes = 0;
  int prepared = 0;  // records made before ready; 0 on the CPU
};

// What the matrices of one part of the network compute in. A part may have several.
struct ComponentPrecision {
  std::string component;  // "vision", "projector", "language model", "expert", "action and time projections"
  std::string
      precision;  // "bf16", "fp32", or the format of weights and inputs: "int8-w8a8", "nvfp4-w4a16", …
  // How a quantized format is computed here ("int8 dot product (AVX-512 VNNI)", "float32 arithmetic …"), or
  // what was dequantized; empty for plain bf16 and fp32.
  std::string kernel;
  int layers = 0;
  std::uint64_t parameters = 0, weight_bytes = 0;
};

struct PolicyInfo {
  std::string checkpoint, layout;              // "openpi" | "lerobot" | "servoflow" | "synthetic"
  std::string device, backend, precision;      // what runs; several devices in one list, "cuda:0,cuda:1"
  std::vector<ComponentPrecision> components;  // what `precision` means part by part, the same on all devices
  std::string hardware;                        // the (first) GPU and its driver; empty on the CPU
  std::vector<DeviceInfo> devices;             // one or more; bytes below are of all together
  int threads = 0;
  int max_batch = 0;  // as opened
  int horizon = 0, model_action_dim = 0, image_size = 0, max_tokens = 0, camera_slots = 0;
  std::uint64_t parameters = 0, weight_bytes = 0, workspace_bytes = 0;
  double ready_seconds = 0;  // from open() to ready
};

// What a checkpoint says about itself and one robot, read without its weights.
struct CheckpointInfo {
  std::string layout;
  int horizon = 0, model_action_dim = 0, image_size = 0, max_tokens = 0;
  int default_steps = 0;
  // What the linear layers are stored in, part by part; `kernel` is empty: that is a matter of the device.
  std::vector<ComponentPrecision> components;
  std::string contract_json, contract_hash;  // as a session of that robot has them
};

class Session;

class Policy {
 public:
  // Every tensor's name and shape is checked, no weight is read: takes milliseconds and little memory.
  // `robot` and `assets` as in PolicyOptions.
  static Result<CheckpointInfo> describe(const std::string& checkpoint, const std::string& robot = "",
                                         const std::string& assets = "");
  // Reads, checks and packs a checkpoint. Every problem found in it is in one error.
  static Result<Policy> open(const std::string& checkpoint, const PolicyOptions& options = {});
  // Random weights of the published size, generated in memory ("pi05", "tiny" or an architecture file): for
  // measuring.
  static Result<Policy> open_synthetic(const std::string& model, const PolicyOptions& options = {},
                                       std::uint64_t seed = 0, int horizon = 50);
  // A session keeps the policy alive, and stays on the device that had the fewest sessions when it began.
  Result<Session> new_session(const SessionOptions& options = {}) const;
  const PolicyInfo& info() const;

  struct Impl;
  const std::shared_ptr<Impl>& impl() const { return impl_; }

 private:
  std::shared_ptr<Impl> impl_;
};

// One robot's stream of inferences: its random numbers, caches and contract. Not thread-safe; sessions of one
// policy may be used from different threads, which take turns on the device.
class Session {
 public:
  Result<ActionChunk> infer(const Observation& observation, const InferOptions& options = {});
  // The same into an existing chunk, whose memory is reused: after the first calls nothing is allocated.
  Status infer_into(const Observation& observation, const InferOptions& options, ActionChunk& chunk);
  // Starts an episode anew: request index 0, caches dropped.
  void reset();
  // The same with another seed from now on.
  void reset(std::uint64_t seed);
  const std::string& contract_hash() const;
  // The contract as canonical JSON. The hash is taken of it without actions.names and actions.units: labels,
  // which change nothing that is computed.
  const std::string& contract_json() const;
  // Where its inferences run: one of PolicyInfo::devices.
  const DeviceInfo& device() const;

  struct Impl;
  const std::shared_ptr<Impl>& impl() const { return impl_; }

 private:
  friend class Policy;
  friend Status infer_batch(std::span<Session* const>, std::span<const Observation* const>,
                            const InferOptions&, std::span<ActionChunk>);
  std::shared_ptr<Impl> impl_;
};

// Several sessions of one policy in one pass, or one pass on each of their devices at once: rows of different
// robots are packed ragged, never padded to the longest. Each answer has the same bits as alone.
// `options.noise`, if given, is [sessions, horizon, action_dim].
Status infer_batch(std::span<Session* const> sessions, std::span<const Observation* const> observations,
                   const InferOptions& options, std::span<ActionChunk> chunks);

}  // namespace servoflow
