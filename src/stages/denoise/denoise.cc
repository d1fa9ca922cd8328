#include "stages/denoise/denoise.h"

#include "core/status_macros.h"

namespace servoflow::stages {
namespace {
const std::string kExpert = "paligemma_with_expert.gemma_expert.model.";
constexpr std::size_t kSchedules = 4;  // kept at once
}  // namespace

std::vector<float> time_grid(int steps, weights::TimeGrid grid) {
  std::vector<float> times(static_cast<std::size_t>(steps));
  const float dt = static_cast<float>(-1.0 / steps);
  float t = 1.0f;
  for (int j = 0; j < steps; ++j) {
    times[static_cast<std::size_t>(j)] =
        grid == weights::TimeGrid::kAccumulated ? t : static_cast<float>(1.0 + j * (-1.0 / steps));
    t += dt;
  }
  return times;
}

Result<Denoise> Denoise::load(weights::Loader& loader, const weights::Architecture& architecture,
                              int requests) {
  const bool few_rows = requests <= loader.backend().requests_at_once();
  Denoise d;
  d.architecture_ = architecture;
  const int depth = architecture.expert.depth;
  const auto modulation = [&](const std::string& norm) -> Status {
    SF_ASSIGN_OR_RETURN(const ops::Weight w, loader.matrix({norm + ".dense.weight"}, {.keep_float32 = true}));
    SF_ASSIGN_OR_RETURN(const float* bias, loader.vector(norm + ".dense.bias"));
    d.modulation_.push_back(w);
    d.modulation_bias_.push_back(bias);
    return {};
  };
  for (int i = 0; i < depth; ++i) {
    const std::string layer = kExpert + "layers." + std::to_string(i) + ".";
    const std::string attention = layer + "self_attn.";
    ops::GemmaWeights w;
    SF_RETURN_IF_ERROR(modulation(layer + "input_layernorm"));
    SF_ASSIGN_OR_RETURN(
        w.qkv,
        loader.matrix(
            {attention + "q_proj.weight", attention + "k_proj.weight", attention + "v_proj.weight"},
            {.mode = ops::PackMode::kHeads, .head_dim = architecture.expert.head_dim, .few_rows = few_rows}));
    SF_ASSIGN_OR_RETURN(w.out, loader.matrix({attention + "o_proj.weight"}, {.few_rows = few_rows}));
    SF_RETURN_IF_ERROR(modulation(layer + "post_attention_layernorm"));
    SF_ASSIGN_OR_RETURN(w.gate_up,
                        loader.matrix({layer + "mlp.gate_proj.weight", layer + "mlp.up_proj.weight"},
                                      {.mode = ops::PackMode::kInterleave, .few_rows = few_rows}));
    SF_ASSIGN_OR_RETURN(w.down, loader.matrix({layer + "mlp.down_proj.weight"}, {.few_rows = few_rows}));
    d.layers_.push_back(w);
  }
  SF_RETURN_IF_ERROR(modulation(kExpert + "norm"));
  ops::ExpertWeights& e = d.expert_;
  e.depth = depth;
  e.width = architecture.expert.width;
  e.heads = architecture.expert.heads;
  SF_ASSIGN_OR_RETURN(e.action_in, loader.matrix({"action_in_proj.weight"}, {.keep_float32 = true}));
  SF_ASSIGN_OR_RETURN(e.action_in_bias, loader.vector("action_in_proj.bias"));
  SF_ASSIGN_OR_RETURN(e.action_out, loader.matrix({"action_out_proj.weight"}, {.keep_float32 = true}));
  SF_ASSIGN_OR_RETURN(e.action_out_bias, loader.vector("action_out_proj.bias"));
  SF_ASSIGN_OR_RETURN(d.time_in_, loader.matrix({"time_mlp_in.weight"}, {.keep_float32 = true}));
  SF_ASSIGN_OR_RETURN(d.time_in_bias_, loader.vector("time_mlp_in.bias"));
  SF_ASSIGN_OR_RETURN(d.time_out_, loader.matrix({"time_mlp_out.weight"}, {.keep_float32 = true}));
  SF_ASSIGN_OR_RETURN(d.time_out_bias_, loader.vector("time_mlp_out.bias"));
  return d;
}

Result<const Schedule*> Denoise::schedule(ops::Backend& backend, int steps) {
  if (steps < 1 || steps > kMaxSteps)
    return Status::invalid("steps: " + std::to_string(steps) + " Euler steps; choose 1 to " +
                           std::to_string(kMaxSteps));
  Cached* oldest = nullptr;
  for (const auto& cached : cache_) {
    if (cached->schedule.steps == steps) {
      cached->used = ++clock_;
      return &cached->schedule;
    }
    if (oldest == nullptr || cached->used < oldest->used) oldest = cached.get();
  }
  if (cache_.size() < kSchedules) {
    auto fresh = std::make_unique<Cached>();
    const int width = expert_.width;
    const std::uint64_t row = static_cast<std::uint64_t>(width) * sizeof(float);
    const auto matrix = [&](ops::Matrix& m) -> Status {
      m = {.rows = kMaxSteps, .cols = width, .pitch = width};
      SF_ASSIGN_OR_RETURN(m.data, backend.allocate(kMaxSteps * row));
      return {};
    };
    SF_RETURN_IF_ERROR(matrix(fresh->features));
    SF_RETURN_IF_ERROR(matrix(fresh->hidden));
    SF_RETURN_IF_ERROR(matrix(fresh->schedule.condition));
    SF_ASSIGN_OR_RETURN(void* times, backend.allocate(kMaxSteps * sizeof(float)));
    SF_ASSIGN_OR_RETURN(void* table, backend.allocate(kMaxSteps * modulation_.size() * 3 * row));
    fresh->times = static_cast<float*>(times);
    fresh->table = static_cast<float*>(table);
    fresh->schedule.slot = static_cast<int>(cache_.size());
    cache_.push_back(std::move(fresh));
    oldest = cache_.back().get();
  }
  oldest->schedule.steps = 0;  // nothing valid until computed
  SF_RETURN_IF_ERROR(compute(backend, *oldest, steps));
  oldest->used = ++clock_;
  return &oldest->schedule;
}

Status Denoise::compute(ops::Backend& backend, Cached& cached, int steps) const {
  Schedule& s = cached.schedule;
  const int width = expert_.width, sites = static_cast<int>(modulation_.size());
  s.dt = static_cast<float>(-1.0 / steps);
  s.times = time_grid(steps, architecture_.time_grid);
  backend.upload(cached.times, s.times.data(), s.times.size() * sizeof(float));
  backend.time_embedding({.times = cached.times,
                          .steps = steps,
                          .width = width,
                          .min_period = architecture_.min_period,
                          .max_period = architecture_.max_period,
                          .out = cached.features});
  backend.matmul({.x = cached.features,
                  .w = &time_in_,
                  .y = cached.hidden,
                  .rows = {steps},
                  .epilogue = {.bias = time_in_bias_, .activation = ops::Activation::kSilu},
                  .zone = "denoise/time"});
  backend.matmul({.x = cached.hidden,
                  .w = &time_out_,
                  .y = s.condition,
                  .rows = {steps},
                  .epilogue = {.bias = time_out_bias_, .activation = ops::Activation::kSilu},
                  .zone = "denoise/time"});
  const std::int64_t step_pitch = static_cast<std::int64_t>(sites) * 3 * width;
  for (int site = 0; site < sites; ++site) {
    const auto i = static_cast<std::size_t>(site);
    const ops::Matrix out{.data = cached.table + static_cast<std::int64_t>(site) * 3 * width,
                          .rows = kMaxSteps,
                          .cols = 3 * width,
                          .pitch = step_pitch};
    backend.matmul({.x = s.condition,
                    .w = &modulation_[i],
                    .y = out,
                    .rows = {steps},
                    .epilogue = {.bias = modulation_bias_[i]},
                    .zone = "denoise/modulation"});
  }
  s.modulation = {.table = cached.table, .step_pitch = step_pitch, .width = width};
  ops::ExpertWeights expert = expert_;
  expert.layers = layers_.data();
  backend.prepare_schedule(expert, s.modulation, steps);
  SF_RETURN_IF_ERROR(backend.finish());
  s.steps = steps;
  return {};
}

void Denoise::run(ops::Backend& backend, const Schedule& schedule, const DenoiseRun& run, int first,
                  int count) const {
  ops::ExpertWeights expert = expert_;
  expert.layers = layers_.data();
  backend.denoise_loop({.step = {.weights = &expert,
                                 .actions = run.actions,
                                 .velocity = run.velocity,
                                 .rows = run.rows,
                                 .segments = run.segments,
                                 .cache = run.cache,
                                 .rope = run.rope,
                                 .modulation = schedule.modulation,
                                 .x = run.x,
                                 .scratch = run.scratch,
                                 .final_normed = run.final_normed},
                        .first = first,
                        .steps = count,
                        .dt = schedule.dt});
}

}  // namespace servoflow::stages
