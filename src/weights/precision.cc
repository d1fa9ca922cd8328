#include "weights/precision.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <mutex>
#include <set>
#include <thread>

#include "core/status_macros.h"
#include "ops/host_rows.h"
#include "weights/manifest.h"

namespace servoflow::weights {
namespace {

constexpr std::string_view kWeight = ".weight";
constexpr std::int64_t kRowBlock = 128;                         // block scales end with it
constexpr std::int64_t kBlockElements = std::int64_t{2} << 20;  // of float32 at a time and thread

std::string list(const std::vector<std::string>& names) {
  std::string out;
  for (const std::string& name : names) out += (out.empty() ? "" : ", ") + name;
  return out;
}

// Status of a plan whose inputs need scales that nobody measured.
Status check_calibration(const std::string& option, const Precision& precision) {
  std::vector<std::string> formats;
  std::size_t layers = 0;
  for (const auto& [name, format] : precision.rounding) {
    if (!format.input.needs_calibration()) continue;
    ++layers;
    if (std::find(formats.begin(), formats.end(), quant::name(format)) == formats.end())
      formats.push_back(quant::name(format));
  }
  if (layers == 0) return {};
  return Status::invalid(
      "--precision: \"" + option + "\" needs calibrated input scales for " + std::to_string(layers) +
      " layers (" + list(formats) +
      "); quantize the checkpoint with `servoflow quantize` first and open the result, or choose a "
      "recipe whose inputs are rounded by their own extremes (int8-w8a8, fp8-w8a8, nvfp4-w4a8, …)");
}

struct Block {
  std::int64_t first = 0, rows = 0;
  quant::QuantizedMatrix matrix;
};

struct Owner {
  std::vector<std::uint8_t> codes, scales;
};

// Rounded row blocks as one matrix.
quant::QuantizedMatrix join(std::vector<Block>& blocks, std::int64_t rows) {
  quant::QuantizedMatrix out = blocks.front().matrix;
  auto owner = std::make_shared<Owner>();
  std::vector<std::int8_t> zeros;
  out.scale_rows = 0;
  for (Block& block : blocks) {
    const quant::QuantizedMatrix& m = block.matrix;
    owner->codes.insert(owner->codes.end(), m.codes.begin(), m.codes.end());
    owner->scales.insert(owner->scales.end(), m.scales.begin(), m.scales.end());
    zeros.insert(zeros.end(), m.zero_points.begin(), m.zero_points.end());
    out.scale_rows += m.scale_rows;
    block.matrix = {};
  }
  out.rows = rows;
  out.codes = owner->codes;
  out.scales = owner->scales;
  out.zero_points = std::move(zeros);
  out.owner = std::move(owner);
  return out;
}

}  // namespace

std::vector<quant::Linear> linear_layers(const Architecture& architecture) {
  std::vector<quant::Linear> out;
  for (const TensorSpec& spec : manifest(architecture)) {
    if (!is_linear_weight(spec)) continue;
    out.push_back({spec.name.substr(0, spec.name.size() - kWeight.size()), spec.shape[0], spec.shape[1]});
  }
  return out;
}

Result<Precision> choose_precision(const std::string& option, const Architecture& architecture,
                                   const WeightSource& source) {
  Precision out;
  const std::string stored = source.quantization();
  if (option.empty()) return choose_precision("auto", architecture, source);
  if (option == "auto" || option == "fp32" || option == "bf16") {
    out.base = option;
    out.dequantize = option != "auto" && !stored.empty();
    if (option == "auto") out.name = stored;
    return out;
  }
  if (!stored.empty())
    return Status::invalid(
        "--precision: \"" + option + "\": this checkpoint is quantized already (" + stored +
        ") and cannot be rounded again; auto runs it as it is, bf16 and fp32 dequantize it");
  Result<quant::PrecisionPlan> plan = quant::load_plan(option);
  if (!plan.ok())
    return Status::invalid("--precision: \"" + option +
                           "\" is neither auto, fp32, bf16 nor a recipe or plan: " + plan.status().message());
  const std::vector<quant::Linear> linears = linear_layers(architecture);
  SF_ASSIGN_OR_RETURN(const std::vector<quant::LinearFormat> formats, plan->resolve(linears));
  for (std::size_t i = 0; i < linears.size(); ++i)
    if (formats[i].quantized()) out.rounding[linears[i].name] = formats[i];
  SF_RETURN_IF_ERROR(check_calibration(option, out));
  out.name = plan->name;
  if (plan->default_format.weight.code == quant::Code::kFloat32) out.base = "fp32";
  return out;
}

Status check_kernels(const ops::Backend& backend, const Precision& precision, const WeightSource& source) {
  std::set<std::string> missing;
  const auto check = [&](const quant::LinearFormat& format) {
    if (format.quantized() && backend.low_bit_kernel(format).empty()) missing.insert(quant::name(format));
  };
  for (const auto& [name, format] : precision.rounding) check(format);
  if (!precision.dequantize)
    for (const quant::LinearFormat& format : source.formats()) check(format);
  if (missing.empty()) return {};
  return Status::invalid("--precision: " + backend.name() + " has no kernel for " +
                         list({missing.begin(), missing.end()}) +
                         "; choose --device cpu, or --precision bf16" +
                         (source.quantization().empty() ? "" : ", which dequantizes this checkpoint"));
}

Result<float> shared_amax(const std::vector<ops::HostMatrix>& parts) {
  float amax = 0;
  for (const ops::HostMatrix& part : parts) {
    std::vector<float> row(static_cast<std::size_t>(part.cols));
    for (int r = 0; r < part.rows; ++r) {
      SF_RETURN_IF_ERROR(ops::read_row(part, r, row.data()));
      amax = std::max(amax, quant::max_magnitude(row));
    }
  }
  return amax;
}

Result<quant::QuantizedMatrix> round_matrix(const ops::HostMatrix& host, const quant::LinearFormat& format,
                                            std::optional<float> amax, int threads) {
  const bool whole = format.weight.granularity == quant::Granularity::kTensor;  // one scale over all rows
  const std::int64_t least = kRowBlock / std::min<std::int64_t>(kRowBlock, std::max(1, format.weight.group));
  const std::int64_t unit = format.weight.granularity == quant::Granularity::kBlock
                                ? std::max<std::int64_t>(1, least) * format.weight.group
                                : kRowBlock;
  const std::int64_t step =
      whole ? host.rows : std::max<std::int64_t>(1, kBlockElements / host.cols / unit) * unit;
  std::vector<Block> blocks;
  for (std::int64_t first = 0; first < host.rows; first += step)
    blocks.push_back({first, std::min<std::int64_t>(step, host.rows - first), {}});
  std::atomic<std::size_t> next{0};
  std::mutex failing;
  Status failed;
  const auto work = [&] {
    std::vector<float> values;
    for (std::size_t i = next++; i < blocks.size(); i = next++) {
      Block& block = blocks[i];
      const auto cols = static_cast<std::size_t>(host.cols);
      values.resize(static_cast<std::size_t>(block.rows) * cols);
      Status status;
      for (std::int64_t r = 0; r < block.rows && status.ok(); ++r)
        status = ops::read_row(host, static_cast<int>(block.first + r),
                               values.data() + static_cast<std::size_t>(r) * cols);
      if (status.ok()) {
        Result<quant::QuantizedMatrix> rounded =
            quant::quantize(values, block.rows, host.cols, format, {.amax = amax});
        if (rounded.ok()) {
          block.matrix = std::move(*rounded);
        } else {
          status = rounded.status().with_context(host.name);
        }
      }
      if (status.ok()) continue;
      const std::lock_guard guard(failing);
      if (failed.ok()) failed = status;
      next = blocks.size();
    }
  };
  {
    std::vector<std::jthread> others;
    for (std::size_t t = 1;
         t < std::min<std::size_t>(static_cast<std::size_t>(std::max(1, threads)), blocks.size()); ++t)
      others.emplace_back(work);
    work();
  }
  SF_RETURN_IF_ERROR(failed);
  if (blocks.size() == 1) return std::move(blocks.front().matrix);
  return join(blocks, host.rows);
}

}  // namespace servoflow::weights
