#include "policy/plan.h"

#include <cmath>
#include <vector>

#include "core/status_macros.h"
#include "weights/manifest.h"

namespace servoflow::policy {
namespace {

// Hands out device and staging memory and remembers the first failure, so that the plan reads as a list.
class Planner {
 public:
  Planner(ops::Backend& backend, std::uint64_t& bytes) : backend_(backend), bytes_(bytes) {}

  template <typename T>
  void device(T*& out, std::uint64_t count) {
    out = static_cast<T*>(take(count * sizeof(T), false));
  }
  template <typename T>
  void staging(T*& out, std::uint64_t count) {
    out = static_cast<T*>(take(count * sizeof(T), true));
  }
  void matrix(ops::Matrix& m, int rows, int cols, DType dtype) {
    m = {.dtype = dtype, .rows = rows, .cols = cols, .pitch = backend_.pitch(cols, dtype)};
    m.data = take(static_cast<std::uint64_t>(rows) * static_cast<std::uint64_t>(m.pitch) * dtype_size(dtype),
                  false);
  }
  void block(ops::BlockScratch& s, int rows, int width, int mlp, int heads, int kv_heads, int head_dim) {
    const DType dtype = backend_.activation_dtype();
    matrix(s.normed, rows, width, dtype);
    matrix(s.qkv, rows, (heads + 2 * kv_heads) * head_dim, DType::kF32);
    s.q = take(backend_.query_bytes(rows, heads, head_dim), false);
    matrix(s.attended, rows, heads * head_dim, dtype);
    matrix(s.hidden, rows, mlp, dtype);
  }
  void cache(ops::KvCache& c, int layers, int slots, int keys, int kv_heads, int head_dim) {
    c = {.layers = layers,
         .slots = slots,
         .keys = keys,
         .kv_heads = kv_heads,
         .head_dim = head_dim,
         .dtype = backend_.cache_dtype()};
    c.bytes = backend_.cache_bytes(c);
    c.data = take(c.bytes, false);
  }
  const Status& status() const { return status_; }

 private:
  void* take(std::uint64_t bytes, bool staging) {
    if (!status_.ok()) return nullptr;
    Result<void*> memory = staging ? backend_.allocate_staging(bytes) : backend_.allocate(bytes);
    if (!memory.ok()) {
      status_ = memory.status();
      return nullptr;
    }
    bytes_ += bytes;
    return *memory;
  }
  ops::Backend& backend_;
  std::uint64_t& bytes_;
  Status status_;
};

// Places the inputs in a block that begins at `block` (null: nowhere); its size without tables.
std::uint64_t lay_out(Inputs& in, std::byte* block, bool raw, const weights::Architecture& a,
                      const Capacity& capacity) {
  std::uint64_t used = 0;
  const auto take = [&]<typename T>(T*& out, int count) {
    constexpr std::uint64_t kAlignment = 256;
    out = block == nullptr ? nullptr : reinterpret_cast<T*>(block + used);
    used += (static_cast<std::uint64_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
  };
  const int pictures = capacity.batch * capacity.pictures, text = capacity.batch * a.max_tokens;
  take(in.counts, 1);
  take(in.segments, pictures + 2 * capacity.batch);
  take(in.alone, pictures);
  take(in.vision_map, pictures * a.vision.tokens());
  take(in.text_map, text);
  take(in.actions, capacity.batch * a.horizon * a.action_dim);
  if (raw) {
    take(in.ids, text);
    take(in.frames, pictures);
    take(in.tables, 0);
  }
  return used;
}

}  // namespace

std::uint64_t packed_parameters(const weights::Architecture& a, bool token_table) {
  const std::string last = weights::kLanguagePrefix + ("layers." + std::to_string(a.prefix.depth - 1) + ".");
  std::uint64_t total = 0;
  for (const weights::TensorSpec& t : weights::manifest(a)) {
    const bool dead = (t.name == weights::kTokenTable && !token_table) ||
                      t.name == std::string(weights::kLanguagePrefix) + "norm.weight" ||
                      t.name.starts_with(last + "mlp.") || t.name.starts_with(last + "post_") ||
                      t.name == last + "self_attn.o_proj.weight";
    if (!dead) total += static_cast<std::uint64_t>(t.shape.elements());
  }
  return total;
}

Result<Workspace> plan_workspace(ops::Backend& backend, const weights::Architecture& a,
                                 const Capacity& capacity) {
  Workspace w;
  Planner plan(backend, w.bytes);
  const int batch = capacity.batch, pictures = batch * capacity.pictures, tokens = a.vision.tokens();
  const int vision_rows = pictures * tokens, text_rows = batch * a.max_tokens;
  const int request_rows = capacity.pictures * tokens + a.max_tokens, prefix_rows = batch * request_rows;
  const int suffix_rows = batch * a.horizon, keys = request_rows + a.horizon;
  const auto pixels =
      static_cast<std::uint64_t>(pictures) * static_cast<std::uint64_t>(a.vision.image * a.vision.image) * 3;
  const auto text = static_cast<std::uint64_t>(text_rows) * static_cast<std::uint64_t>(a.prefix.width);
  const DType f32 = DType::kF32;

  const bool raw = backend.takes_raw_inputs();
  w.input_bytes = lay_out(w.staged, nullptr, raw, a, capacity);
  if (raw) {
    w.table_bytes = static_cast<std::uint64_t>(pictures) * ops::max_table_bytes(a.vision.image);
    w.pixel_bytes = static_cast<std::uint64_t>(pictures) * ops::max_pixel_bytes(a.vision.image);
  }
  std::byte *staged = nullptr, *device = nullptr;
  plan.staging(staged, w.input_bytes + w.table_bytes);
  plan.device(device, w.input_bytes + w.table_bytes + w.pixel_bytes);
  SF_RETURN_IF_ERROR(plan.status());
  lay_out(w.staged, staged, raw, a, capacity);
  lay_out(w.device, device, raw, a, capacity);
  plan.device(w.pixels, pixels);
  if (!raw) {
    plan.staging(w.staged_pixels, pixels);
    plan.staging(w.staged_text, text);
    // Gathered rows come densely from the host, so that one copy moves them all.
    plan.device(reinterpret_cast<float*&>(w.text.data), text);
    w.text = {.data = w.text.data, .rows = text_rows, .cols = a.prefix.width, .pitch = a.prefix.width};
  }
  const Counts* counts = w.device.counts;
  const ops::Segment* segments = w.device.segments;
  w.picture_count = {pictures, &counts->pictures};
  w.vision_rows = {vision_rows, &counts->vision_rows};
  w.text_rows = {text_rows, &counts->text_rows};
  w.prefix_rows = {prefix_rows, &counts->prefix_rows};
  w.suffix_rows = {suffix_rows, &counts->suffix_rows};
  const ops::Count requests{batch, &counts->requests};
  w.picture_segments = {segments, w.picture_count, tokens, tokens};
  w.prefix_segments = {segments + pictures, requests, request_rows, request_rows};
  w.suffix_segments = {segments + pictures + batch, requests, a.horizon, keys};

  const bool in_parts = backend.prefers_parts();
  plan.matrix(w.patches, vision_rows, (in_parts ? 9 : 3) * a.vision.patch * a.vision.patch,
              in_parts ? DType::kBF16 : f32);
  plan.matrix(w.vision_x, vision_rows, a.vision.width, f32);
  plan.matrix(w.prefix_x, prefix_rows, a.prefix.width, f32);
  w.actions = {.data = w.device.actions, .rows = suffix_rows, .cols = a.action_dim, .pitch = a.action_dim};
  plan.device(reinterpret_cast<float*&>(w.velocity.data),
              static_cast<std::uint64_t>(suffix_rows) * static_cast<std::uint64_t>(a.action_dim));
  w.velocity = {.data = w.velocity.data, .rows = suffix_rows, .cols = a.action_dim, .pitch = a.action_dim};
  plan.matrix(w.suffix_x, suffix_rows, a.expert.width, f32);
  plan.matrix(w.final_normed, suffix_rows, a.expert.width, f32);
  plan.block(w.vision, vision_rows, a.vision.width, a.vision.mlp, a.vision.heads, a.vision.heads,
             a.vision.head_dim());
  plan.block(w.prefix, prefix_rows, a.prefix.width, a.prefix.mlp, a.prefix.heads, a.prefix.kv_heads,
             a.prefix.head_dim);
  plan.block(w.suffix, suffix_rows, a.expert.width, a.expert.mlp, a.expert.heads, a.expert.kv_heads,
             a.expert.head_dim);
  plan.cache(w.picture_cache, 1, pictures, tokens, a.vision.heads, a.vision.head_dim());
  plan.cache(w.prefix_cache, a.prefix.depth, batch, keys, a.prefix.kv_heads, a.prefix.head_dim);

  const int half = a.prefix.head_dim / 2;
  float *cos = nullptr, *sin = nullptr;
  const std::uint64_t angles = static_cast<std::uint64_t>(keys) * static_cast<std::uint64_t>(half);
  plan.device(cos, angles);
  plan.device(sin, angles);
  SF_RETURN_IF_ERROR(plan.status());

  std::vector<float> cosines(angles), sines(angles);
  for (int position = 0; position < keys; ++position)
    for (int i = 0; i < half; ++i) {
      const double angle = position * std::pow(10000.0, -static_cast<double>(i) / half);
      const auto at =
          static_cast<std::size_t>(position) * static_cast<std::size_t>(half) + static_cast<std::size_t>(i);
      cosines[at] = static_cast<float>(std::cos(angle));
      sines[at] = static_cast<float>(std::sin(angle));
    }
  backend.upload(cos, cosines.data(), angles * sizeof(float));
  backend.upload(sin, sines.data(), angles * sizeof(float));
  SF_RETURN_IF_ERROR(backend.finish());
  w.rope = {cos, sin, keys, half};
  return w;
}

stages::VisionRun vision_run(const Workspace& w) {
  return {.frames = w.device.frames,
          .data = w.device.tables,
          .pixels = w.pixels,
          .pictures = w.picture_count,
          .rows = w.vision_rows,
          .segments = w.picture_segments,
          .alone = w.device.alone,
          .cache = &w.picture_cache,
          .patches = w.patches,
          .x = w.vision_x,
          .scratch = w.vision,
          .out = w.prefix_x,
          .row_map = w.device.vision_map};
}

}  // namespace servoflow::policy
