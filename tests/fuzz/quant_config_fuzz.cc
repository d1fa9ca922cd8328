// A checkpoint's quantization: config.json or hf_quant_config.json, a precision plan, and the tensors of a
// layer that the config describes. Problems that are named, or a layer that decodes.
//
// The input is a JSON document; bytes after the first NUL are the layer's tensors.
#include <cmath>
#include <string>
#include <vector>

#include "core/json.h"
#include "quant/checkpoint.h"
#include "quant/precision_plan.h"
#include "tests/fuzz/fuzz.h"

namespace servoflow::quant {
namespace {

using fuzz::accepted;
using fuzz::require;

constexpr std::int64_t kRows = 6, kCols = 40;

// Gives every tensor its bytes from the input, in the order of the asking; type and shape come from the input
// as well.
class FuzzTensors {
 public:
  explicit FuzzTensors(std::string_view bytes) : bytes_(bytes) {}
  std::optional<TensorView> operator()(const std::string& name) {
    if (const auto it = known_.find(name); it != known_.end()) return it->second;
    std::optional<TensorView>& view = known_[name];
    const unsigned kind = next();
    if (kind % 8 == 7) return view;
    constexpr DType kTypes[] = {DType::kU8,  DType::kI8,   DType::kF8E4M3, DType::kI32,
                                DType::kF32, DType::kBF16, DType::kF16,    DType::kI64};
    constexpr std::int64_t kSides[] = {1, 2, 3, 5, 6, 10, 12, 20, 32, 40, 48, 64, 128, -1};
    TensorView tensor;
    tensor.dtype = kTypes[next() % 8];
    const unsigned rank = next() % 3;
    for (unsigned i = 0; i < rank; ++i) tensor.shape.push_back(kSides[next() % 14]);
    const std::int64_t elements = tensor.shape.elements();
    std::size_t size = elements < 0 ? 3 : static_cast<std::size_t>(elements) * dtype_size(tensor.dtype);
    if (kind % 8 == 6) ++size;  // fewer or more bytes than the shape says
    storage_.push_back({});
    for (std::size_t i = 0; i < size; ++i) storage_.back().push_back(static_cast<std::byte>(next()));
    tensor.bytes = storage_.back();
    view = tensor;
    return view;
  }

 private:
  unsigned next() { return at_ < bytes_.size() ? static_cast<unsigned char>(bytes_[at_++]) : 1u; }
  std::string_view bytes_;
  std::size_t at_ = 0;
  std::map<std::string, std::optional<TensorView>> known_;
  std::vector<std::vector<std::byte>> storage_;
};

void read_layers(const QuantConfig& config, std::string_view bytes) {
  for (const char* layer : {"a.mlp.up_proj", "lm_head"}) {
    const ConfigGroup* group = config.group_of(layer);
    if (group == nullptr) continue;
    require(validate(group->format).ok());
    FuzzTensors tensors(bytes);
    const TensorLookup lookup = [&](const std::string& name) { return tensors(name); };
    const Result<QuantizedMatrix> m = read_linear(layer, *group, config.convention, kRows, kCols, lookup);
    if (!accepted(m)) continue;
    for (const float scale : m->decoded_scales()) require(std::isfinite(scale) && scale >= 0.0f);
    require(dequantize(*m).size() == kRows * kCols);
    const auto written = write_linear(layer, *m, config.convention);
    (void)accepted(written);
  }
}

}  // namespace
}  // namespace servoflow::quant

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  namespace quant = servoflow::quant;
  using servoflow::fuzz::accepted;
  const std::string_view text = servoflow::fuzz::as_text(data, size);
  const std::size_t end = text.find('\0');
  const std::string_view tensors = end == std::string_view::npos ? std::string_view() : text.substr(end + 1);
  const auto json = servoflow::parse_json(text.substr(0, end), "fuzz");
  if (!json.ok()) return 0;
  const auto found = quant::find_quant_config(*json, "config.json");
  if (accepted(found) && found->has_value()) quant::read_layers(**found, tensors);
  const auto modelopt = quant::parse_modelopt(*json, "hf_quant_config.json");
  if (accepted(modelopt)) quant::read_layers(*modelopt, tensors);
  const auto plan = quant::plan_from_json(*json, "plan.json");
  if (accepted(plan)) {
    servoflow::fuzz::require(quant::plan_from_json(quant::to_json(*plan), "again").ok());
    const std::vector<quant::Linear> linears = {
        {"a.mlp.up_proj", 6, 40}, {"a.mlp.gate_proj", 6, 40}, {"x", 1, 1}};
    (void)accepted(plan->resolve(linears));
  }
  return 0;
}
