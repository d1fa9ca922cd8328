#include "policy/network.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "core/bf16.h"
#include "core/status_macros.h"
#include "core/zones.h"
#include "policy/plan.h"
#include "stages/denoise/denoise.h"
#include "stages/prefix/prefix.h"
#include "stages/vision/vision.h"

namespace servoflow::policy {
namespace {

using Clock = std::chrono::steady_clock;
double milliseconds_since(Clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
}

void use_the_wait(std::span<const NetworkRequest> requests) {
  for (const NetworkRequest& request : requests)
    if (request.meanwhile != nullptr) (*request.meanwhile)();
}

// Shows a tap what goes into each product while it lives.
class InputObserver : public ops::MatmulObserver {
 public:
  InputObserver(ops::Backend& backend, StageTap& tap) : backend_(backend), tap_(tap) {
    backend_.watch_products(this);
  }
  ~InputObserver() override { backend_.watch_products(nullptr); }
  InputObserver(const InputObserver&) = delete;
  InputObserver& operator=(const InputObserver&) = delete;

  void step(int step) { step_ = step; }
  // Products of the expert that were seen: none, where a backend has one call for a whole step.
  int seen_in_steps() const { return seen_in_steps_; }

  void before(const ops::Matmul& op) override {
    if (op.w->name == nullptr || std::string_view(op.w->name).empty()) return;
    std::int32_t rows = op.rows.capacity;
    if (op.rows.device != nullptr) backend_.download(&rows, op.rows.device, sizeof(rows));
    const auto cols = static_cast<std::size_t>(op.x.cols);
    values_.resize(static_cast<std::size_t>(rows) * cols);
    row_.resize(cols * dtype_size(op.x.dtype));
    for (std::int32_t r = 0; r < rows; ++r) {
      const std::size_t at =
          static_cast<std::size_t>(r) * static_cast<std::size_t>(op.x.pitch) * dtype_size(op.x.dtype);
      backend_.download(row_.data(), static_cast<const std::byte*>(op.x.data) + at, row_.size());
      float* to = values_.data() + static_cast<std::size_t>(r) * cols;
      for (std::size_t c = 0; c < cols; ++c)
        to[c] = op.x.dtype == DType::kBF16 ? to_float(reinterpret_cast<const bf16*>(row_.data())[c])
                                           : reinterpret_cast<const float*>(row_.data())[c];
    }
    seen_in_steps_ += step_ >= 0;
    tap_.input(op.w->name, step_, values_, {rows, op.x.cols});
  }

 private:
  ops::Backend& backend_;
  StageTap& tap_;
  int step_ = -1, seen_in_steps_ = 0;
  std::vector<float> values_;
  std::vector<std::byte> row_;
};

class NetworkImpl : public Network {
 public:
  Status open(std::shared_ptr<const weights::WeightSource> source, const weights::Architecture& architecture,
              const NetworkOptions& options);
  Status run(std::span<const NetworkRequest> requests, int steps, StageTimes* times, StageTap* tap) override;
  Status prepare(std::span<const PassShape> shapes, const ProgressFunction& progress) override;
  int recordings() const override { return backend_->recordings(); }
  const NetworkInfo& info() const override { return info_; }

 private:
  // What a record is made for, beside its schedule.
  struct Pass {
    int requests = 0, pictures = 0;  // pictures: of all requests
  };

  Status stage_inputs(std::span<const NetworkRequest> requests);
  Status stage_picture(const stages::CameraPicture& picture, int index);
  Status stage_frame(const stages::CameraPicture& picture, int index);
  Status stage_text(std::span<const std::int32_t> ids, int row);
  void expect_inputs(const Pass& pass);
  void upload_inputs();
  void enqueue_vision();
  stages::PrefixRun prefix_run();
  stages::DenoiseRun denoise_run();
  Status run_stages(const stages::Schedule& schedule, const stages::ModelInput& input, StageTimes* times,
                    StageTap* tap);
  Status run_recorded(const stages::Schedule& schedule, const Pass& pass,
                      std::span<const NetworkRequest> requests, StageTimes* times);
  Status run_denoise(const stages::Schedule& schedule, StageTimes* times, StageTap* tap);
  void tap_pictures(StageTap& tap, int pictures);
  void tap_prefix(StageTap& tap, const stages::ModelInput& input, bool after_layers);

  weights::Architecture arch_;
  std::shared_ptr<const weights::WeightSource> source_;
  std::unique_ptr<ops::Backend> backend_;
  stages::Vision vision_;
  stages::Prefix prefix_;
  stages::Denoise denoise_;
  Capacity capacity_;
  int prompt_tokens_ = 0;
  Workspace w_;
  bool raw_ = false;                                      // frames and ids enter, not pictures and rows
  std::uint64_t tables_used_ = 0;                         // bytes of w_.staged.tables
  std::vector<std::span<const std::byte>> frame_pixels_;  // where each frame's pixels are
  NetworkInfo info_;
};

Status NetworkImpl::open(std::shared_ptr<const weights::WeightSource> source,
                         const weights::Architecture& architecture, const NetworkOptions& options) {
  arch_ = architecture;
  source_ = std::move(source);
  prompt_tokens_ = options.prompt_tokens > 0 ? options.prompt_tokens : arch_.max_tokens;
  SF_ASSIGN_OR_RETURN(weights::Precision precision,
                      weights::choose_precision(options.precision, arch_, *source_));
  SF_ASSIGN_OR_RETURN(ops::BackendChoice choice,
                      ops::make_backend({options.device, precision.base, options.threads}));
  backend_ = std::move(choice.backend);
  SF_RETURN_IF_ERROR(weights::check_kernels(*backend_, precision, *source_));
  precision.base = choice.precision;  // what auto came to
  capacity_ = {std::max(1, options.max_batch != 0 ? options.max_batch : backend_->requests_at_once()),
               std::max(1, options.max_pictures)};
  raw_ = backend_->takes_raw_inputs();
  weights::Loader loader(*backend_, *source_, packed_parameters(arch_, raw_), options.progress, precision);
  SF_ASSIGN_OR_RETURN(vision_, stages::Vision::load(loader, arch_));
  SF_ASSIGN_OR_RETURN(prefix_, stages::Prefix::load(loader, arch_));
  SF_ASSIGN_OR_RETURN(denoise_, stages::Denoise::load(loader, arch_, capacity_.batch));
  SF_ASSIGN_OR_RETURN(w_, plan_workspace(*backend_, arch_, capacity_));
  frame_pixels_.resize(static_cast<std::size_t>(w_.picture_count.capacity));
  SF_RETURN_IF_ERROR(denoise_.schedule(*backend_, arch_.default_steps).status());
  info_ = {.device = backend_->device(),
           .backend = backend_->name(),
           .precision = precision.name.empty() ? choice.precision : precision.name,
           .hardware = backend_->hardware(),
           .threads = backend_->threads(),
           .max_batch = capacity_.batch,
           .raw_frames = raw_,
           .parameters = loader.parameters(),
           .weight_bytes = loader.packed_bytes(),
           .workspace_bytes = w_.bytes,
           .components = loader.components()};
  return {};
}

// A network that takes frames gets pictures too, from formats and sizes that only the host knows.
Status NetworkImpl::stage_frame(const stages::CameraPicture& picture, int index) {
  ops::Frame& frame = w_.staged.frames[index];
  std::span<const std::byte> pixels = std::as_bytes(std::span(picture.pixels));
  if (picture.is_raw) {
    const stages::RawFrame& raw = picture.raw;
    pixels = std::as_bytes(raw.bytes);
    frame = raw.frame;
    const std::size_t need = (raw.columns.table.size() + raw.rows.table.size()) * sizeof(std::int32_t);
    if (need > w_.table_bytes - tables_used_ || pixels.size() != std::size_t{3} *
                                                                     static_cast<std::size_t>(frame.width) *
                                                                     static_cast<std::size_t>(frame.height))
      return Status::invalid("images: frame " + std::to_string(index) + ": " + std::to_string(pixels.size()) +
                             " bytes for " + std::to_string(frame.width) + "x" +
                             std::to_string(frame.height) + " pixels, or its tables are too large");
    const auto append = [this](const stages::AxisTable& axis) {
      const std::uint64_t at = tables_used_, bytes = axis.table.size() * sizeof(std::int32_t);
      std::memcpy(w_.staged.tables + at, axis.table.data(), bytes);
      tables_used_ = at + bytes;
      return static_cast<std::int64_t>(at);
    };
    frame.column_table = append(raw.columns);
    frame.row_table = append(raw.rows);
  } else {
    frame = {.width = arch_.vision.image, .height = arch_.vision.image};
  }
  frame.pixels = static_cast<std::int64_t>(w_.table_bytes + static_cast<std::uint64_t>(index) *
                                                                ops::max_pixel_bytes(arch_.vision.image));
  SF_RETURN_IF_ERROR(ops::check_frame(frame, {w_.staged.tables, tables_used_},
                                      w_.table_bytes + w_.pixel_bytes, arch_.vision.image)
                         .with_context("images: frame " + std::to_string(index)));
  frame_pixels_[static_cast<std::size_t>(index)] = pixels;
  return {};
}

Status NetworkImpl::stage_picture(const stages::CameraPicture& picture, int index) {
  const auto size =
      static_cast<std::size_t>(arch_.vision.image) * static_cast<std::size_t>(arch_.vision.image) * 3;
  if (picture.is_raw ? !raw_ : picture.pixels.size() != size)
    return Status::invalid("images: picture " + std::to_string(index) + " is not at model size");
  if (raw_) return stage_frame(picture, index);
  std::copy(picture.pixels.begin(), picture.pixels.end(),
            w_.staged_pixels + static_cast<std::size_t>(index) * size);
  return {};
}

Status NetworkImpl::stage_text(std::span<const std::int32_t> ids, int row) {
  if (!raw_) {
    const auto width = static_cast<std::size_t>(arch_.prefix.width);
    return source_->token_rows(ids,
                               {w_.staged_text + static_cast<std::size_t>(row) * width, ids.size() * width});
  }
  for (const std::int32_t id : ids)
    if (id < 0 || id >= arch_.vocab)
      return Status::invalid("token id " + std::to_string(id) + " is outside the token table of " +
                             std::to_string(arch_.vocab) + " rows");
  std::copy(ids.begin(), ids.end(), w_.staged.ids + row);
  return {};
}

// Lays the requests out as ragged rows: pictures first, then text, request by request.
Status NetworkImpl::stage_inputs(std::span<const NetworkRequest> requests) {
  const zones::Zone zone("host/stage");
  const int tokens = arch_.vision.tokens();
  const auto action_size =
      static_cast<std::size_t>(arch_.horizon) * static_cast<std::size_t>(arch_.action_dim);
  const Inputs& in = w_.staged;
  Counts& n = *in.counts;
  n = {};
  tables_used_ = 0;
  ops::Segment* picture_segment = in.segments;
  ops::Segment* prefix_segment = in.segments + w_.picture_count.capacity;
  ops::Segment* suffix_segment = prefix_segment + capacity_.batch;
  if (requests.empty() || static_cast<int>(requests.size()) > capacity_.batch)
    return Status::invalid("batch of " + std::to_string(requests.size()) +
                           " requests; this policy was opened for 1 to " + std::to_string(capacity_.batch));
  for (const NetworkRequest& request : requests) {
    const stages::ModelInput& input = *request.input;
    const int pictures = input.picture_count, text = static_cast<int>(input.tokens.size());
    if (pictures < 0 || pictures > capacity_.pictures || pictures > static_cast<int>(input.pictures.size()))
      return Status::invalid("images: " + std::to_string(pictures) + " pictures; this policy takes up to " +
                             std::to_string(capacity_.pictures));
    if (text > arch_.max_tokens)
      return Status::invalid("tokens: " + std::to_string(text) + " of at most " +
                             std::to_string(arch_.max_tokens));
    if (pictures + text == 0) return Status::invalid("observation: neither an image nor a token");
    if (request.noise.size() != action_size || request.actions.size() != action_size)
      return Status::invalid("noise: expected " + std::to_string(arch_.horizon) + " x " +
                             std::to_string(arch_.action_dim) + " values");
    const int begin = n.prefix_rows;
    for (int p = 0; p < pictures; ++p) {
      SF_RETURN_IF_ERROR(stage_picture(input.pictures[static_cast<std::size_t>(p)], n.pictures));
      *picture_segment++ = {.row_begin = n.vision_rows, .rows = tokens, .slot = n.pictures, .past = 0};
      in.alone[n.pictures] = {.row_begin = 0, .rows = tokens, .slot = n.pictures, .past = 0};
      for (int i = 0; i < tokens; ++i) in.vision_map[n.vision_rows + i] = n.prefix_rows + i;
      n.vision_rows += tokens;
      n.prefix_rows += tokens;
      n.pictures += 1;
    }
    SF_RETURN_IF_ERROR(stage_text(input.tokens, n.text_rows));
    for (int i = 0; i < text; ++i) in.text_map[n.text_rows + i] = n.prefix_rows + i;
    n.text_rows += text;
    n.prefix_rows += text;
    *prefix_segment++ = {.row_begin = begin, .rows = n.prefix_rows - begin, .slot = n.requests, .past = 0};
    *suffix_segment++ = {
        .row_begin = n.suffix_rows, .rows = arch_.horizon, .slot = n.requests, .past = n.prefix_rows - begin};
    std::copy(request.noise.begin(), request.noise.end(),
              in.actions + static_cast<std::size_t>(n.suffix_rows * arch_.action_dim));
    n.suffix_rows += arch_.horizon;
    n.requests += 1;
  }
  return {};
}

// What the device may size its work by: what a record's key says (run_recorded) and how the network was
// opened, and nothing of one call.
void NetworkImpl::expect_inputs(const Pass& pass) {
  w_.picture_count.likely = w_.picture_segments.count.likely = pass.pictures;
  w_.vision_rows.likely = pass.pictures * arch_.vision.tokens();
  w_.prefix_rows.likely = w_.vision_rows.likely + pass.requests * prompt_tokens_;
  w_.suffix_rows.likely = pass.requests * arch_.horizon;
  const int pictures = pass.requests == 1 ? pass.pictures : capacity_.pictures;
  const int rows = pictures * arch_.vision.tokens() + arch_.max_tokens;
  w_.prefix_segments.max_rows = w_.prefix_segments.max_keys = rows;
  w_.suffix_segments.max_keys = rows + arch_.horizon;
}

// Copies what stage_inputs laid out, no more of pictures and text than there is.
void NetworkImpl::upload_inputs() {
  const auto size = [](std::int32_t count) { return static_cast<std::size_t>(count); };
  const Counts& n = *w_.staged.counts;
  backend_->upload(w_.device.counts, w_.staged.counts, w_.input_bytes + tables_used_);
  if (raw_) {
    // Not through staging memory: the driver's own way from the caller's memory is faster, and needs no copy
    // at all where that is pinned.
    for (int p = 0; p < n.pictures; ++p) {
      const std::span<const std::byte> pixels = frame_pixels_[static_cast<std::size_t>(p)];
      backend_->upload(w_.device.tables + w_.staged.frames[p].pixels, pixels.data(), pixels.size());
    }
    return;
  }
  backend_->upload(
      w_.pixels, w_.staged_pixels,
      size(n.pictures) * size(arch_.vision.image) * size(arch_.vision.image) * 3 * sizeof(float));
  backend_->upload(w_.text.data, w_.staged_text,
                   size(n.text_rows) * size(arch_.prefix.width) * sizeof(float));
}

void NetworkImpl::enqueue_vision() { vision_.run(*backend_, vision_run(w_)); }

stages::PrefixRun NetworkImpl::prefix_run() {
  return {.text = w_.text,
          .ids = w_.device.ids,
          .text_rows = w_.text_rows,
          .text_map = w_.device.text_map,
          .x = w_.prefix_x,
          .rows = w_.prefix_rows,
          .segments = w_.prefix_segments,
          .cache = &w_.prefix_cache,
          .rope = &w_.rope,
          .scratch = w_.prefix};
}

stages::DenoiseRun NetworkImpl::denoise_run() {
  return {.actions = w_.actions,
          .velocity = w_.velocity,
          .rows = w_.suffix_rows,
          .segments = w_.suffix_segments,
          .cache = &w_.prefix_cache,
          .rope = &w_.rope,
          .x = w_.suffix_x,
          .final_normed = w_.final_normed,
          .scratch = w_.suffix};
}

Status NetworkImpl::run_denoise(const stages::Schedule& schedule, StageTimes* times, StageTap* tap) {
  const zones::Zone zone("denoise");
  const stages::DenoiseRun run = denoise_run();
  if (times != nullptr) times->steps.resize(static_cast<std::size_t>(schedule.steps));
  std::unique_ptr<InputObserver> observer;
  if (tap != nullptr && tap->wants_inputs()) observer = std::make_unique<InputObserver>(*backend_, *tap);
  for (int j = 0; j < schedule.steps; ++j) {  // one by one: each step has its time and can be watched
    if (observer) observer->step(j);
    const Clock::time_point begin = Clock::now();
    denoise_.run(*backend_, schedule, run, j, 1);
    SF_RETURN_IF_ERROR(backend_->finish());
    if (times != nullptr) times->steps[static_cast<std::size_t>(j)] = milliseconds_since(begin);
    if (tap == nullptr) continue;
    if (observer && observer->seen_in_steps() == 0)
      return Status::invalid("device " + backend_->device() + " (" + backend_->name() +
                             ") computes whole layers at once and shows no inputs of linear layers; use cpu");
    const Shape shape{arch_.horizon, arch_.action_dim};
    std::vector<float> values(static_cast<std::size_t>(shape.elements()));
    const std::string step = "step" + std::to_string(j);
    for (const auto& [name, matrix] :
         {std::pair(step + "/v", &w_.velocity), std::pair(step + "/x", &w_.actions)}) {
      if (!tap->wants(name)) continue;
      backend_->download(values.data(), matrix->data, values.size() * sizeof(float));
      tap->record(name, values, shape);
    }
    if (const std::string name = "time/" + std::to_string(j); tap->wants(name)) {
      std::vector<float> row(static_cast<std::size_t>(arch_.expert.width));
      backend_->download(row.data(),
                         static_cast<const float*>(schedule.condition.data) + j * schedule.condition.pitch,
                         row.size() * sizeof(float));
      tap->record(name, row, {arch_.expert.width});
    }
  }
  return {};
}

void NetworkImpl::tap_pictures(StageTap& tap, int pictures) {
  const Shape shape{arch_.vision.image, arch_.vision.image, 3};
  std::vector<float> picture(static_cast<std::size_t>(shape.elements()));
  for (int p = 0; p < pictures; ++p)
    if (const std::string name = "image/" + std::to_string(p); tap.wants(name)) {
      backend_->download(picture.data(), w_.pixels + static_cast<std::size_t>(p) * picture.size(),
                         picture.size() * sizeof(float));
      tap.record(name, picture, shape);
    }
}

void NetworkImpl::tap_prefix(StageTap& tap, const stages::ModelInput& input, bool after_layers) {
  const int rows = w_.staged.counts->prefix_rows, tokens = arch_.vision.tokens(), width = arch_.prefix.width;
  if (!after_layers) {
    std::vector<float> x(static_cast<std::size_t>(rows) * static_cast<std::size_t>(width));
    for (int i = 0; i < rows; ++i)
      backend_->download(x.data() + static_cast<std::size_t>(i * width),
                         static_cast<const float*>(w_.prefix_x.data) + i * w_.prefix_x.pitch,
                         static_cast<std::size_t>(width) * sizeof(float));
    for (int p = 0; p < input.picture_count; ++p)
      if (const std::string name = "vision/" + std::to_string(p); tap.wants(name))
        tap.record(name,
                   std::span(x).subspan(static_cast<std::size_t>(p * tokens * width),
                                        static_cast<std::size_t>(tokens * width)),
                   {tokens, width});
    if (tap.wants("prefix/embeddings")) tap.record("prefix/embeddings", x, {rows, width});
    return;
  }
  const int columns = arch_.prefix.kv_heads * arch_.prefix.head_dim;
  std::vector<float> k(static_cast<std::size_t>(rows) * static_cast<std::size_t>(columns)), v(k.size());
  for (int layer = 0; layer < arch_.prefix.depth; ++layer) {
    const std::string name = "prefix/layer" + std::to_string(layer);
    if (!tap.wants(name + "/k") && !tap.wants(name + "/v")) continue;
    backend_->read_cache(w_.prefix_cache, layer, 0, rows, k, v);
    if (tap.wants(name + "/k")) tap.record(name + "/k", k, {rows, columns});
    if (tap.wants(name + "/v")) tap.record(name + "/v", v, {rows, columns});
  }
}

Status NetworkImpl::run(std::span<const NetworkRequest> requests, int steps, StageTimes* times,
                        StageTap* tap) {
  if (tap != nullptr && requests.size() != 1)
    return Status::runtime("a stage tap watches one request at a time");
  SF_RETURN_IF_ERROR(stage_inputs(requests));
  const Pass pass{static_cast<int>(requests.size()), w_.staged.counts->pictures};
  expect_inputs(pass);
  SF_ASSIGN_OR_RETURN(const stages::Schedule* schedule, denoise_.schedule(*backend_, steps));
  if (tap == nullptr && backend_->records()) {
    SF_RETURN_IF_ERROR(run_recorded(*schedule, pass, requests, times));
  } else {
    SF_RETURN_IF_ERROR(run_stages(*schedule, *requests[0].input, times, tap));
    use_the_wait(requests);
  }
  const auto action_size =
      static_cast<std::size_t>(arch_.horizon) * static_cast<std::size_t>(arch_.action_dim);
  for (std::size_t r = 0; r < requests.size(); ++r)
    std::copy_n(w_.staged.actions + r * action_size, action_size, requests[r].actions.begin());
  return {};
}

Status NetworkImpl::prepare(std::span<const PassShape> shapes, const ProgressFunction& progress) {
  if (!backend_->records()) return {};
  const auto size =
      static_cast<std::size_t>(arch_.vision.image) * static_cast<std::size_t>(arch_.vision.image) * 3;
  std::vector<float> noise(static_cast<std::size_t>(arch_.horizon) *
                           static_cast<std::size_t>(arch_.action_dim)),
      actions(noise.size());
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    const PassShape& shape = shapes[i];
    stages::ModelInput input;
    for (int p = 0; p < shape.pictures; ++p) input.pictures.push_back({p, std::vector<float>(size)});
    input.picture_count = shape.pictures;
    input.tokens = {0};
    const std::vector<NetworkRequest> requests(static_cast<std::size_t>(std::max(0, shape.requests)),
                                               {&input, noise, actions});
    SF_RETURN_IF_ERROR(stage_inputs(requests).with_context("preparing"));
    SF_ASSIGN_OR_RETURN(const stages::Schedule* schedule, denoise_.schedule(*backend_, shape.steps));
    const Pass pass{shape.requests, w_.staged.counts->pictures};
    expect_inputs(pass);
    // The record is for all of them; this run is for the first one, whose rows come first.
    SF_RETURN_IF_ERROR(stage_inputs({requests.data(), 1}));
    SF_RETURN_IF_ERROR(run_recorded(*schedule, pass, requests, nullptr).with_context("preparing"));
    if (progress) progress(i + 1, shapes.size());
  }
  backend_->keep_recordings();
  return {};
}

// Stage by stage, waiting after each: for a device that computes where it is called, and for taps.
Status NetworkImpl::run_stages(const stages::Schedule& schedule, const stages::ModelInput& input,
                               StageTimes* times, StageTap* tap) {
  const Clock::time_point begin = Clock::now();
  if (tap != nullptr && tap->wants("t")) tap->record("t", schedule.times, {schedule.steps});
  upload_inputs();
  SF_RETURN_IF_ERROR(backend_->finish());
  std::unique_ptr<InputObserver> observer;  // run_denoise has its own, which knows the steps
  if (tap != nullptr && tap->wants_inputs()) observer = std::make_unique<InputObserver>(*backend_, *tap);
  if (w_.staged.counts->pictures > 0) {
    const zones::Zone zone("vision");
    enqueue_vision();
    SF_RETURN_IF_ERROR(backend_->finish());
  }
  const double after_vision = milliseconds_since(begin);
  if (tap != nullptr && raw_) tap_pictures(*tap, w_.staged.counts->pictures);
  prefix_.embed(*backend_, prefix_run());
  if (tap != nullptr) tap_prefix(*tap, input, false);
  {
    const zones::Zone zone("prefix");
    prefix_.run(*backend_, prefix_run());
    SF_RETURN_IF_ERROR(backend_->finish());
  }
  const double after_prefix = milliseconds_since(begin);
  observer.reset();
  if (tap != nullptr) tap_prefix(*tap, input, true);
  SF_RETURN_IF_ERROR(run_denoise(schedule, times, tap));
  backend_->download(
      w_.staged.actions, w_.actions.data,
      static_cast<std::size_t>(w_.staged.counts->suffix_rows * arch_.action_dim) * sizeof(float));
  SF_RETURN_IF_ERROR(backend_->finish());
  if (times != nullptr) {
    times->recorded = false;
    times->vision = after_vision;
    times->prefix = after_prefix - after_vision;
    times->denoise = milliseconds_since(begin) - after_prefix;
  }
  return {};
}

// Everything but the upload in one record: stages, the download. What varies from call to call (lengths,
// masks, frames' sizes, noise) lies in what is uploaded; how many requests, pictures and steps there are
// chooses the record.
Status NetworkImpl::run_recorded(const stages::Schedule& schedule, const Pass& pass,
                                 std::span<const NetworkRequest> requests, StageTimes* times) {
  const zones::Zone zone("graph");
  const std::size_t actions =
      requests.size() * static_cast<std::size_t>(arch_.horizon) * static_cast<std::size_t>(arch_.action_dim);
  const auto key =
      static_cast<std::uint64_t>(schedule.steps) | static_cast<std::uint64_t>(schedule.slot) << 16 |
      static_cast<std::uint64_t>(pass.requests) << 24 | static_cast<std::uint64_t>(pass.pictures) << 40;
  const auto feed = [this] {
    backend_->mark(0);
    upload_inputs();
  };
  const auto body = [this, &schedule, &pass, actions] {
    backend_->mark(1);
    if (pass.pictures > 0) enqueue_vision();
    backend_->mark(2);
    prefix_.embed(*backend_, prefix_run());
    prefix_.run(*backend_, prefix_run());
    backend_->mark(3);
    denoise_.run(*backend_, schedule, denoise_run(), 0, schedule.steps);
    backend_->mark(4);
    backend_->download(w_.staged.actions, w_.actions.data, actions * sizeof(float));
    backend_->mark(5);
  };
  const int before = backend_->recordings();
  backend_->replay(key, std::cref(feed), std::cref(body));
  use_the_wait(requests);
  SF_RETURN_IF_ERROR(backend_->finish());
  if (times != nullptr) {
    times->recorded = backend_->recordings() != before;
    times->device = backend_->elapsed(0, 5);
    times->vision = backend_->elapsed(1, 2);
    times->prefix = backend_->elapsed(2, 3);
    times->denoise = backend_->elapsed(3, 4);
    times->steps.assign(static_cast<std::size_t>(schedule.steps), times->denoise / schedule.steps);
  }
  return {};
}

}  // namespace

Result<std::unique_ptr<Network>> Network::create(std::shared_ptr<const weights::WeightSource> source,
                                                 const weights::Architecture& architecture,
                                                 const NetworkOptions& options) {
  auto network = std::make_unique<NetworkImpl>();
  SF_RETURN_IF_ERROR(network->open(std::move(source), architecture, options));
  return std::unique_ptr<Network>(std::move(network));
}

}  // namespace servoflow::policy
