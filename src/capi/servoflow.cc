// The C interface: handles, versioned structs and error texts around the C++ API. Nothing is decided here.
#include "servoflow/servoflow.h"

#include <algorithm>
#include <cstddef>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "capi/errors.h"
#include "capi/handles.h"
#include "capi/versioned.h"
#include "servoflow/policy.h"

namespace servoflow::capi {
namespace {

// Sizes in version 1. A field that is appended changes sizeof, never these.
constexpr std::size_t kPolicyOptionsV1 = sizeof(servoflow_policy_options);
constexpr std::size_t kPolicyInfoV1 = offsetof(servoflow_policy_info, components);
static_assert(sizeof(void*) != 8 || kPolicyInfoV1 == 120);
constexpr std::size_t kSessionOptionsV1 = sizeof(servoflow_session_options);
constexpr std::size_t kImageV1 = sizeof(servoflow_image);
constexpr std::size_t kObservationV1 = sizeof(servoflow_observation);
constexpr std::size_t kInferOptionsV1 = sizeof(servoflow_infer_options);
constexpr std::size_t kChunkViewV1 = sizeof(servoflow_chunk_view);

constexpr std::size_t kMaxImages = 64, kMaxBatch = 4096, kMaxStateOrTokens = std::size_t{1} << 20;

struct PolicyObject {
  explicit PolicyObject(Policy opened) : policy(std::move(opened)) {
    for (const ComponentPrecision& c : policy.info().components)
      components.push_back({.struct_size = sizeof(servoflow_component_precision),
                            .component = c.component.c_str(),
                            .precision = c.precision.c_str(),
                            .kernel = c.kernel.c_str(),
                            .layers = c.layers,
                            .reserved = 0,
                            .parameters = c.parameters,
                            .weight_bytes = c.weight_bytes});
  }
  const Policy policy;
  std::vector<servoflow_component_precision> components;  // borrows from the policy's info
};
struct SessionObject {
  std::mutex turn;
  Session session;
};
struct ChunkObject {
  std::mutex turn;
  ActionChunk chunk;
  bool filled = false;
};

// Never destroyed: a thread may still call while the process ends.
template <typename Handle, typename Object>
HandleTable<Handle, Object>& table(const char* kind) {
  static auto* const made = new HandleTable<Handle, Object>(kind);
  return *made;
}
auto& policies() { return table<servoflow_policy, PolicyObject>("policy"); }
auto& sessions() { return table<servoflow_session, SessionObject>("session"); }
auto& chunks() { return table<servoflow_chunk, ChunkObject>("chunk"); }

std::string text_or(const char* text, const char* otherwise) { return text == nullptr ? otherwise : text; }

template <typename T>
Status options_or_default(const T* given, std::size_t first, T& out) {
  return given == nullptr ? Status() : read_struct(given, first, "options", out);
}

// The C++ observation that borrows from a C one, and the memory that takes.
struct BorrowedObservation {
  Observation observation;

  Status read(const servoflow_observation* given) {
    servoflow_observation o = SERVOFLOW_OBSERVATION_INIT;
    if (Status s = read_struct(given, kObservationV1, "observation", o); !s.ok()) return s;
    if (Status s = array("state", o.state, o.state_count, kMaxStateOrTokens, observation.state); !s.ok())
      return s;
    if (Status s = array("tokens", o.tokens, o.token_count, kMaxStateOrTokens, observation.tokens); !s.ok())
      return s;
    if (o.prompt != nullptr) observation.prompt = o.prompt;
    return read_images(o);
  }

 private:
  template <typename T, typename U>
  static Status array(const std::string& field, const T* data, std::size_t count, std::size_t most, U& out) {
    if (count > most)
      return Status::invalid("observation." + field + "_count: " + std::to_string(count) + " is more than " +
                             std::to_string(most));
    if (data == nullptr && count > 0)
      return Status::invalid("observation." + field + ": is NULL, but its count is " + std::to_string(count));
    out = {data, count};
    return {};
  }

  Status read_images(const servoflow_observation& o) {
    if (o.image_count > kMaxImages)
      return Status::invalid("observation.image_count: " + std::to_string(o.image_count) + " is more than " +
                             std::to_string(kMaxImages));
    if (o.image_count > 0 && o.images == nullptr)
      return Status::invalid("observation.images: is NULL, but image_count is " +
                             std::to_string(o.image_count));
    const auto* next = reinterpret_cast<const unsigned char*>(o.images);
    std::size_t stride = 0;
    for (std::size_t i = 0; i < o.image_count; ++i, next += stride) {
      const std::string where = "observation.images[" + std::to_string(i) + "]";
      servoflow_image image = SERVOFLOW_IMAGE_INIT;
      if (Status s = read_struct(next, kImageV1, where, image); !s.ok()) return s;
      if (i > 0 && image.struct_size != stride)
        return Status::invalid(where + ".struct_size: differs from the first image's");
      stride = image.struct_size;
      if (Status s = add(image, where); !s.ok()) return s;
    }
    return {};
  }

  Status add(const servoflow_image& image, const std::string& where) {
    if (image.name == nullptr) return Status::invalid(where + ".name: is NULL");
    if (image.bytes == nullptr) return Status::invalid(where + ".bytes: is NULL (image " + image.name + ")");
    if (image.reserved != 0) return Status::invalid(where + ".reserved: must be 0");
    ImageView view{.name = image.name, .height = image.height, .width = image.width};
    switch (image.layout) {
      case SERVOFLOW_HWC:
        view.layout = ImageLayout::kHWC;
        break;
      case SERVOFLOW_CHW:
        view.layout = ImageLayout::kCHW;
        break;
      case SERVOFLOW_ENCODED:
        view.layout = ImageLayout::kEncoded;
        break;
      default:
        return Status::invalid(where + ".layout: " + std::to_string(image.layout) +
                               " is none of SERVOFLOW_HWC, SERVOFLOW_CHW, SERVOFLOW_ENCODED");
    }
    view.bytes = {image.bytes, image.byte_count};
    observation.images.push_back(view);
    return {};
  }
};

Status read_infer_options(const servoflow_infer_options* given, InferOptions& out) {
  servoflow_infer_options o = SERVOFLOW_INFER_OPTIONS_INIT;
  if (Status s = options_or_default(given, kInferOptionsV1, o); !s.ok()) return s;
  if (o.reserved != 0) return Status::invalid("options.reserved: must be 0");
  if ((o.noise == nullptr) != (o.noise_count == 0))
    return Status::invalid("options.noise: NULL and a noise_count of 0 go together");
  out.steps = o.steps;
  out.noise = {o.noise, o.noise_count};
  return {};
}

servoflow_chunk_view view_of(const ActionChunk& c) {
  servoflow_chunk_view v = SERVOFLOW_CHUNK_VIEW_INIT;
  v.actions = c.actions.data();
  v.normalized = c.normalized.data();
  v.horizon = c.horizon;
  v.action_dim = c.action_dim;
  v.model_dim = c.model_dim;
  v.prefix_tokens = c.prefix_tokens;
  v.prompt_truncated = c.prompt_truncated ? 1 : 0;
  v.request = c.request;
  v.device = c.device.c_str();
  v.backend = c.backend.c_str();
  v.precision = c.precision.c_str();
  v.contract_hash = c.contract_hash.c_str();
  v.preprocess_ms = c.times.preprocess;
  v.vision_ms = c.times.vision;
  v.prefix_ms = c.times.prefix;
  v.denoise_ms = c.times.denoise;
  v.postprocess_ms = c.times.postprocess;
  v.total_ms = c.times.total;
  v.device_ms = c.times.device;
  v.step_ms = c.times.steps.data();
  v.step_count = c.times.steps.size();
  return v;
}

Status open(const char* checkpoint, const servoflow_policy_options* given, servoflow_policy** policy) {
  if (checkpoint == nullptr) return Status::invalid("checkpoint: is NULL");
  if (policy == nullptr) return Status::invalid("policy: is NULL; there is nowhere to put the handle");
  servoflow_policy_options o = SERVOFLOW_POLICY_OPTIONS_INIT;
  if (Status s = options_or_default(given, kPolicyOptionsV1, o); !s.ok()) return s;
  if (o.threads < 0) return Status::invalid("options.threads: " + std::to_string(o.threads) + " is negative");
  if (o.max_batch < 0)
    return Status::invalid("options.max_batch: " + std::to_string(o.max_batch) + " is negative");
  PolicyOptions options{.device = text_or(o.device, "auto"),
                        .precision = text_or(o.precision, "auto"),
                        .threads = o.threads,
                        .tokenizer = text_or(o.tokenizer, ""),
                        .robot = text_or(o.robot, ""),
                        .assets = text_or(o.assets, ""),
                        .max_batch = std::max(1, static_cast<int>(o.max_batch))};
  if (o.progress != nullptr)
    options.progress = [&](std::uint64_t done, std::uint64_t total) {
      o.progress(done, total, o.progress_user);
    };
  Result<Policy> opened = Policy::open(checkpoint, options);
  if (!opened.ok()) return opened.status();
  *policy = policies().add(std::make_shared<PolicyObject>(std::move(*opened)));
  return {};
}

// An old answer must not be taken for that of a call that failed.
void empty(servoflow_chunk* chunk) {
  const auto found = chunks().find(chunk);
  if (!found.ok()) return;
  const std::lock_guard turn((*found)->turn);
  (*found)->filled = false;
}

Status infer(servoflow_session* session, const servoflow_observation* observation,
             const servoflow_infer_options* given, servoflow_chunk* chunk) {
  const auto c = chunks().find(chunk);
  if (!c.ok()) return c.status();
  const auto s = sessions().find(session);
  if (!s.ok()) {
    empty(chunk);
    return s.status();
  }
  const std::scoped_lock turn((*s)->turn, (*c)->turn);
  (*c)->filled = false;
  BorrowedObservation borrowed;
  if (Status status = borrowed.read(observation); !status.ok()) return status;
  InferOptions options;
  if (Status status = read_infer_options(given, options); !status.ok()) return status;
  Status status = (*s)->session.infer_into(borrowed.observation, options, (*c)->chunk);
  (*c)->filled = status.ok();
  return status;
}

// What a batch holds on to while it runs.
struct Batch {
  std::vector<std::shared_ptr<SessionObject>> sessions;
  std::vector<std::shared_ptr<ChunkObject>> chunks;
  std::vector<std::unique_lock<std::mutex>> turns;

  Status find(servoflow_session* const* session_handles, servoflow_chunk* const* chunk_handles,
              std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
      auto session = capi::sessions().find(session_handles[i]);
      if (!session.ok()) return session.status().with_context("request " + std::to_string(i));
      auto chunk = capi::chunks().find(chunk_handles[i]);
      if (!chunk.ok()) return chunk.status().with_context("request " + std::to_string(i));
      sessions.push_back(std::move(*session));
      chunks.push_back(std::move(*chunk));
    }
    return {};
  }

  // In the order of addresses, so that two batches of the same sessions cannot wait for each other. (One
  // inference takes its two locks without holding one while it waits.)
  Status lock() {
    std::vector<std::mutex*> mutexes;
    for (const auto& s : sessions) mutexes.push_back(&s->turn);
    for (const auto& c : chunks) mutexes.push_back(&c->turn);
    std::sort(mutexes.begin(), mutexes.end());
    if (std::adjacent_find(mutexes.begin(), mutexes.end()) != mutexes.end())
      return Status::invalid("infer_batch: a session or chunk stands in the batch twice");
    for (std::mutex* mutex : mutexes) turns.emplace_back(*mutex);
    return {};
  }
};

Status infer_batch(servoflow_session* const* session_handles,
                   const servoflow_observation* const* observations, servoflow_chunk* const* chunk_handles,
                   std::size_t count, const servoflow_infer_options* given) {
  if (session_handles == nullptr || observations == nullptr || chunk_handles == nullptr)
    return Status::invalid("infer_batch: sessions, observations or chunks is NULL");
  if (count == 0 || count > kMaxBatch)
    return Status::invalid("count: " + std::to_string(count) + " is not between 1 and " +
                           std::to_string(kMaxBatch));
  Batch batch;
  Status ready = batch.find(session_handles, chunk_handles, count);
  if (ready.ok()) ready = batch.lock();
  if (!ready.ok()) {
    for (std::size_t i = 0; i < count; ++i) empty(chunk_handles[i]);
    return ready;
  }
  for (const auto& c : batch.chunks) c->filled = false;
  std::vector<BorrowedObservation> borrowed(count);
  for (std::size_t i = 0; i < count; ++i)
    if (Status status = borrowed[i].read(observations[i]); !status.ok())
      return status.with_context("request " + std::to_string(i));
  InferOptions options;
  if (Status status = read_infer_options(given, options); !status.ok()) return status;

  std::vector<Session*> session_list(count);
  std::vector<const Observation*> observation_list(count);
  std::vector<ActionChunk> answers(count);
  for (std::size_t i = 0; i < count; ++i) {
    session_list[i] = &batch.sessions[i]->session;
    observation_list[i] = &borrowed[i].observation;
    answers[i] = std::move(batch.chunks[i]->chunk);
  }
  Status status = servoflow::infer_batch(session_list, observation_list, options, answers);
  for (std::size_t i = 0; i < count; ++i) {
    batch.chunks[i]->chunk = std::move(answers[i]);
    batch.chunks[i]->filled = status.ok();
  }
  return status;
}

Status get_info(servoflow_policy* policy, servoflow_policy_info* info) {
  const auto found = policies().find(policy);
  if (!found.ok()) return found.status();
  const PolicyInfo& i = (*found)->policy.info();
  servoflow_policy_info out = SERVOFLOW_POLICY_INFO_INIT;
  out.checkpoint = i.checkpoint.c_str();
  out.layout = i.layout.c_str();
  out.device = i.device.c_str();
  out.backend = i.backend.c_str();
  out.precision = i.precision.c_str();
  out.hardware = i.hardware.c_str();
  out.threads = i.threads;
  out.device_count = static_cast<std::int32_t>(i.devices.size());
  out.horizon = i.horizon;
  out.model_action_dim = i.model_action_dim;
  out.image_size = i.image_size;
  out.max_tokens = i.max_tokens;
  out.camera_slots = i.camera_slots;
  out.parameters = i.parameters;
  out.weight_bytes = i.weight_bytes;
  out.workspace_bytes = i.workspace_bytes;
  out.ready_seconds = i.ready_seconds;
  out.components = (*found)->components.data();
  out.component_count = (*found)->components.size();
  return write_struct(out, kPolicyInfoV1, "info", info);
}

Status new_session(servoflow_policy* policy, const servoflow_session_options* given,
                   servoflow_session** session) {
  if (session == nullptr) return Status::invalid("session: is NULL; there is nowhere to put the handle");
  const auto found = policies().find(policy);
  if (!found.ok()) return found.status();
  servoflow_session_options o = SERVOFLOW_SESSION_OPTIONS_INIT;
  if (Status s = options_or_default(given, kSessionOptionsV1, o); !s.ok()) return s;
  Result<Session> made = (*found)->policy.new_session({.robot = text_or(o.robot, ""), .seed = o.seed});
  if (!made.ok()) return made.status();
  auto object = std::make_shared<SessionObject>();
  object->session = std::move(*made);
  *session = sessions().add(std::move(object));
  return {};
}

}  // namespace
}  // namespace servoflow::capi

namespace capi = servoflow::capi;
using servoflow::Status;

extern "C" {

int32_t servoflow_abi_version(void) { return SERVOFLOW_ABI_VERSION; }
const char* servoflow_version(void) { return SF_VERSION; }
const char* servoflow_last_error(void) { return capi::last_error().text(); }

servoflow_status servoflow_policy_open(const char* checkpoint, const servoflow_policy_options* options,
                                       servoflow_policy** policy) {
  return capi::guarded([&] { return capi::open(checkpoint, options, policy); });
}

servoflow_status servoflow_policy_get_info(servoflow_policy* policy, servoflow_policy_info* info) {
  return capi::guarded([&] { return capi::get_info(policy, info); });
}

servoflow_status servoflow_policy_free(servoflow_policy* policy) {
  return capi::guarded([&] { return capi::policies().remove(policy); });
}

servoflow_status servoflow_session_new(servoflow_policy* policy, const servoflow_session_options* options,
                                       servoflow_session** session) {
  return capi::guarded([&] { return capi::new_session(policy, options, session); });
}

servoflow_status servoflow_session_reset(servoflow_session* session) {
  return capi::guarded([&]() -> Status {
    const auto found = capi::sessions().find(session);
    if (!found.ok()) return found.status();
    const std::lock_guard turn((*found)->turn);
    (*found)->session.reset();
    return {};
  });
}

servoflow_status servoflow_session_contract(servoflow_session* session, const char** json,
                                            const char** hash) {
  return capi::guarded([&]() -> Status {
    const auto found = capi::sessions().find(session);
    if (!found.ok()) return found.status();
    if (json != nullptr) *json = (*found)->session.contract_json().c_str();
    if (hash != nullptr) *hash = (*found)->session.contract_hash().c_str();
    return {};
  });
}

servoflow_status servoflow_session_free(servoflow_session* session) {
  return capi::guarded([&] { return capi::sessions().remove(session); });
}

servoflow_status servoflow_chunk_new(servoflow_chunk** chunk) {
  return capi::guarded([&]() -> Status {
    if (chunk == nullptr) return Status::invalid("chunk: is NULL; there is nowhere to put the handle");
    *chunk = capi::chunks().add(std::make_shared<capi::ChunkObject>());
    return {};
  });
}

servoflow_status servoflow_chunk_free(servoflow_chunk* chunk) {
  return capi::guarded([&] { return capi::chunks().remove(chunk); });
}

servoflow_status servoflow_chunk_get(servoflow_chunk* chunk, servoflow_chunk_view* view) {
  return capi::guarded([&]() -> Status {
    const auto found = capi::chunks().find(chunk);
    if (!found.ok()) return found.status();
    const std::lock_guard turn((*found)->turn);
    if (!(*found)->filled)
      return Status::invalid("chunk: holds no answer (no inference into it has succeeded)");
    return capi::write_struct(capi::view_of((*found)->chunk), capi::kChunkViewV1, "view", view);
  });
}

servoflow_status servoflow_infer(servoflow_session* session, const servoflow_observation* observation,
                                 const servoflow_infer_options* options, servoflow_chunk* chunk) {
  return capi::guarded([&] { return capi::infer(session, observation, options, chunk); });
}

servoflow_status servoflow_infer_batch(servoflow_session* const* sessions,
                                       const servoflow_observation* const* observations,
                                       servoflow_chunk* const* chunks, size_t count,
                                       const servoflow_infer_options* options) {
  return capi::guarded([&] { return capi::infer_batch(sessions, observations, chunks, count, options); });
}

}  // extern "C"
