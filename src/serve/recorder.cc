#include "serve/recorder.h"

#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "servoflow/image.h"

namespace servoflow::serve {
namespace {

using Json = nlohmann::ordered_json;
constexpr std::size_t kMaxWaiting = 64;

// Builds a safetensors file: 8 bytes of header length, JSON header, tensors without gaps.
class SafetensorsBuilder {
 public:
  void add(const std::string& name, const char* dtype, std::vector<std::size_t> shape, const void* data,
           std::size_t bytes) {
    header_[name] = {
        {"dtype", dtype}, {"shape", shape}, {"data_offsets", {body_.size(), body_.size() + bytes}}};
    body_.append(static_cast<const char*>(data), bytes);
  }
  std::string finish(const Json& metadata) {
    header_["__metadata__"] = metadata;
    std::string header = header_.dump(-1, ' ', false, Json::error_handler_t::replace);
    header.append((8 - header.size() % 8) % 8, ' ');
    std::string out(8, '\0');
    const std::uint64_t size = header.size();
    std::memcpy(out.data(), &size, 8);
    return out + header + body_;
  }

 private:
  Json header_ = Json::object();
  std::string body_;
};

struct Frame {
  std::string slot;
  std::size_t height, width;
  std::vector<std::uint8_t> rgb;  // [height, width, 3]
};

Result<Frame> frame_of(const ImageView& view, const std::string& slot) {
  Frame out{.slot = slot};
  if (view.layout == ImageLayout::kEncoded) {
    Result<DecodedImage> decoded = decode_image(view.bytes);
    if (!decoded.ok()) return decoded.status().with_context(std::string(view.name));
    out.height = static_cast<std::size_t>(decoded->height);
    out.width = static_cast<std::size_t>(decoded->width);
    out.rgb = std::move(decoded->rgb);
    return out;
  }
  out.height = static_cast<std::size_t>(view.height);
  out.width = static_cast<std::size_t>(view.width);
  out.rgb.assign(view.bytes.begin(), view.bytes.end());
  if (view.layout == ImageLayout::kCHW) {
    const std::size_t plane = out.height * out.width;
    for (std::size_t i = 0; i < plane; ++i)
      for (std::size_t c = 0; c < 3; ++c) out.rgb[3 * i + c] = view.bytes[c * plane + i];
  }
  return out;
}

// The same precision on other hardware stays within the float32 gates of the recorded references; a bfloat16
// run is told from a float32 one by the bfloat16 gate (tests/golden/README.md).
Json gates(const std::string& precision) {
  const Json coarse = {{"actions_normalized", {{"rms", 0.04}, {"cosine", 0.9995}}}};
  const Json fine = {{"actions_normalized", {{"max", 5e-4}}}, {"actions", {{"max", 5e-4}}}};
  return {{"fp32", precision == "fp32" ? fine : coarse}, {"bf16", coarse}};
}

}  // namespace

Result<std::string> case_file(const Recording& recording) {
  const RequestSchema& schema = *recording.lease->host().schema();
  const PolicyInfo& info = recording.lease->host().info();
  const Observation& observation = recording.request->observation();
  const ActionChunk& chunk = recording.chunk;
  const auto horizon = static_cast<std::size_t>(chunk.horizon);
  const auto model_dim = static_cast<std::size_t>(chunk.model_dim);
  if (observation.state.empty())
    return Status::invalid("robot " + schema.robot + " has no state; a case file needs one");
  if (chunk.noise.size() != horizon * model_dim) return Status::runtime("the noise was not kept");
  if (chunk.times.steps.empty() && recording.request->options().steps == 0)
    return Status::runtime("the number of steps is not known");

  SafetensorsBuilder file;
  // Doubles first: every tensor lies aligned.
  file.add("input/state", "F64", {observation.state.size()}, observation.state.data(),
           observation.state.size_bytes());
  file.add("expect/actions", "F64", {horizon, static_cast<std::size_t>(chunk.action_dim)},
           chunk.actions.data(), chunk.actions.size() * sizeof(double));
  file.add("input/noise", "F32", {horizon, model_dim}, chunk.noise.data(),
           chunk.noise.size() * sizeof(float));
  file.add("expect/actions_normalized", "F32", {horizon, model_dim}, chunk.normalized.data(),
           chunk.normalized.size() * sizeof(float));
  std::string slots;
  for (const RequestSchema::Camera& camera : schema.cameras)
    for (const ImageView& view : observation.images) {
      if (view.name != camera.key) continue;
      Result<Frame> frame = frame_of(view, camera.slot);
      if (!frame.ok()) return frame.status();
      file.add("input/image/" + frame->slot, "U8", {frame->height, frame->width, 3}, frame->rgb.data(),
               frame->rgb.size());
      slots += (slots.empty() ? "" : " ") + camera.slot;
    }
  const std::size_t steps = recording.request->options().steps > 0
                                ? static_cast<std::size_t>(recording.request->options().steps)
                                : chunk.times.steps.size();
  return file.finish(
      {{"format_version", "2"},
       {"about", "served request " + recording.trace + " on " + chunk.backend + ", " + chunk.precision},
       {"format", info.layout == "lerobot" ? "lerobot" : "openpi"},
       {"robot", schema.robot},
       {"contract", recording.lease->host().contract_json()},
       {"prompt", recording.request->prompt()},
       {"steps", std::to_string(steps)},
       {"slots", slots},
       {"entry", "frames"},
       {"prompt_mode", schema.state_in_prompt ? "state" : "plain"},
       {"max_tokens", std::to_string(schema.max_tokens)},
       {"action_width", std::to_string(chunk.action_dim)},
       {"tolerances", gates(chunk.precision).dump()}});
}

Result<std::unique_ptr<Recorder>> Recorder::open(const std::string& folder, std::uint64_t limit,
                                                 Metrics& metrics, const EventLog& log) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) return Status::invalid("--record " + folder + ": cannot make the folder: " + error.message());
  const std::string probe = folder + "/.writable";
  std::FILE* file = std::fopen(probe.c_str(), "wb");
  if (file == nullptr)
    return Status::invalid("--record " + folder + ": cannot write there: " + std::strerror(errno));
  std::fclose(file);
  std::filesystem::remove(probe, error);
  return std::unique_ptr<Recorder>(new Recorder(folder, limit, metrics, log));
}

Recorder::Recorder(std::string folder, std::uint64_t limit, Metrics& metrics, const EventLog& log)
    : folder_(std::move(folder)), limit_(limit), metrics_(metrics), log_(log), thread_([this] { run(); }) {}

Recorder::~Recorder() {
  {
    const std::lock_guard guard(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void Recorder::lose(const Recording& recording, const std::string& cause) {
  ++metrics_.not_recorded;
  log_.write(EventLog::Level::kWarn, "not_recorded", {{"trace", recording.trace}, {"reason", cause}});
}

void Recorder::add(Recording recording) {
  {
    const std::lock_guard guard(mutex_);
    if (accepted_ == limit_) {
      ++metrics_.not_recorded;
      if (!std::exchange(told_limit_, true))
        log_.write(EventLog::Level::kWarn, "record_limit", {{"limit", limit_}, {"folder", folder_}});
      return;
    }
    if (queue_.size() >= kMaxWaiting) return lose(recording, "the disk does not keep up");
    ++accepted_;
    queue_.push_back(std::move(recording));
  }
  changed_.notify_all();
}

void Recorder::run() {
  while (true) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return stopping_ || !queue_.empty(); });
    if (queue_.empty()) return;
    const Recording recording = std::move(queue_.front());
    queue_.pop_front();
    lock.unlock();
    const Result<std::string> bytes = case_file(recording);
    if (!bytes.ok()) {
      lose(recording, bytes.status().message());
      continue;
    }
    // Whole files only: a reader never sees half of one.
    const std::string path = folder_ + "/" + recording.trace + ".safetensors", part = path + ".part";
    std::ofstream out(part, std::ios::binary);
    out.write(bytes->data(), static_cast<std::streamsize>(bytes->size()));
    out.close();
    std::error_code error;
    if (out) std::filesystem::rename(part, path, error);
    if (!out || error) {
      std::error_code ignored;
      std::filesystem::remove(part, ignored);
      lose(recording, path + ": " + (error ? error.message() : std::strerror(errno)));
    } else {
      ++metrics_.recorded;
    }
  }
}

}  // namespace servoflow::serve
