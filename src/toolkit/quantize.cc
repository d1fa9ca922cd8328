#include "toolkit/quantize.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <map>

#include "core/bf16.h"
#include "core/file.h"
#include "core/safetensors.h"
#include "core/status_macros.h"
#include "core/temporary_directory.h"
#include "toolkit/digest.h"
#include "toolkit/machine.h"
#include "toolkit/quantize_layers.h"
#include "toolkit/writers.h"
#include "weights/checkpoint.h"
#include "weights/tensor_files.h"

namespace servoflow::toolkit {
namespace {

namespace fs = std::filesystem;
using OrderedJson = nlohmann::ordered_json;
constexpr std::uint64_t kShardBytes = std::uint64_t{1} << 30;  // in memory until a shard is written
constexpr char kModel[] = "model.";

// Tensors in memory until there are enough of them for a file.
class ShardWriter {
 public:
  ShardWriter(const TemporaryDirectory& directory, std::map<std::string, std::string> metadata)
      : directory_(directory), metadata_(std::move(metadata)) {}

  Status add(quant::StoredTensor tensor) {
    if (held_ > 0 && held_ + tensor.bytes.size() > kShardBytes) SF_RETURN_IF_ERROR(flush());
    held_ += tensor.bytes.size();
    total_ += tensor.bytes.size();
    tensors_.push_back(std::move(tensor));
    return {};
  }
  // One file is model.safetensors, several are shards with an index.
  Status finish() {
    SF_RETURN_IF_ERROR(flush());
    std::error_code error;
    if (shards_.size() == 1) {
      fs::rename(directory_.file(part(0)), directory_.file(weights::kModelFile), error);
      return error ? Status::runtime(directory_.file(weights::kModelFile) + ": " + error.message())
                   : Status();
    }
    OrderedJson map = OrderedJson::object();
    for (std::size_t i = 0; i < shards_.size(); ++i) {
      const std::string name = fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, shards_.size());
      fs::rename(directory_.file(part(i)), directory_.file(name), error);
      if (error) return Status::runtime(directory_.file(name) + ": " + error.message());
      for (const std::string& tensor : shards_[i]) map[tensor] = name;
    }
    const OrderedJson index = {{"metadata", {{"total_size", total_}}}, {"weight_map", map}};
    return write_file_atomically(directory_.file(weights::kShardIndex), index.dump(2) + "\n");
  }
  std::uint64_t total() const { return total_; }

 private:
  static std::string part(std::size_t i) { return "part-" + std::to_string(i) + ".safetensors"; }
  Status flush() {
    std::vector<SafetensorsWriter::Entry> entries;
    std::vector<std::string> names;
    for (const quant::StoredTensor& t : tensors_) {
      entries.push_back({t.name, t.dtype, t.shape});
      names.push_back(t.name);
    }
    SF_ASSIGN_OR_RETURN(const auto file,
                        SafetensorsWriter::create(directory_.file(part(shards_.size())), entries, metadata_));
    for (const quant::StoredTensor& t : tensors_) SF_RETURN_IF_ERROR(file->write(t.bytes));
    SF_RETURN_IF_ERROR(file->finish());
    shards_.push_back(std::move(names));
    tensors_.clear();
    held_ = 0;
    return {};
  }

  const TemporaryDirectory& directory_;
  const std::map<std::string, std::string> metadata_;
  std::vector<quant::StoredTensor> tensors_;
  std::vector<std::vector<std::string>> shards_;
  std::uint64_t held_ = 0, total_ = 0;
};

// Everything of the directory but weights, what is written anew, and recorded cases.
Status copy_documents(const std::string& from, const TemporaryDirectory& to) {
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(from, error)) {
    const std::string name = entry.path().filename().string();
    const bool weights =
        name.starts_with("model") && (name.ends_with(".safetensors") || name == weights::kShardIndex);
    if (weights || name == "config.json" || name == "cases" || name.starts_with(".")) continue;
    fs::copy(entry.path(), to.file(name), fs::copy_options::recursive, error);
    if (error) return Status::runtime(entry.path().string() + ": cannot copy: " + error.message());
  }
  return error ? Status::runtime(from + ": cannot list: " + error.message()) : Status();
}

quant::StoredTensor float_tensor(const std::string& name, const Shape& shape,
                                 const std::vector<float>& values) {
  const std::span<const std::byte> bytes = std::as_bytes(std::span(values));
  return {name, DType::kF32, shape, {bytes.begin(), bytes.end()}};
}

std::string without_model(const std::string& name) {
  return name.starts_with(kModel) ? name.substr(6) : name;
}

Json calibration_json(const CalibrationStatistics& s) {
  Json cases = Json::array();
  for (const auto& one : s.cases) cases.push_back({{"name", one.name}, {"sha256", one.digest}});
  return {{"digest", s.digest()},
          {"weights", s.weights},
          {"precision", s.precision},
          {"backend", s.backend},
          {"denoise_steps", s.denoise_steps},
          {"cases", cases}};
}

Status write_config(const std::string& checkpoint, const QuantizeOptions& options,
                    const std::vector<quant::Linear>& linears,
                    const std::vector<quant::LinearFormat>& formats, const TemporaryDirectory& dir) {
  const std::string version = build_json()["version"].get<std::string>();
  SF_ASSIGN_OR_RETURN(Json config, quant::write_config(linears, formats, options.layout, version));
  const std::string path = (fs::path(checkpoint) / "config.json").string();
  SF_ASSIGN_OR_RETURN(const std::string text, read_text_file(path, std::size_t{64} << 20));
  SF_RETURN_IF_ERROR(parse_json(text, path).status());  // strictly, once; below the order of keys is kept
  OrderedJson out = OrderedJson::parse(text, nullptr, false);
  if (options.layout == quant::Convention::kModelOpt) {
    SF_RETURN_IF_ERROR(write_file_atomically(dir.file("hf_quant_config.json"), json_text(config) + "\n"));
    config = quant::modelopt_config_json(config);
  }
  out["quantization_config"] = OrderedJson::parse(config.dump());
  return write_file_atomically(dir.file("config.json"), out.dump(2) + "\n");
}

}  // namespace

Result<QuantizeReport> quantize_checkpoint(const QuantizeOptions& options) {
  std::string out = options.out;
  while (out.size() > 1 && out.back() == '/') out.pop_back();
  if (out.empty()) return Status::invalid("OUT: missing");
  SF_RETURN_IF_ERROR(check_new_directory(out));
  QuantizeReport report{.checkpoint = options.checkpoint,
                        .out = out,
                        .recipe = options.recipe,
                        .layout = std::string(quant::convention_name(options.layout)),
                        .statistics = options.statistics,
                        .calibrator = options.calibrator,
                        .clip = options.clip};
  SF_ASSIGN_OR_RETURN(const weights::Checkpoint checkpoint, weights::open_checkpoint(options.checkpoint));
  SF_ASSIGN_OR_RETURN(const auto quantized,
                      quant::find_quant_config(checkpoint.config, options.checkpoint + "/config.json"));
  if (quantized)
    return Status::invalid(
        options.checkpoint +
        ": is quantized already (config.json: quantization_config); start from the float checkpoint");
  SF_ASSIGN_OR_RETURN(report.plan, quant::load_plan(options.recipe));
  const std::vector<quant::Linear> linears = linear_layers(checkpoint.architecture);
  SF_ASSIGN_OR_RETURN(const std::vector<quant::LinearFormat> formats, report.plan.resolve(linears));
  std::map<std::string, quant::LinearFormat> chosen;
  bool calibrated = false;
  for (std::size_t i = 0; i < linears.size(); ++i) {
    if (!formats[i].quantized()) continue;
    chosen[linears[i].name] = formats[i];
    calibrated = calibrated || formats[i].input.needs_calibration();
  }
  if (chosen.empty())
    return Status::invalid(options.recipe + ": the plan quantizes no layer of this checkpoint");
  const bool methods = options.smoothing == Smoothing::kSmoothQuant || options.smoothing == Smoothing::kAwq ||
                       options.rounding == Rounding::kGptq || options.correct_bias;
  if (options.statistics.empty() && (calibrated || methods))
    return Status::invalid(options.recipe +
                           (calibrated ? ": its input scales come from calibration"
                                       : ": SmoothQuant, AWQ, GPTQ and bias correction look at inputs") +
                           "; make statistics with `servoflow calibrate` and pass them with --statistics");
  std::optional<CalibrationStatistics> statistics;
  SF_ASSIGN_OR_RETURN(report.weights, weights_digest(checkpoint));
  if (!options.statistics.empty()) {
    SF_ASSIGN_OR_RETURN(statistics, read_calibration(options.statistics));
    if (statistics->weights != report.weights)
      return Status::invalid(options.statistics + ": statistics of other weights (" +
                             statistics->weights.substr(0, 12) + ", the checkpoint has " +
                             report.weights.substr(0, 12) + "); calibrate this checkpoint");
    report.calibration = calibration_json(*statistics);
    const bool moments = std::any_of(statistics->sites.begin(), statistics->sites.end(),
                                     [](const auto& site) { return site.second.moment.has_value(); });
    if (options.rounding == Rounding::kGptq && !moments)
      return Status::invalid(options.statistics +
                             ": holds no second moments, which GPTQ needs; calibrate with --moments");
  }

  SF_ASSIGN_OR_RETURN(
      const auto quantizer,
      LayerQuantizer::prepare(checkpoint, options, statistics ? &*statistics : nullptr, chosen));
  TemporaryDirectory dir;
  SF_RETURN_IF_ERROR(dir.create(out));
  SF_RETURN_IF_ERROR(copy_documents(options.checkpoint, dir));
  SF_RETURN_IF_ERROR(write_config(options.checkpoint, options, linears, formats, dir));

  SF_ASSIGN_OR_RETURN(const auto files, weights::TensorFiles::open(options.checkpoint));
  std::map<std::string, std::string> metadata;
  for (const weights::StoredTensor& t : files->tensors())
    for (const auto& [key, value] : t.file->metadata()) metadata[key] = value;
  metadata["servoflow_quantized_from"] = report.weights;
  ShardWriter writer(dir, std::move(metadata));
  std::map<std::string, const quant::Linear*> by_name;
  for (const quant::Linear& l : linears)
    if (chosen.contains(l.name)) by_name[l.name] = &l;
  std::map<std::string, std::string> stored_bias;  // layer -> the bias' stored name
  for (const weights::StoredTensor& t : files->tensors()) {
    const std::string name = without_model(t.tensor->name);
    if (name.ends_with(".bias")) stored_bias[name.substr(0, name.size() - 5)] = t.tensor->name;
  }
  std::map<std::string, std::vector<float>> biases;
  std::vector<const weights::StoredTensor*> later;  // biases, when their layers are done
  std::uint64_t done = 0;
  for (const weights::StoredTensor& t : files->tensors()) {
    const std::string name = without_model(t.tensor->name);
    report.bytes_before += t.tensor->bytes.size();
    const auto layer =
        name.ends_with(".weight") ? by_name.find(name.substr(0, name.size() - 7)) : by_name.end();
    if (layer != by_name.end()) {
      const quant::Linear& linear = *layer->second;
      SF_ASSIGN_OR_RETURN(LayerQuantizer::Layer made,
                          quantizer->quantize(linear, stored_bias.contains(linear.name)));
      const std::string stored = t.tensor->name.substr(0, t.tensor->name.size() - 7);
      Result<std::vector<quant::StoredTensor>> tensors =
          quant::write_linear(stored, made.matrix, options.layout);
      if (!tensors.ok()) return tensors.status().with_context(report.layout);
      for (quant::StoredTensor& one : *tensors) SF_RETURN_IF_ERROR(writer.add(std::move(one)));
      if (made.bias) biases[linear.name] = std::move(*made.bias);
      report.layers.push_back(std::move(made.report));
    } else if (name.ends_with(".bias") && by_name.contains(name.substr(0, name.size() - 5))) {
      later.push_back(&t);
    } else if (quantizer->source().edits(name)) {  // float32: folding must not be rounded away again
      SF_ASSIGN_OR_RETURN(const std::vector<float> values, quantizer->source().values(name));
      SF_RETURN_IF_ERROR(writer.add(float_tensor(t.tensor->name, t.tensor->shape, values)));
    } else {
      SF_RETURN_IF_ERROR(writer.add({t.tensor->name,
                                     t.tensor->dtype,
                                     t.tensor->shape,
                                     {t.tensor->bytes.begin(), t.tensor->bytes.end()}}));
    }
    t.file->release(*t.tensor);
    done += static_cast<std::uint64_t>(t.tensor->shape.elements());
    if (options.progress) options.progress(done, std::max(done, checkpoint.parameters));
  }
  for (const weights::StoredTensor* t : later) {
    const std::string name = without_model(t->tensor->name), layer = name.substr(0, name.size() - 5);
    if (const auto it = biases.find(layer); it != biases.end()) {
      SF_RETURN_IF_ERROR(writer.add(float_tensor(t->tensor->name, t->tensor->shape, it->second)));
    } else if (quantizer->source().edits(name)) {
      SF_ASSIGN_OR_RETURN(const std::vector<float> values, quantizer->source().values(name));
      SF_RETURN_IF_ERROR(writer.add(float_tensor(t->tensor->name, t->tensor->shape, values)));
    } else {
      SF_RETURN_IF_ERROR(writer.add({t->tensor->name,
                                     t->tensor->dtype,
                                     t->tensor->shape,
                                     {t->tensor->bytes.begin(), t->tensor->bytes.end()}}));
    }
  }
  SF_RETURN_IF_ERROR(writer.finish());
  report.bytes_after = writer.total();
  if (report.layers.size() != chosen.size())
    return Status::invalid(options.checkpoint + ": " + std::to_string(chosen.size() - report.layers.size()) +
                           " layers of the plan are not stored under their names");
  if (options.correct_bias && biases.empty())
    report.notes.push_back("bias correction: no quantized layer has a bias");
  report.plan.provenance["made_by"] = "servoflow quantize";
  report.plan.provenance["recipe"] = options.recipe;
  report.plan.provenance["weights_sha256"] = report.weights;
  SF_RETURN_IF_ERROR(
      write_file_atomically(dir.file(kPlanFile), json_text(quant::to_json(report.plan)) + "\n"));
  SF_RETURN_IF_ERROR(
      write_file_atomically(dir.file(kReportFile), json_text(quantize_to_json(report)) + "\n"));
  SF_RETURN_IF_ERROR(dir.move_to(out));
  return report;
}

Json quantize_to_json(const QuantizeReport& r) {
  Json layers = Json::array();
  const auto number = [](const std::optional<double>& v) { return v ? Json(*v) : Json(nullptr); };
  for (const LayerReport& l : r.layers) {
    Json one = {{"name", l.name},
                {"format", l.format},
                {"shape", {l.rows, l.cols}},
                {"bits_per_weight", l.bits},
                {"weight_error", l.weight_error},
                {"weight_error_nearest", l.weight_error_nearest},
                {"output_error", number(l.output_error)},
                {"output_error_nearest", number(l.output_error_nearest)},
                {"method", l.method}};
    if (l.smoothing_error) {
      one["smoothing_error"] = *l.smoothing_error;
      one["smoothing_error_nearest"] = number(l.smoothing_error_nearest);
    }
    if (l.input_scale) one["input_scale"] = *l.input_scale;
    if (l.input_clip) one["input_clip"] = *l.input_clip;
    if (!l.step_input_amax.empty()) one["step_input_amax"] = l.step_input_amax;
    if (!l.note.empty()) one["note"] = l.note;
    layers.push_back(std::move(one));
  }
  return {{"servoflow_quantization", 1},
          {"checkpoint", r.checkpoint},
          {"weights_sha256", r.weights},
          {"recipe", r.recipe},
          {"layout", r.layout},
          {"plan", quant::to_json(r.plan)},
          {"calibration", r.calibration},
          {"calibrator", quant::calibrator_name(r.calibrator.kind)},
          {"clip", r.clip},
          {"bytes_before", r.bytes_before},
          {"bytes_after", r.bytes_after},
          {"layers", layers},
          {"notes", r.notes}};
}

std::string quantize_text(const QuantizeReport& r) {
  std::string out = fmt::format("{}: {} of {}, {} layout, {:.1f} MB (from {:.1f} MB)\n\n", r.out, r.plan.name,
                                r.checkpoint, r.layout, static_cast<double>(r.bytes_after) / 1e6,
                                static_cast<double>(r.bytes_before) / 1e6);
  struct Sum {
    int layers = 0, with_outputs = 0;
    double bits = 0, parameters = 0, weight = 0, output = 0, worst = 0, gain = 0;
    std::string worst_name;
  };
  std::map<std::string, Sum> formats;
  for (const LayerReport& l : r.layers) {
    Sum& s = formats[l.format];
    const double n = static_cast<double>(l.rows) * static_cast<double>(l.cols);
    ++s.layers;
    s.bits += l.bits * n;
    s.parameters += n;
    s.weight += l.weight_error;
    if (l.output_error) {
      ++s.with_outputs;
      s.output += *l.output_error;
      s.gain += *l.output_error_nearest > 0 ? *l.output_error / *l.output_error_nearest : 1;
    }
    if (l.weight_error > s.worst) {
      s.worst = l.weight_error;
      s.worst_name = l.name;
    }
  }
  for (const auto& [name, s] : formats) {
    out += fmt::format("{}: {} layers, {:.2f} bits per weight, weight error {:.3g} (worst {:.3g}: {})", name,
                       s.layers, s.bits / s.parameters, s.weight / s.layers, s.worst, s.worst_name);
    if (s.with_outputs > 0)
      out += fmt::format(", output error {:.3g}, {:.2f} of round-to-nearest's", s.output / s.with_outputs,
                         s.gain / s.with_outputs);
    out += "\n";
  }
  int kept = 0, clipped = 0;
  for (const LayerReport& l : r.layers) clipped += l.input_clip.has_value();
  if (clipped > 0)
    out += fmt::format("inputs of {} layers are clipped below their largest value, by {}\n", clipped,
                       quant::calibrator_name(r.calibrator.kind));
  for (const LayerReport& l : r.layers) kept += l.note.starts_with("round-to-nearest beats");
  if (kept > 0)
    out += fmt::format("round-to-nearest was kept in {} layers, where it beats the method\n", kept);
  for (const std::string& note : r.notes) out += "note: " + note + "\n";
  return out + fmt::format("Errors are shares of the squared size. All layers: {}/{}\n", r.out, kReportFile);
}

}  // namespace servoflow::toolkit
