#include "toolkit/plan_work.h"

namespace servoflow::toolkit {
namespace {

std::uint64_t u(int x) { return static_cast<std::uint64_t>(x); }

double sum(const StageParts& stage, double ComponentWork::*field) {
  double total = 0;
  for (const ComponentWork& c : stage.components) total += c.*field;
  return total;
}

// `rows` pass through `weights`.
ComponentWork product(const std::string& name, std::uint64_t weights, double rows) {
  return {.name = name, .weights = weights, .products = 2.0 * static_cast<double>(weights) * rows};
}

// Projections and MLP of a Gemma; `rest` is the number of layers that go on after their K and V.
std::vector<ComponentWork> gemma(const std::string& stage, const weights::GemmaSizes& g, int rest,
                                 double rows, double keys) {
  const std::uint64_t queries = u(g.width) * u(g.heads) * u(g.head_dim),
                      kv = 2 * u(g.width) * u(g.kv_heads) * u(g.head_dim);
  // A layer that ends at its K and V does not make queries either.
  return {product(stage + "/qkv", u(g.depth) * kv + u(rest) * queries, rows),
          {.name = stage + "/attention", .attention = 4.0 * rows * keys * g.heads * g.head_dim * rest},
          product(stage + "/out", u(rest) * queries, rows),
          product(stage + "/mlp", u(rest) * 3 * u(g.width) * u(g.mlp), rows)};
}

void add(StageParts& sum, const StageParts& part) {
  for (std::size_t i = 0; i < sum.components.size(); ++i) {
    sum.components[i].products += part.components[i].products;
    sum.components[i].attention += part.components[i].attention;
    sum.components[i].cached += part.components[i].cached;
  }
}

}  // namespace

std::uint64_t StageParts::weights() const {
  std::uint64_t total = 0;
  for (const ComponentWork& c : components) total += c.weights;
  return total;
}
double StageParts::products() const { return sum(*this, &ComponentWork::products); }
double StageParts::attention() const { return sum(*this, &ComponentWork::attention); }
double StageParts::cached() const { return sum(*this, &ComponentWork::cached); }

PlanWork count_components(const weights::Architecture& a, const WorkShape& shape) {
  const weights::VisionSizes& v = a.vision;
  const weights::GemmaSizes &p = a.prefix, &e = a.expert;
  const double batch = shape.batch, picture = v.tokens(), pictures = batch * shape.views;
  const double rows = shape.views * picture + shape.tokens;
  const std::uint64_t square = u(v.width) * u(v.width);

  PlanWork out;
  out.vision = {
      .name = "vision",
      .components = {product("vision/patches", u(v.patch) * u(v.patch) * 3 * u(v.width), pictures * picture),
                     product("vision/qkv", u(v.depth) * 3 * square, pictures * picture),
                     {.name = "vision/attention",
                      .attention = 4.0 * pictures * picture * picture * v.width * v.depth},
                     product("vision/out", u(v.depth) * square, pictures * picture),
                     product("vision/mlp", u(v.depth) * 2 * u(v.width) * u(v.mlp), pictures * picture),
                     product("vision/projector", u(v.width) * u(p.width), pictures * picture)},
      .layers = v.depth};
  const double cached = batch * rows * 2.0 * p.kv_heads * p.head_dim * p.depth;
  out.prefix = {
      .name = "prefix", .components = gemma("prefix", p, p.depth - 1, batch * rows, rows), .layers = p.depth};
  out.prefix.components[0].cached = cached;
  const double horizon = shape.horizon, actions = batch * horizon;
  out.step = {
      .name = "step", .components = gemma("denoise", e, e.depth, actions, rows + horizon), .layers = e.depth};
  out.step.components[1].cached = cached;
  out.step.components.push_back(product("denoise/projection", 2 * u(a.action_dim) * u(e.width), actions));
  out.modulation_weights = u(2 * e.depth + 1) * 3 * u(e.width) * u(e.width) + 2 * u(e.width) * u(e.width);
  return out;
}

PlanWork count_components(const weights::Architecture& a, std::span<const WorkShape> requests) {
  PlanWork out;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    const PlanWork one = count_components(a, requests[i]);
    if (i == 0) {
      out = one;
      continue;
    }
    add(out.vision, one.vision);
    add(out.prefix, one.prefix);
    add(out.step, one.step);
  }
  return out;
}

}  // namespace servoflow::toolkit
