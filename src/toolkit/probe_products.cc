// Products at the sizes of the model's layers, through a backend's own kernels.
#include <algorithm>
#include <array>
#include <chrono>
#include <span>

#include "core/bf16.h"
#include "core/status_macros.h"
#include "quant/matrix.h"
#include "toolkit/probe_parts.h"

namespace servoflow::toolkit {
namespace {

using Clock = std::chrono::steady_clock;
constexpr int kMostCopies = 64;

// Uniform in [-1, 1): zeros would draw less power, and run at a higher clock, than work does.
std::vector<bf16> noise(std::size_t count, std::uint32_t seed) {
  std::vector<bf16> out(count);
  for (bf16& value : out) {
    seed = seed * 1664525u + 1013904223u;
    value = to_bf16(static_cast<float>(static_cast<std::int32_t>(seed)) * 0x1p-31f);
  }
  return out;
}

std::string describe_product(const ProductSite& s, int rows, const std::string& precision) {
  return s.stage + " " + s.name + " " + std::to_string(rows) + " x " + std::to_string(s.n) + " x " +
         std::to_string(s.k) + " in " + precision;
}

// One site on a backend of its own: memory of a backend goes with it.
class SiteBench {
 public:
  SiteBench(const ProductOptions& options, const ProductSite& site) : o_(options), site_(site) {}

  Status open(bool few_rows) {
    SF_ASSIGN_OR_RETURN(
        ops::BackendChoice choice,
        ops::make_backend({.device = o_.device, .precision = o_.precision.backend, .threads = o_.threads}));
    backend_ = std::move(choice.backend);
    const std::uint64_t each = weight_bytes();
    // Enough that a weight has left the cache when its turn comes again.
    const std::uint64_t wanted = each > 0 ? 3 * o_.cache_bytes / each + 2 : 1;
    const int copies =
        each > 2 * o_.cache_bytes ? 1 : static_cast<int>(std::min<std::uint64_t>(wanted, kMostCopies));
    const bool low = o_.precision.format.quantized();
    const std::vector<bf16> values = backend_->generates() && !low
                                         ? std::vector<bf16>()
                                         : noise(static_cast<std::size_t>(site_.n) * depth(), 1);
    // Rounded once; each copy is packed into memory of its own.
    quant::QuantizedMatrix matrix;
    if (low) {
      std::vector<float> wide(values.size());
      std::transform(values.begin(), values.end(), wide.begin(), [](bf16 v) { return to_float(v); });
      SF_ASSIGN_OR_RETURN(matrix, quant::quantize(wide, site_.n, site_.k, o_.precision.format));
    }
    for (int i = 0; i < copies; ++i) {
      ops::HostMatrix host{DType::kBF16, site_.n, site_.k, std::as_bytes(std::span(values)), "probe"};
      if (low) {
        host.bytes = {};
        host.quantized = &matrix;
      }
      if (values.empty()) host.sequence = ops::Sequence{.state = static_cast<std::uint64_t>(i), .amp = 1};
      // A GPU's layout for few rows is for its denoise loop alone, which is more than products.
      SF_ASSIGN_OR_RETURN(ops::Weight w,
                          backend_->pack({&host, 1}, {.few_rows = few_rows && !backend_->records()}));
      weights_.push_back(w);
    }
    return backend_->finish();
  }

  std::uint64_t weight_bytes() const {
    return static_cast<std::uint64_t>(static_cast<double>(site_.n) * site_.k * o_.precision.bits / 8);
  }
  // As the backend stores it.
  std::uint64_t packed_bytes() const { return weights_[0].bytes; }
  std::string backend() const { return backend_->name(); }

  Result<Measured> run(int rows, bool cold) {
    const DType act = backend_->activation_dtype();
    const auto matrix = [&](int cols) -> Result<ops::Matrix> {
      ops::Matrix m{.dtype = act, .rows = rows, .cols = cols, .pitch = backend_->pitch(cols, act)};
      SF_ASSIGN_OR_RETURN(m.data,
                          backend_->allocate(static_cast<std::uint64_t>(rows * m.pitch) * dtype_size(act)));
      return m;
    };
    SF_ASSIGN_OR_RETURN(const ops::Matrix x, matrix(site_.k));
    SF_ASSIGN_OR_RETURN(const ops::Matrix y, matrix(site_.n));
    const std::vector<bf16> values = noise(static_cast<std::size_t>(rows * x.pitch), 2);
    std::vector<float> wide(act == DType::kF32 ? values.size() : 0);
    for (std::size_t i = 0; i < wide.size(); ++i) wide[i] = to_float(values[i]);
    backend_->upload(x.data, wide.empty() ? static_cast<const void*>(values.data()) : wide.data(),
                     values.size() * dtype_size(act));
    SF_RETURN_IF_ERROR(backend_->finish());

    // A GPU replays several products as one record: a single one is shorter than what a call costs.
    const int copies = cold ? static_cast<int>(weights_.size()) : 1;
    const int calls = !backend_->records() ? 1 : rows <= 128 ? std::max(40, copies) : std::max(6, copies);
    std::size_t next = 0;
    const auto body = [&] {
      backend_->mark(0);
      for (int i = 0; i < calls; ++i) {
        backend_->matmul({.x = x,
                          .w = &weights_[next % static_cast<std::size_t>(copies)],
                          .y = y,
                          .rows = {rows, nullptr, rows}});
        ++next;
      }
      backend_->mark(1);
    };
    std::vector<double> samples;
    const Clock::time_point first = Clock::now();
    const auto elapsed = [&] { return std::chrono::duration<double>(Clock::now() - first).count(); };
    ++key_;
    // The first run warms up, or records.
    for (int i = 0; i < 4 || (i < 200 && elapsed() < o_.seconds_each); ++i) {
      const Clock::time_point begin = Clock::now();
      backend_->replay(
          key_, [] {}, body);
      SF_RETURN_IF_ERROR(backend_->finish());
      const double wall = std::chrono::duration<double, std::micro>(Clock::now() - begin).count();
      const double device = backend_->elapsed(0, 1) * 1e3;
      if (i > 0) samples.push_back((device > 0 ? device : wall) / calls);
    }
    return measured(std::move(samples));
  }

  bool fits_into_cache() const { return weights_.size() > 1 && weight_bytes() <= o_.cache_bytes * 3 / 4; }
  // Weights, their copies on the way in, and rows.
  std::uint64_t memory_needed() const {
    const std::uint64_t each = weight_bytes();
    // Rounding takes the weight in float32 as well.
    const std::uint64_t wide =
        o_.precision.format.quantized() ? 6 * static_cast<std::uint64_t>(site_.n) * depth() : 0;
    return std::max<std::uint64_t>(each + 4 * o_.cache_bytes, 2 * each) + wide + (std::uint64_t{512} << 20);
  }

 private:
  std::size_t depth() const { return static_cast<std::size_t>(site_.k); }

  const ProductOptions& o_;
  const ProductSite& site_;
  std::unique_ptr<ops::Backend> backend_;
  std::vector<ops::Weight> weights_;
  std::uint64_t key_ = 0;
};

}  // namespace

std::vector<ProductSite> model_sites(const weights::Architecture& a) {
  const int picture = a.vision.tokens(), prompt = 200;
  const auto gemma = [](const std::string& stage, const weights::GemmaSizes& g,
                        const std::vector<int>& rows) {
    const int attention = g.heads * g.head_dim;
    return std::vector<ProductSite>{
        {stage, "gate_up", 2 * g.mlp, g.width, g.depth, rows},
        {stage, "down", g.width, g.mlp, g.depth, rows},
        {stage, "qkv", attention + 2 * g.kv_heads * g.head_dim, g.width, g.depth, rows},
        {stage, "out", g.width, attention, g.depth, rows}};
  };
  std::vector<ProductSite> out = gemma("expert", a.expert, {50, 10});
  for (ProductSite& s : gemma("prefix", a.prefix, {2 * picture + prompt, 3 * picture + prompt})) {
    if (s.name != "qkv") s.per_pass -= 1;  // the last layer ends with its keys and values
    out.push_back(std::move(s));
  }
  const weights::VisionSizes& v = a.vision;
  for (const auto& [name, n, k] :
       {std::tuple("up", v.mlp, v.width), std::tuple("down", v.width, v.mlp),
        std::tuple("qkv", 3 * v.width, v.width), std::tuple("out", v.width, v.width)})
    out.push_back({"vision", name, n, k, v.depth, {2 * picture}});
  return out;
}

std::vector<ProductPrecision> product_precisions(const std::string& device) {
  std::vector<ProductPrecision> out = {{"bf16", "bf16", 16}};
  if (const auto choice = ops::make_backend({.device = device, .precision = "bf16"}); choice.ok())
    for (const char* name : {"int8-w8a8", "fp8-w8a8", "int4-g128-w4a16", "nvfp4-w4a16"}) {
      const auto format = quant::parse_format(name);
      if (!format.ok() || choice->backend->low_bit_kernel(*format).empty()) continue;
      // Of a weight of the prefix, scales included.
      out.push_back({name, "bf16", quant::bits_per_weight(format->weight, 2048, 2048), *format});
    }
  // FP32 arithmetic keeps weights as checkpoints have them.
  out.push_back({"fp32", "fp32", 16});
  return out;
}

Status measure_products(const ProductOptions& o, const std::vector<ProductSite>& sites, const Budget& budget,
                        double until, std::vector<ProductRate>& out, std::vector<std::string>& skipped) {
  const double begin = budget.used();
  double expected = o.expected_gops;  // then what was seen
  for (const ProductSite& site : sites) {
    SiteBench bench(o, site);
    bool opened = false;
    for (const int rows : site.rows) {
      const std::string name = describe_product(site, rows, o.precision.name);
      // Four runs at least. The first number of rows is what all else is worked out from; others may take two
      // thirds of the time.
      const double guess = expected > 0 ? 4 * 2e-9 * rows * site.n * site.k / expected : 0;
      const double limit = rows == site.rows.front() ? until : begin + (until - begin) * 2 / 3;
      if (budget.used() + guess > limit) {
        skipped.push_back(name + ": no time left");
        continue;
      }
      if (bench.memory_needed() > o.memory_bytes) {
        skipped.push_back(name + ": needs " + std::to_string(bench.memory_needed() >> 20) +
                          " MiB of memory, " + std::to_string(o.memory_bytes >> 20) + " may be taken");
        continue;
      }
      if (!opened) {
        SF_RETURN_IF_ERROR(bench.open(*std::max_element(site.rows.begin(), site.rows.end()) <= 128));
        opened = true;
      }
      for (const bool cold : {true, false}) {
        if (!cold && !bench.fits_into_cache()) continue;
        ProductRate rate{.stage = site.stage,
                         .site = site.name,
                         .m = rows,
                         .n = site.n,
                         .k = site.k,
                         .precision = o.precision.name,
                         .cold = cold,
                         .by = bench.backend(),
                         .weight_bytes = bench.packed_bytes()};
        SF_ASSIGN_OR_RETURN(rate.us, bench.run(rows, cold));
        if (rows >= 256 && rate.gops() > 0) expected = rate.gops();
        out.push_back(std::move(rate));
      }
    }
  }
  return {};
}

std::vector<ThreadPoint> measure_threads(const weights::Architecture& a, int threads, const Budget& budget,
                                         double until, std::vector<std::string>& left_out) {
  std::vector<ThreadPoint> out;
  const std::vector<ProductSite> sites = model_sites(a);
  const auto find = [&](const char* stage, const char* name) {
    return *std::find_if(sites.begin(), sites.end(),
                         [&](const ProductSite& s) { return s.stage == stage && s.name == name; });
  };
  ProductSite expert = find("expert", "gate_up"), vision = find("vision", "up");
  expert.rows.resize(1);
  for (const int t : thread_counts(threads)) {
    const std::string name = "products with " + std::to_string(t) + " threads";
    if (budget.used() > until) {
      left_out.push_back(name + ": no time left");
      continue;
    }
    std::vector<ProductRate> rates;
    std::vector<std::string> skipped;
    const ProductOptions options{.device = "cpu",
                                 .threads = t,
                                 .precision = {"bf16", "bf16", 16},
                                 .cache_bytes = 0,
                                 .memory_bytes = std::uint64_t{1} << 40,
                                 .seconds_each = 0.1};
    const Status status = measure_products(options, {expert, vision}, budget, until, rates, skipped);
    if (!status.ok() || rates.size() != 2) {
      left_out.push_back(name + ": " + (status.ok() ? "no time left" : status.message()));
      continue;
    }
    out.push_back({.threads = t, .expert_us = rates[0].us, .vision_us = rates[1].us});
  }
  return out;
}

}  // namespace servoflow::toolkit
