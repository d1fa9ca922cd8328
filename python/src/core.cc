// The extension module servoflow._core: the C++ API with Python types. The package's Python files put
// openpi's observations in front of it; nothing is decided here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "convert.h"
#include "servoflow/policy.h"

namespace servoflow::python {
namespace {

using Images = std::vector<std::tuple<std::string, int, ImageArray>>;
using Noise = std::optional<NoiseArray>;

// A session and whose turn it is: Python threads may share one.
struct SessionObject {
  explicit SessionObject(Session s) : session(std::move(s)) {}
  std::mutex turn;
  Session session;
};

std::span<const float> noise_of(const Noise& noise) {
  return noise ? std::span<const float>(noise->data(), noise->size()) : std::span<const float>();
}

// Calls Python from the opening thread, which runs without the interpreter's lock. The first exception ends
// the calls and is raised when opening has come to its end.
class Progress {
 public:
  explicit Progress(nb::object function) : function_(std::move(function)) {}

  ProgressFunction function() {
    if (function_.is_none()) return {};
    return [this](std::uint64_t done, std::uint64_t total) {
      const nb::gil_scoped_acquire lock;
      if (raised_) return;
      try {
        function_(done, total);
      } catch (nb::python_error& error) {
        raised_.emplace(std::move(error));
      }
    };
  }
  void raise_again() {
    if (!raised_) return;
    raised_->restore();
    throw nb::python_error();
  }

 private:
  nb::object function_;
  std::optional<nb::python_error> raised_;
};

std::unique_ptr<Policy> open(const std::string& checkpoint, const std::string& device,
                             const std::string& precision, int threads, const std::string& tokenizer,
                             const std::string& robot, const std::string& assets, int max_batch,
                             nb::object progress) {
  Progress told(std::move(progress));
  const PolicyOptions options{.device = device,
                              .precision = precision,
                              .threads = threads,
                              .tokenizer = tokenizer,
                              .robot = robot,
                              .assets = assets,
                              .max_batch = max_batch,
                              .progress = told.function()};
  std::optional<Result<Policy>> opened;
  {
    const nb::gil_scoped_release released;
    opened.emplace(Policy::open(checkpoint, options));
  }
  told.raise_again();
  check(opened->status());
  return std::make_unique<Policy>(std::move(**opened));
}

std::unique_ptr<SessionObject> new_session(const Policy& policy, const std::string& robot,
                                           std::uint64_t seed) {
  std::optional<Result<Session>> made;
  {
    const nb::gil_scoped_release released;
    made.emplace(policy.new_session({.robot = robot, .seed = seed}));
  }
  check(made->status());
  return std::make_unique<SessionObject>(std::move(**made));
}

nb::dict infer(SessionObject& s, Images images, StateArray state, nb::object prompt, nb::object tokens,
               int steps, Noise noise) {
  const ObservationArgs args{std::move(images), std::move(state), std::move(prompt), std::move(tokens)};
  const Borrowed borrowed(args);
  ActionChunk chunk;
  Status status;
  {
    const nb::gil_scoped_release released;
    const std::lock_guard turn(s.turn);
    status = s.session.infer_into(borrowed.observation(), {.steps = steps, .noise = noise_of(noise)}, chunk);
  }
  check(status);
  return chunk_to_dict(std::move(chunk));
}

// Each request is (session, images, state, prompt, tokens).
using Request = std::tuple<SessionObject*, Images, StateArray, nb::object, nb::object>;

nb::list infer_batch(const std::vector<Request>& requests, int steps, Noise noise) {
  std::vector<ObservationArgs> args;
  for (const auto& [session, images, state, prompt, tokens] : requests)
    args.push_back({images, state, prompt, tokens});
  std::vector<std::unique_ptr<Borrowed>> borrowed;
  std::vector<Session*> sessions;
  std::vector<std::mutex*> turns;
  std::vector<const Observation*> observations;
  for (std::size_t i = 0; i < args.size(); ++i) {
    SessionObject* const session = std::get<0>(requests[i]);
    if (session == nullptr)
      raise_status(Status::invalid("request " + std::to_string(i) + ": its session is None"));
    borrowed.push_back(std::make_unique<Borrowed>(args[i]));
    observations.push_back(&borrowed.back()->observation());
    sessions.push_back(&session->session);
    turns.push_back(&session->turn);
  }
  std::sort(turns.begin(), turns.end());  // so that two batches cannot wait for each other
  if (std::adjacent_find(turns.begin(), turns.end()) != turns.end())
    raise_status(Status::invalid("infer_batch: a session may stand in a batch once"));
  std::vector<ActionChunk> chunks(args.size());
  Status status;
  {
    const nb::gil_scoped_release released;
    std::vector<std::unique_lock<std::mutex>> held;
    for (std::mutex* turn : turns) held.emplace_back(*turn);
    status =
        servoflow::infer_batch(sessions, observations, {.steps = steps, .noise = noise_of(noise)}, chunks);
  }
  check(status);
  nb::list out;
  for (ActionChunk& chunk : chunks) out.append(chunk_to_dict(std::move(chunk)));
  return out;
}

nb::list component_list(const std::vector<ComponentPrecision>& components) {
  nb::list out;
  for (const ComponentPrecision& c : components) {
    nb::dict part;
    part["component"] = c.component;
    part["precision"] = c.precision;
    part["kernel"] = c.kernel;
    part["layers"] = c.layers;
    part["parameters"] = c.parameters;
    part["weight_bytes"] = c.weight_bytes;
    out.append(part);
  }
  return out;
}

nb::dict info(const Policy& policy) {
  const PolicyInfo& i = policy.info();
  nb::dict out;
  out["checkpoint"] = i.checkpoint;
  out["layout"] = i.layout;
  out["device"] = i.device;
  out["backend"] = i.backend;
  out["precision"] = i.precision;
  out["components"] = component_list(i.components);
  out["hardware"] = i.hardware;
  out["threads"] = i.threads;
  out["horizon"] = i.horizon;
  out["model_action_dim"] = i.model_action_dim;
  out["image_size"] = i.image_size;
  out["max_tokens"] = i.max_tokens;
  out["camera_slots"] = i.camera_slots;
  out["parameters"] = i.parameters;
  out["weight_bytes"] = i.weight_bytes;
  out["workspace_bytes"] = i.workspace_bytes;
  out["ready_seconds"] = i.ready_seconds;
  return out;
}

nb::dict describe(const std::string& checkpoint, const std::string& robot, const std::string& assets) {
  std::optional<Result<CheckpointInfo>> result;
  {
    const nb::gil_scoped_release released;
    result.emplace(Policy::describe(checkpoint, robot, assets));
  }
  check(result->status());
  const CheckpointInfo& i = **result;
  nb::dict out;
  out["layout"] = i.layout;
  out["horizon"] = i.horizon;
  out["model_action_dim"] = i.model_action_dim;
  out["image_size"] = i.image_size;
  out["max_tokens"] = i.max_tokens;
  out["default_steps"] = i.default_steps;
  out["components"] = component_list(i.components);
  out["contract_json"] = i.contract_json;
  out["contract_hash"] = i.contract_hash;
  return out;
}

}  // namespace

NB_MODULE(_core, m) {
  m.attr("version") = SF_VERSION;
  nb::class_<Policy>(m, "Policy")
      .def_static("open", &open, nb::arg("checkpoint"), nb::arg("device"), nb::arg("precision"),
                  nb::arg("threads"), nb::arg("tokenizer"), nb::arg("robot"), nb::arg("assets"),
                  nb::arg("max_batch"), nb::arg("progress").none())
      .def("new_session", &new_session, nb::arg("robot"), nb::arg("seed"))
      .def("info", &info);
  nb::class_<SessionObject>(m, "Session")
      .def("infer", &infer, nb::arg("images"), nb::arg("state"), nb::arg("prompt").none(),
           nb::arg("tokens").none(), nb::arg("steps"), nb::arg("noise").none())
      .def("reset",
           [](SessionObject& s) {
             const nb::gil_scoped_release released;
             const std::lock_guard turn(s.turn);
             s.session.reset();
           })
      .def("contract_json", [](const SessionObject& s) { return s.session.contract_json(); })
      .def("contract_hash", [](const SessionObject& s) { return s.session.contract_hash(); })
      .def("device", [](const SessionObject& s) { return s.session.device().device; });
  m.def("infer_batch", &infer_batch, nb::arg("requests"), nb::arg("steps"), nb::arg("noise").none());
  m.def("describe", &describe, nb::arg("checkpoint"), nb::arg("robot"), nb::arg("assets"));
}

}  // namespace servoflow::python
