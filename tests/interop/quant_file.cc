// Reads and writes quantized layers for interop_test.py, through the library's readers and writers.
//
//   interop_quant_file write compressed-tensors|modelopt SOURCE OUT   every format the library can hold, one
//   layer each interop_quant_file read CONFIG TENSORS ROWS COLS OUT              all layers that the config
//   names, decoded to F32
//
// SOURCE holds a tensor "source" [N, K]; OUT of `write` is a folder: model.safetensors, config.json,
// layers.json.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "core/file.h"
#include "core/json.h"
#include "core/safetensors.h"
#include "core/status_macros.h"
#include "quant/checkpoint.h"
#include "quant/gguf.h"
#include "quant/layouts.h"

namespace servoflow::quant {
namespace {

Status save(const std::string& path, const std::vector<StoredTensor>& tensors) {
  std::vector<SafetensorsWriter::Entry> entries;
  for (const StoredTensor& t : tensors) entries.push_back({t.name, t.dtype, t.shape});
  SF_ASSIGN_OR_RETURN(const auto writer, SafetensorsWriter::create(path, entries, {}));
  for (const StoredTensor& t : tensors) SF_RETURN_IF_ERROR(writer->write(t.bytes));
  return writer->finish();
}

Status write(const std::string& library, const std::string& source, const std::string& out) {
  const Convention convention =
      library == "modelopt" ? Convention::kModelOpt : Convention::kCompressedTensors;
  SF_ASSIGN_OR_RETURN(const SafetensorsFile file, SafetensorsFile::open(source));
  const SafeTensor* tensor = file.find("source");
  if (tensor == nullptr || tensor->shape.rank() != 2)
    return Status::invalid(source + ": no matrix \"source\"");
  SF_ASSIGN_OR_RETURN(const std::vector<float> w, to_floats(*tensor));
  std::vector<std::string> names = format_names();
  for (const char* more :
       {"int4-g128-sf32/none", "int4-g32-asym-sf32/none", "int8-g128/none", "int8-channel-asym/none",
        "int4-channel-sf32/none", "int8-channel/int8-tensor-static-asym"})
    names.push_back(more);
  std::vector<Linear> linears;
  std::vector<LinearFormat> formats;
  std::vector<StoredTensor> tensors;
  Json layers = Json::object();
  for (const std::string& text : names) {
    SF_ASSIGN_OR_RETURN(const LinearFormat format, parse_format(text));
    const bool known = convention == Convention::kModelOpt ? modelopt_algorithm(format, false).has_value()
                                                           : compressed_tensors_layout(format).has_value();
    if (!known) continue;
    const std::string layer = "l" + std::to_string(linears.size());
    SF_ASSIGN_OR_RETURN(QuantizedMatrix m,
                        quantize(w, tensor->shape[0], tensor->shape[1], format, {.convention = convention}));
    if (format.input.needs_calibration()) m.input_scale = 0.0125f;
    if (format.input.zero_point) m.input_zero_point = -17;
    SF_ASSIGN_OR_RETURN(const std::vector<StoredTensor> stored, write_linear(layer, m, convention));
    tensors.insert(tensors.end(), stored.begin(), stored.end());
    const std::vector<float> decoded = dequantize(m);
    const auto bytes = std::as_bytes(std::span(decoded));
    tensors.push_back({layer + ".decoded", DType::kF32, tensor->shape, {bytes.begin(), bytes.end()}});
    // ggml's blocks of the same layer, for its own decoder.
    if (format.weight.code == Code::kE2M1) {
      SF_ASSIGN_OR_RETURN(const std::vector<std::uint8_t> blocks, gguf_blocks(m));
      const auto raw = std::as_bytes(std::span(blocks));
      const auto size = static_cast<std::int64_t>(blocks.size());
      tensors.push_back({layer + ".gguf", DType::kU8, Shape{size}, {raw.begin(), raw.end()}});
      const auto scale = std::as_bytes(std::span(&m.global_scale, 1));
      tensors.push_back({layer + ".gguf_scale", DType::kF32, Shape{}, {scale.begin(), scale.end()}});
    }
    linears.push_back({layer, tensor->shape[0], tensor->shape[1]});
    formats.push_back(format);
    layers[layer] = text;
  }
  SF_ASSIGN_OR_RETURN(const Json config, write_config(linears, formats, convention, "0"));
  SF_RETURN_IF_ERROR(save(out + "/model.safetensors", tensors));
  SF_RETURN_IF_ERROR(write_file_atomically(out + "/layers.json", layers.dump(1)));
  return write_file_atomically(out + "/config.json", config.dump(1));
}

Status read(const std::string& config_path, const std::string& tensors_path, std::int64_t rows,
            std::int64_t cols, const std::string& out) {
  SF_ASSIGN_OR_RETURN(const Json json, read_json_file(config_path));
  SF_ASSIGN_OR_RETURN(std::optional<QuantConfig> config, find_quant_config(json, config_path));
  if (!config) {
    SF_ASSIGN_OR_RETURN(config, parse_modelopt(json, config_path));
  }
  SF_ASSIGN_OR_RETURN(const SafetensorsFile file, SafetensorsFile::open(tensors_path));
  std::set<std::string> layers;
  for (const SafeTensor& t : file.tensors()) layers.insert(t.name.substr(0, t.name.rfind('.')));
  const TensorLookup lookup = [&](const std::string& name) -> std::optional<TensorView> {
    const SafeTensor* t = file.find(name);
    return t == nullptr ? std::nullopt : std::optional(TensorView{t->dtype, t->shape, t->bytes});
  };
  std::vector<StoredTensor> decoded;
  for (const std::string& layer : layers) {
    const ConfigGroup* group = config->group_of(layer);
    if (group == nullptr) continue;
    SF_ASSIGN_OR_RETURN(const QuantizedMatrix m,
                        read_linear(layer, *group, config->convention, rows, cols, lookup));
    const std::vector<float> values = dequantize(m);
    const auto bytes = std::as_bytes(std::span(values));
    decoded.push_back({layer, DType::kF32, Shape{rows, cols}, {bytes.begin(), bytes.end()}});
  }
  return save(out, decoded);
}

}  // namespace
}  // namespace servoflow::quant

int main(int argc, char** argv) {
  using servoflow::Status;
  const std::vector<std::string> args(argv + 1, argv + argc);
  Status status = Status::invalid("usage: write LIBRARY SOURCE OUT | read CONFIG TENSORS ROWS COLS OUT");
  if (args.size() == 4 && args[0] == "write") status = servoflow::quant::write(args[1], args[2], args[3]);
  if (args.size() == 6 && args[0] == "read") {
    status = servoflow::quant::read(args[1], args[2], std::atoll(args[3].c_str()),
                                    std::atoll(args[4].c_str()), args[5]);
  }
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.message().c_str());
  return servoflow::exit_code(status);
}
