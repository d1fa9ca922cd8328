// Every operation of ops.h as a plain scalar loop in double or float: the specification, and the oracle of
// every test.
#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstring>
#include <deque>
#include <optional>
#include <set>
#include <vector>

#include "core/bf16.h"
#include "core/memory.h"
#include "core/status_macros.h"
#include "ops/backend.h"
#include "ops/host_rows.h"

namespace servoflow::ops {
namespace {

constexpr double kGeluScale = 0.79788456080286535588;  // sqrt(2 / pi)

double gelu_tanh(double x) { return 0.5 * x * (1 + std::tanh(kGeluScale * (x + 0.044715 * x * x * x))); }
double silu(double x) { return x / (1 + std::exp(-x)); }

int valid(const Count& count) { return count.device != nullptr ? *count.device : count.capacity; }

float* row(const Matrix& m, std::int64_t i) { return static_cast<float*>(m.data) + i * m.pitch; }

const float* modulation_row(const ModulationRow& m, int token, int part) {
  const int step = m.base + (m.row_offset != nullptr ? m.row_offset[token] : 0);
  return m.table + step * m.step_pitch + (static_cast<std::int64_t>(m.site) * 3 + part) * m.width;
}

class ReferenceBackend : public Backend {
 public:
  std::string name() const override { return "reference"; }
  std::string device() const override { return "cpu"; }
  DType activation_dtype() const override { return DType::kF32; }
  std::uint64_t query_bytes(int rows, int heads, int head_dim) const override {
    return static_cast<std::uint64_t>(rows) * heads * head_dim * sizeof(float);
  }
  // [layers][slots][k, v][keys][kv_heads * head_dim] float32
  std::uint64_t cache_bytes(const KvCache& c) const override {
    return static_cast<std::uint64_t>(c.layers) * c.slots * 2 * c.keys * c.kv_heads * c.head_dim *
           sizeof(float);
  }
  Result<void*> allocate(std::uint64_t bytes) override {
    HostBlock block(std::max<std::uint64_t>(bytes, 1));
    if (block.data() == nullptr) return Status::runtime("out of memory: " + std::to_string(bytes) + " bytes");
    blocks_.push_back(std::move(block));
    return static_cast<void*>(blocks_.back().data());
  }
  Result<Weight> pack(std::span<const HostMatrix> parts, const PackOptions& options) override {
    SF_RETURN_IF_ERROR(check_parts(parts, options));
    Weight w{.k = parts[0].cols, .stored = DType::kF32, .paired = options.mode == PackMode::kInterleave};
    for (const HostMatrix& part : parts) w.n += part.rows;
    w.bytes = static_cast<std::uint64_t>(w.n) * w.k * sizeof(float);
    SF_ASSIGN_OR_RETURN(void* data, allocate(w.bytes));
    float* out = static_cast<float*>(data);
    for (const HostMatrix& part : parts) {  // paired weights: all gate rows, then all up rows
      for (int r = 0; r < part.rows; ++r, out += w.k) SF_RETURN_IF_ERROR(read_row(part, r, out));
    }
    w.data = data;
    if (const quant::QuantizedMatrix* first = parts[0].quantized; first != nullptr) {
      if (low_bit_kernel(first->format).empty()) return refuse_format(first->format, parts[0].name);
      for (const HostMatrix& part : parts)
        if (!(part.quantized->format == first->format) || part.quantized->input_scale != first->input_scale ||
            part.quantized->input_zero_point != first->input_zero_point ||
            part.quantized->input_multiplier != first->input_multiplier)
          return Status::invalid(part.name + ": its format or inputs are not those of " + parts[0].name +
                                 ", with which it is computed as one product; quantize both alike");
      if (first->format.input.needs_calibration() && !first->input_scale)
        return Status::invalid(parts[0].name + ": format " + quant::name(first->format) +
                               " needs a calibrated input scale, and the checkpoint has none");
      w.format = first->format;
      inputs_.push_back({first->format.input.needs_calibration() ? first->input_scale : std::nullopt,
                         first->format.input.zero_point ? first->input_zero_point : 0,
                         first->input_multiplier});
      w.layout = &inputs_.back();
    }
    return w;
  }
  // Everything, in float32: the emulation that other backends are held against.
  std::string low_bit_kernel(const quant::LinearFormat& format) const override {
    const quant::InputFormat& in = format.input;
    if (!quant::validate(format).ok() ||
        (in.quantized() && in.dynamic && in.granularity == quant::Granularity::kTensor))
      return {};
    return "float32 emulation";
  }
  void upload(void* device, const void* host, std::size_t bytes) override {
    std::memcpy(device, host, bytes);
  }
  void download(void* host, const void* device, std::size_t bytes) override {
    std::memcpy(host, device, bytes);
  }
  void read_cache(const KvCache& c, int layer, int slot, int rows, std::span<float> k,
                  std::span<float> v) override {
    std::copy_n(cache_row(c, layer, slot, 0, 0), k.size(), k.data());
    std::copy_n(cache_row(c, layer, slot, 1, 0), v.size(), v.data());
    (void)rows;
  }

  // So that the ways of raw inputs and of recorded work run, and are tested, where there is no GPU. A record
  // is its key: the body computes every time.
  bool takes_raw_inputs() const override { return true; }
  bool records() const override { return true; }
  void replay(std::uint64_t key, const std::function<void()>& feed,
              const std::function<void()>& body) override {
    feed();
    body();
    keys_.insert(key);
  }
  int recordings() const override { return static_cast<int>(keys_.size()); }
  void mark(int i) override { marks_[static_cast<std::size_t>(i)] = Clock::now(); }
  double elapsed(int i, int j) override {
    return std::chrono::duration<double, std::milli>(marks_[static_cast<std::size_t>(j)] -
                                                     marks_[static_cast<std::size_t>(i)])
        .count();
  }

 protected:
  void do_letterbox(const Letterbox& op) override { letterbox_rows(op, valid(op.pictures)); }

  void do_patch_rows(const PatchRows& op) override {
    const int grid = op.image / op.patch, p = op.patch;
    for (int picture = 0; picture < valid(op.pictures); ++picture)
      for (int y = 0; y < grid; ++y)
        for (int x = 0; x < grid; ++x) {
          int value = 0;
          for (int c = 0; c < 3; ++c)
            for (int i = 0; i < p; ++i)
              for (int j = 0; j < p; ++j)
                put_patch_value(
                    op, (static_cast<std::int64_t>(picture) * grid + y) * grid + x, value++,
                    op.pixels[((static_cast<std::int64_t>(picture) * op.image + y * p + i) * op.image +
                               x * p + j) *
                                  3 +
                              c]);
        }
  }

  void do_scale_rows(const ScaleRows& op) override {
    for (int i = 0; i < valid(op.rows); ++i)
      scale_row(op.x, op.ids != nullptr ? op.ids[i] : i, op.scale,
                row(op.y, op.row_map != nullptr ? op.row_map[i] : i));
  }

  void do_matmul(const Matmul& op) override {
    const Weight& w = *op.w;
    const Epilogue& e = op.epilogue;
    std::vector<double> product(static_cast<std::size_t>(w.n));
    std::vector<float> rounded(static_cast<std::size_t>(w.k));
    for (int i = 0; i < valid(op.rows); ++i) {
      const float* x = row(op.x, i);
      if (w.layout != nullptr) {
        const QuantizedInputs& in = *static_cast<const QuantizedInputs*>(w.layout);
        for (std::size_t k = 0; k < rounded.size(); ++k)
          rounded[k] = in.multiplier.empty() ? x[k] : x[k] * in.multiplier[k];
        quant::fake_quantize_rows(w.format.input, rounded.data(), 1, w.k, w.k, in.scale, in.zero);
        x = rounded.data();
      }
      for (int n = 0; n < w.n; ++n) {
        const float* weights = static_cast<const float*>(w.data) + static_cast<std::int64_t>(n) * w.k;
        double sum = 0;
        for (int k = 0; k < w.k; ++k) sum += static_cast<double>(x[k]) * weights[k];
        product[static_cast<std::size_t>(n)] = sum;
      }
      float* y = row(op.y, e.row_map != nullptr ? e.row_map[i] : i);
      for (int n = 0; n < op.y.cols; ++n) {
        double value = product[static_cast<std::size_t>(n)];
        if (e.geglu) value = gelu_tanh(value) * product[static_cast<std::size_t>(n + w.n / 2)];
        if (e.bias != nullptr) value += e.bias[n];
        if (e.activation == Activation::kGeluTanh) value = gelu_tanh(value);
        if (e.activation == Activation::kSilu) value = silu(value);
        if (e.gate != nullptr) value *= modulation_row(*e.gate, i, 2)[n];
        if (e.row_bias != nullptr)
          value += e.row_bias[static_cast<std::int64_t>(i % e.row_bias_period) * op.y.cols + n];
        y[n] = static_cast<float>(e.accumulate ? y[n] + value : value);
      }
    }
  }

  void do_layer_norm(const LayerNorm& op) override {
    const int width = op.x.cols;
    for (int i = 0; i < valid(op.rows); ++i) {
      const float* x = row(op.x, i);
      double mean = 0, variance = 0;
      for (int c = 0; c < width; ++c) mean += x[c];
      mean /= width;
      for (int c = 0; c < width; ++c) variance += (x[c] - mean) * (x[c] - mean);
      const double scale = 1 / std::sqrt(variance / width + op.eps);
      for (int c = 0; c < width; ++c)
        row(op.y, i)[c] = static_cast<float>((x[c] - mean) * scale * op.weight[c] + op.bias[c]);
    }
  }

  void do_rms_norm(const RmsNorm& op) override {
    const int width = op.x.cols;
    for (int i = 0; i < valid(op.rows); ++i) {
      const float* x = row(op.x, i);
      double squares = 0;
      for (int c = 0; c < width; ++c) squares += static_cast<double>(x[c]) * x[c];
      const double scale = 1 / std::sqrt(squares / width + op.eps);
      const float* factor = op.modulation != nullptr ? modulation_row(*op.modulation, i, 0) : op.weight;
      const float* shift = op.modulation != nullptr ? modulation_row(*op.modulation, i, 1) : nullptr;
      for (int c = 0; c < width; ++c)
        row(op.y, i)[c] =
            static_cast<float>(x[c] * scale * (1.0 + factor[c]) + (shift != nullptr ? shift[c] : 0.0));
    }
  }

  void do_split_qkv(const SplitQkv& op) override {
    const KvCache& c = *op.cache;
    const int d = c.head_dim, q_cols = op.heads * d;
    for (int s = 0; s < valid(op.segments.count); ++s) {
      const Segment& segment = op.segments.device[s];
      for (int i = 0; i < segment.rows; ++i) {
        const float* in = row(op.qkv, segment.row_begin + i);
        float* q = static_cast<float*>(op.q) + static_cast<std::int64_t>(segment.row_begin + i) * q_cols;
        const int position = segment.past + i;
        rotate(in, q, op.heads, d, op.rope, position);
        rotate(in + q_cols, cache_row(c, op.layer, segment.slot, 0, position), c.kv_heads, d, op.rope,
               position);
        std::copy_n(in + q_cols + c.kv_heads * d, c.kv_heads * d,
                    cache_row(c, op.layer, segment.slot, 1, position));
      }
    }
  }

  void do_attention(const Attention& op) override {
    const KvCache& c = *op.cache;
    const int d = c.head_dim, group = op.heads / c.kv_heads;
    std::vector<double> weights(static_cast<std::size_t>(op.segments.max_keys));
    for (int s = 0; s < valid(op.segments.count); ++s) {
      const Segment& segment = op.segments.device[s];
      const int keys = segment.past + segment.rows;
      for (int i = 0; i < segment.rows; ++i)
        for (int head = 0; head < op.heads; ++head) {
          const float* q = static_cast<const float*>(op.q) +
                           (static_cast<std::int64_t>(segment.row_begin + i) * op.heads + head) * d;
          double largest = -INFINITY, sum = 0;
          for (int key = 0; key < keys; ++key) {
            const float* k = cache_row(c, op.layer, segment.slot, 0, key) + head / group * d;
            double dot = 0;
            for (int j = 0; j < d; ++j) dot += static_cast<double>(q[j]) * k[j];
            weights[static_cast<std::size_t>(key)] = dot * op.scale;
            largest = std::max(largest, dot * op.scale);
          }
          for (int key = 0; key < keys; ++key)
            sum += weights[static_cast<std::size_t>(key)] =
                std::exp(weights[static_cast<std::size_t>(key)] - largest);
          float* out = row(op.out, segment.row_begin + i) + head * d;
          for (int j = 0; j < d; ++j) {
            double value = 0;
            for (int key = 0; key < keys; ++key)
              value += weights[static_cast<std::size_t>(key)] *
                       (cache_row(c, op.layer, segment.slot, 1, key) + head / group * d)[j];
            out[j] = static_cast<float>(value / sum);
          }
        }
    }
  }

  void do_time_embedding(const TimeEmbedding& op) override {
    for (int i = 0; i < op.steps; ++i)
      time_features(op.times[i], op.width, op.min_period, op.max_period, row(op.out, i));
  }

  void do_euler_step(const EulerStep& op) override {
    for (int i = 0; i < valid(op.rows); ++i)
      for (int c = 0; c < op.x.cols; ++c) row(op.x, i)[c] += op.dt * row(op.v, i)[c];
  }

 private:
  static float* cache_row(const KvCache& c, int layer, int slot, int value, int key) {
    return static_cast<float*>(c.data) +
           (((static_cast<std::int64_t>(layer) * c.slots + slot) * 2 + value) * c.keys + key) * c.kv_heads *
               c.head_dim;
  }
  // Half-split rotation of each head: (a, b) -> (a cos - b sin, b cos + a sin) with a = x[i], b = x[i + d/2].
  static void rotate(const float* in, float* out, int heads, int d, const RopeTable* rope, int position) {
    if (rope == nullptr) {
      std::copy_n(in, heads * d, out);
      return;
    }
    const float* cos = rope->cos + static_cast<std::int64_t>(position) * rope->half;
    const float* sin = rope->sin + static_cast<std::int64_t>(position) * rope->half;
    for (int head = 0; head < heads; ++head, in += d, out += d)
      for (int i = 0; i < d / 2; ++i) {
        const float a = in[i], b = in[i + d / 2];
        out[i] = a * cos[i] - b * sin[i];
        out[i + d / 2] = b * cos[i] + a * sin[i];
      }
  }

  // What Weight::layout points to: how the inputs of a product are rounded, beside format.input.
  struct QuantizedInputs {
    std::optional<float> scale;
    int zero = 0;
    std::vector<float> multiplier;
  };

  using Clock = std::chrono::steady_clock;
  std::vector<HostBlock> blocks_;
  std::deque<QuantizedInputs> inputs_;
  std::set<std::uint64_t> keys_;
  std::array<Clock::time_point, kMarks> marks_ = {};
};

}  // namespace

Result<std::unique_ptr<Backend>> make_reference_backend() {
  return std::unique_ptr<Backend>(new ReferenceBackend);
}

}  // namespace servoflow::ops
