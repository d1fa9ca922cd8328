#include "toolkit/work.h"

#include <utility>

namespace servoflow::toolkit {
namespace {

std::uint64_t u(int x) { return static_cast<std::uint64_t>(x); }

// Weights of one Gemma layer's Q and O projections and its MLP, and of K and V alone.
std::uint64_t gemma_rest(const weights::GemmaSizes& g) {
  return 2 * u(g.width) * u(g.heads) * u(g.head_dim) + 3 * u(g.width) * u(g.mlp);
}
std::uint64_t gemma_kv(const weights::GemmaSizes& g) {
  return 2 * u(g.width) * u(g.kv_heads) * u(g.head_dim);
}

StageWork scaled(const StageWork& w, double n) {
  return {w.weights, w.flops * n, w.weight_bytes * n, w.cache_bytes * n};
}

// What follows from vision, prefix and one step.
void sum_up(Work& w, int steps) {
  w.denoise = scaled(w.step, steps);
  w.all = {.weights = w.vision.weights + w.prefix.weights + w.step.weights};
  for (const StageWork* s : {&w.vision, &w.prefix, &w.denoise}) {
    w.all.flops += s->flops;
    w.all.weight_bytes += s->weight_bytes;
    w.all.cache_bytes += s->cache_bytes;
  }
}

}  // namespace

Work count_work(const weights::Architecture& a, const WorkShape& shape, double weight_size,
                double cache_size) {
  Work out;
  const double batch = shape.batch, views = shape.views;
  const weights::VisionSizes& v = a.vision;
  const weights::GemmaSizes& p = a.prefix;
  const weights::GemmaSizes& e = a.expert;

  const double picture = v.tokens();
  const std::uint64_t patch = u(v.patch) * u(v.patch) * 3;
  const std::uint64_t block = 4 * u(v.width) * u(v.width) + 2 * u(v.width) * u(v.mlp);
  out.vision.weights = patch * u(v.width) + u(v.depth) * block + u(v.width) * u(p.width);
  out.vision.flops = batch * views * picture *
                     (2.0 * static_cast<double>(out.vision.weights) + 4.0 * picture * v.width * v.depth);
  out.vision.weight_bytes = static_cast<double>(out.vision.weights) * weight_size;

  const double rows = views * picture + shape.tokens;
  const double cached = rows * 2.0 * p.kv_heads * p.head_dim * p.depth * cache_size * batch;
  out.prefix.weights = u(p.depth) * gemma_kv(p) + u(p.depth - 1) * gemma_rest(p);
  out.prefix.flops =
      batch * rows *
      (2.0 * static_cast<double>(out.prefix.weights) + 4.0 * rows * p.heads * p.head_dim * (p.depth - 1));
  out.prefix.weight_bytes = static_cast<double>(out.prefix.weights) * weight_size;
  out.prefix.cache_bytes = cached;

  out.step.weights = u(e.depth) * (gemma_kv(e) + gemma_rest(e)) + 2 * u(a.action_dim) * u(e.width);
  out.step.flops = batch * shape.horizon *
                   (2.0 * static_cast<double>(out.step.weights) +
                    4.0 * (rows + shape.horizon) * e.heads * e.head_dim * e.depth);
  out.step.weight_bytes = static_cast<double>(out.step.weights) * weight_size;
  out.step.cache_bytes = cached;
  out.modulation_weights = u(2 * e.depth + 1) * 3 * u(e.width) * u(e.width) + 2 * u(e.width) * u(e.width);

  sum_up(out, shape.steps);
  return out;
}

Work count_batch(const weights::Architecture& a, std::span<const WorkShape> requests, double weight_size,
                 double cache_size) {
  Work out;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    const Work one = count_work(a, requests[i], weight_size, cache_size);
    if (i == 0) {
      out = one;
      continue;
    }
    for (const auto& [sum, part] : {std::pair(&out.vision, &one.vision), std::pair(&out.prefix, &one.prefix),
                                    std::pair(&out.step, &one.step)}) {
      sum->flops += part->flops;
      sum->cache_bytes += part->cache_bytes;
    }
  }
  if (!requests.empty()) sum_up(out, requests[0].steps);
  return out;
}

Json work_to_json(const StageWork& w) {
  return {{"weights", w.weights},
          {"gflop", w.flops / 1e9},
          {"weight_gb", w.weight_bytes / 1e9},
          {"cache_gb", w.cache_bytes / 1e9}};
}

}  // namespace servoflow::toolkit
