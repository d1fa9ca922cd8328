#include "toolkit/linears.h"

#include <cassert>
#include <cmath>

#include "core/status_macros.h"
#include "ops/host_rows.h"
#include "weights/manifest.h"

namespace servoflow::toolkit {
namespace {

constexpr char kWeight[] = ".weight";

bool is_linear(const weights::TensorSpec& spec) {
  return spec.shape.rank() == 2 && spec.name.ends_with(kWeight) && spec.name != weights::kTokenTable &&
         spec.name.find("position_embedding") == std::string::npos;
}

void add_gemma(const std::string& base, const std::string& other, const weights::GemmaSizes& g, bool adaptive,
               std::vector<Site>& out) {
  const Producer norm = adaptive ? Producer::kAdaRms : Producer::kRmsNorm;
  for (int i = 0; i < g.depth; ++i) {
    const std::string layer = base + "layers." + std::to_string(i) + ".", attention = layer + "self_attn.",
                      mlp = layer + "mlp.";
    out.push_back({.linears = {attention + "q_proj", attention + "k_proj", attention + "v_proj"},
                   .width = g.width,
                   .producer = norm,
                   .producer_name = layer + "input_layernorm"});
    Site output{.linears = {attention + "o_proj"},
                .width = g.heads * g.head_dim,
                .producer = Producer::kLinear,
                .producer_name = attention + "v_proj"};
    const std::string others = other + "layers." + std::to_string(i) + ".self_attn.";
    output.other_producer = others + "v_proj";
    output.other_linear = others + "o_proj";
    for (int c = 0; c < output.width; ++c) {
      const int head = c / g.head_dim, shared = head / (g.heads / g.kv_heads);
      output.tie.push_back(shared * g.head_dim + c % g.head_dim);
    }
    out.push_back(std::move(output));
    out.push_back({.linears = {mlp + "gate_proj", mlp + "up_proj"},
                   .width = g.width,
                   .producer = norm,
                   .producer_name = layer + "post_attention_layernorm"});
    out.push_back({.linears = {mlp + "down_proj"},
                   .width = g.mlp,
                   .producer = Producer::kLinear,
                   .producer_name = mlp + "up_proj"});
  }
}

}  // namespace

std::vector<quant::Linear> linear_layers(const weights::Architecture& architecture) {
  std::vector<quant::Linear> out;
  for (const weights::TensorSpec& spec : weights::manifest(architecture))
    if (is_linear(spec))
      out.push_back(
          {spec.name.substr(0, spec.name.size() - (sizeof(kWeight) - 1)), spec.shape[0], spec.shape[1]});
  return out;
}

std::vector<Site> sites(const weights::Architecture& a) {
  std::vector<Site> out;
  const std::string vision = weights::kVisionPrefix;
  for (int i = 0; i < a.vision.depth; ++i) {
    const std::string layer = vision + "encoder.layers." + std::to_string(i) + ".",
                      attention = layer + "self_attn.";
    out.push_back({.linears = {attention + "q_proj", attention + "k_proj", attention + "v_proj"},
                   .width = a.vision.width,
                   .producer = Producer::kLayerNorm,
                   .producer_name = layer + "layer_norm1",
                   .producer_bias = true});
    out.push_back({.linears = {attention + "out_proj"},
                   .width = a.vision.width,
                   .producer = Producer::kLinear,
                   .producer_name = attention + "v_proj",
                   .producer_bias = true});
    out.push_back({.linears = {layer + "mlp.fc1"},
                   .width = a.vision.width,
                   .producer = Producer::kLayerNorm,
                   .producer_name = layer + "layer_norm2",
                   .producer_bias = true});
    out.push_back({.linears = {layer + "mlp.fc2"}, .width = a.vision.mlp});
  }
  std::string projector = weights::kProjectorPrefix;
  projector.pop_back();
  out.push_back({.linears = {projector},
                 .width = a.vision.width,
                 .producer = Producer::kLayerNorm,
                 .producer_name = vision + "post_layernorm",
                 .producer_bias = true});
  add_gemma(weights::kLanguagePrefix, weights::kExpertPrefix, a.prefix, false, out);
  add_gemma(weights::kExpertPrefix, weights::kLanguagePrefix, a.expert, true, out);
  return out;
}

void EditedSource::multiply(std::vector<float>& into, std::span<const float> m) {
  if (into.empty()) into.assign(m.size(), 1.0f);
  for (std::size_t i = 0; i < m.size(); ++i) into[i] *= m[i];
}

Status EditedSource::fold(const Site& site, std::span<const float> m) {
  const std::string where = site.linears.empty() ? std::string("site") : site.linears.front();
  if (m.size() != static_cast<std::size_t>(site.width))
    return Status::invalid(where + ": " + std::to_string(m.size()) + " multipliers for " +
                           std::to_string(site.width) + " channels");
  if (site.producer == Producer::kNone)
    return Status::invalid(where + ": nothing in front of it can take a multiplier of its inputs");
  std::vector<float> rows;  // of the producer
  if (site.tie.empty()) rows.assign(m.begin(), m.end());
  for (std::size_t c = 0; c < m.size(); ++c) {
    if (!(m[c] > 0) || !std::isfinite(m[c]) || !std::isfinite(1.0f / m[c]))
      return Status::invalid(where + ": multiplier " + std::to_string(m[c]) + " of channel " +
                             std::to_string(c));
    if (site.tie.empty()) continue;
    const auto row = static_cast<std::size_t>(site.tie[c]);
    if (rows.size() <= row) rows.resize(row + 1, 0.0f);
    if (rows[row] != 0 && rows[row] != m[c])
      return Status::invalid(where + ": channel " + std::to_string(c) +
                             " shares its producer's row with one that has another multiplier");
    rows[row] = m[c];
  }
  const std::size_t n = rows.size();
  switch (site.producer) {
    case Producer::kRmsNorm: {
      Edit& e = edits_[site.producer_name + kWeight];
      e.offset.assign(n, 1.0f);
      multiply(e.rows, rows);
      break;
    }
    case Producer::kAdaRms: {  // rows of scale, shift, gate; 1 + scale and shift are multiplied, the gate is
                               // not
      std::vector<float> all(rows);
      all.insert(all.end(), rows.begin(), rows.end());
      all.resize(3 * n, 1.0f);
      multiply(edits_[site.producer_name + ".dense.weight"].rows, all);
      Edit& bias = edits_[site.producer_name + ".dense.bias"];
      bias.offset.assign(n, 1.0f);
      bias.offset.resize(3 * n, 0.0f);
      multiply(bias.rows, all);
      break;
    }
    case Producer::kLayerNorm:
    case Producer::kLinear:
      multiply(edits_[site.producer_name + kWeight].rows, rows);
      if (site.producer_bias) multiply(edits_[site.producer_name + ".bias"].rows, rows);
      if (!site.other_producer.empty()) multiply(edits_[site.other_producer + kWeight].rows, rows);
      break;
    case Producer::kNone:
      break;
  }
  std::vector<float> inverse(m.begin(), m.end());
  for (float& v : inverse) v = 1.0f / v;
  for (const std::string& linear : site.linears) multiply(edits_[linear + kWeight].columns, inverse);
  if (!site.other_linear.empty()) multiply(edits_[site.other_linear + kWeight].columns, inverse);
  return {};
}

Result<std::vector<float>> EditedSource::values(const std::string& name) const {
  if (const auto it = replaced_.find(name); it != replaced_.end()) return it->second;
  const auto it = edits_.find(name);
  return read(name, it == edits_.end() ? nullptr : &it->second);
}

Result<std::vector<float>> EditedSource::original(const std::string& name) const {
  return read(name, nullptr);
}

void EditedSource::unfold(const std::string& name, std::span<float> values) const {
  const auto it = edits_.find(name);
  if (it == edits_.end()) return;
  const Edit& e = it->second;
  assert(e.offset.empty() && !(e.rows.empty() && e.columns.empty()));
  const std::size_t cols = e.columns.empty() ? values.size() / e.rows.size() : e.columns.size();
  for (std::size_t i = 0; i < values.size(); ++i) {
    const double row = e.rows.empty() ? 1 : static_cast<double>(e.rows[i / cols]);
    const double column = e.columns.empty() ? 1 : static_cast<double>(e.columns[i % cols]);
    values[i] = static_cast<float>(static_cast<double>(values[i]) / (row * column));
  }
}

Result<std::vector<float>> EditedSource::read(const std::string& name, const Edit* edit) const {
  SF_ASSIGN_OR_RETURN(const weights::TensorData stored, base_->get(name));
  const std::int64_t elements = stored.shape.elements();
  const std::int64_t rows = stored.shape.rank() > 0 ? stored.shape[0] : 1;
  const auto cols = static_cast<std::size_t>(rows > 0 ? elements / rows : 0);
  std::vector<float> out(static_cast<std::size_t>(elements));
  const ops::HostMatrix host{stored.dtype, static_cast<int>(rows), static_cast<int>(cols), stored.bytes,
                             name};
  for (std::size_t r = 0; r < static_cast<std::size_t>(rows); ++r) {
    float* row = out.data() + r * cols;
    SF_RETURN_IF_ERROR(ops::read_row(host, static_cast<int>(r), row));
    if (edit == nullptr) continue;
    const Edit& e = *edit;
    const float offset = e.offset.empty() ? 0 : e.offset[r], multiplier = e.rows.empty() ? 1 : e.rows[r];
    for (std::size_t c = 0; c < cols; ++c) {
      const double v = (static_cast<double>(row[c]) + offset) * static_cast<double>(multiplier) *
                           (e.columns.empty() ? 1.0 : static_cast<double>(e.columns[c])) -
                       offset;
      row[c] = static_cast<float>(v);
      if (!std::isfinite(row[c]))
        return Status::invalid(name + ": element " + std::to_string(r * cols + c) +
                               " is no longer finite after folding multipliers into it");
    }
  }
  return out;
}

Result<weights::TensorData> EditedSource::get(const std::string& name) const {
  SF_ASSIGN_OR_RETURN(weights::TensorData out, base_->get(name));
  if (!edits(name)) return out;
  SF_ASSIGN_OR_RETURN(std::vector<float> changed, values(name));
  if (static_cast<std::int64_t>(changed.size()) != out.shape.elements())
    return Status::invalid(name + ": replaced by " + std::to_string(changed.size()) + " values, it has " +
                           std::to_string(out.shape.elements()));
  const auto kept = std::make_shared<const std::vector<float>>(std::move(changed));
  out.dtype = DType::kF32;
  out.bytes = std::as_bytes(std::span(*kept));
  out.owner = kept;
  out.sequence.reset();
  return out;
}

Status plant_outliers(const weights::Architecture& architecture, const OutlierOptions& options,
                      EditedSource& source) {
  if (options.stride < 1 || std::abs(options.power) > 30)
    return Status::invalid("outliers: stride " + std::to_string(options.stride) + ", power " +
                           std::to_string(options.power));
  for (const Site& site : sites(architecture)) {
    if (site.producer != Producer::kLinear) continue;
    const bool down = site.linears.front().ends_with("down_proj");
    if (down ? !options.up_down : !options.v_o) continue;
    // The expert's site stands for the prefix's as well.
    if (!site.other_linear.empty() && !site.linears.front().starts_with(weights::kExpertPrefix)) continue;
    std::vector<float> m(static_cast<std::size_t>(site.width), 1.0f);
    for (std::size_t c = 0; c < m.size(); ++c) {
      const int row = site.tie.empty() ? static_cast<int>(c) : site.tie[c];
      if (row % options.stride == options.stride / 2) m[c] = std::ldexp(1.0f, options.power);
    }
    SF_RETURN_IF_ERROR(source.fold(site, m));
  }
  return {};
}

}  // namespace servoflow::toolkit
