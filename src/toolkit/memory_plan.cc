#include "toolkit/memory_plan.h"

#include <fmt/format.h>

#include "ops/backend.h"
#include "policy/plan.h"
#include "weights/manifest.h"

namespace servoflow::toolkit {
namespace {

// The last prefix layer ends at its K and V: the rest of its weights is never packed.
bool is_dead(const std::string& name, const weights::Architecture& a) {
  const std::string language = weights::kLanguagePrefix;
  const std::string last = language + "layers." + std::to_string(a.prefix.depth - 1) + ".";
  return name == language + "norm.weight" || name.starts_with(last + "self_attn.o_proj") ||
         name.starts_with(last + "mlp.") || name.starts_with(last + "post_attention_layernorm");
}

// Matrices that compute in float32 at every precision.
bool stays_float32(const std::string& name) {
  return name.ends_with("dense.weight") || name.starts_with("action_") || name.starts_with("time_mlp_") ||
         name.find("patch_embedding") != std::string::npos ||
         name.find("position_embedding") != std::string::npos;
}

}  // namespace

std::uint64_t packed_weight_bytes(const weights::Architecture& a, double matrix_size) {
  double bytes = 0;
  for (const weights::TensorSpec& t : weights::manifest(a)) {
    if (t.name == weights::kTokenTable || is_dead(t.name, a)) continue;
    const bool wide = t.shape.rank() < 2 || stays_float32(t.name);
    bytes += static_cast<double>(t.shape.elements()) * (wide ? 4 : matrix_size);
  }
  return static_cast<std::uint64_t>(bytes);
}

std::vector<MemoryPlan> plan_memory(const weights::Architecture& a, int pictures, double stored_size) {
  std::vector<MemoryPlan> out;
  for (const char* precision : {"fp32", "bf16"}) {
    MemoryPlan plan{.precision = precision};
    plan.token_table =
        static_cast<std::uint64_t>(static_cast<double>(a.vocab) * a.prefix.width * stored_size);
    // The engine's own plan, on memory nobody touches. A CPU without BF16 arithmetic keeps BF16 weights as
    // float32.
    Result<ops::BackendChoice> backend =
        ops::make_backend({.device = "cpu", .precision = precision, .threads = 1});
    const bool narrow =
        backend.ok() ? backend->backend->activation_dtype() == DType::kBF16 : plan.precision == "bf16";
    plan.weights = packed_weight_bytes(a, narrow ? 2 : 4);
    if (!backend.ok()) {
      plan.unavailable = backend.status().message();
    } else if (const Result<policy::Workspace> w =
                   policy::plan_workspace(*backend->backend, a, {1, pictures});
               w.ok()) {
      plan.workspace = w->bytes;
    } else {
      plan.unavailable = w.status().message();
    }
    out.push_back(std::move(plan));
  }
  return out;
}

Json memory_to_json(const std::vector<MemoryPlan>& plans) {
  Json out = Json::array();
  for (const MemoryPlan& p : plans)
    out.push_back({{"precision", p.precision},
                   {"weights_bytes", p.weights},
                   {"workspace_bytes", p.workspace},
                   {"total_bytes", p.total()},
                   {"token_table_mapped_bytes", p.token_table},
                   {"unavailable", p.unavailable.empty() ? Json(nullptr) : Json(p.unavailable)}});
  return out;
}

std::string bytes_text(double bytes) {
  constexpr const char* kUnits[] = {"B", "kB", "MB", "GB", "TB"};
  int unit = 0;
  while (bytes >= 999.5 && unit < 4) {
    bytes /= 1000;
    ++unit;
  }
  return fmt::format("{:.3g} {}", bytes, kUnits[unit]);
}

}  // namespace servoflow::toolkit
