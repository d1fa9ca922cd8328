// The contracts of ops.h, checked in one place: every public operation of Backend passes through here.
#include "ops/backend.h"

namespace servoflow::ops {
namespace {

#define SF_REQUIRE(condition) \
  if (!(condition)) return #condition

bool usable(const Matrix& m) { return m.data != nullptr && m.rows > 0 && m.cols > 0 && m.pitch >= m.cols; }
bool fits(const Count& rows, const Matrix& m) { return rows.capacity > 0 && rows.capacity <= m.rows; }
bool usable(const Segments& s) {
  return s.device != nullptr && s.count.capacity > 0 && s.max_rows > 0 && s.max_keys >= s.max_rows;
}
bool usable(const ModulationRow& m, int width) {
  return m.table != nullptr && m.width == width && m.site >= 0 && m.base >= 0;
}
bool usable(const KvCache* c, int layer, const Segments& s) {
  return c != nullptr && c->data != nullptr && layer >= 0 && layer < c->layers && s.max_keys <= c->keys;
}

const char* broken(const Letterbox& op) {
  SF_REQUIRE(op.frames != nullptr && op.data != nullptr && op.pixels != nullptr);
  SF_REQUIRE(op.pictures.capacity > 0 && op.image > 0);
  return nullptr;
}

// One axis of a frame: `in` inputs, `out` outputs, its tables at byte `at`.
const char* broken_axis(const Frame& f, std::span<const std::byte> tables, std::int64_t at, int taps, int in,
                        int out) {
  SF_REQUIRE(taps > 0 && at >= 0 && at % 4 == 0);
  const std::uint64_t need = static_cast<std::uint64_t>(out) * (2 + static_cast<std::uint64_t>(taps)) * 4;
  SF_REQUIRE(static_cast<std::uint64_t>(at) <= tables.size() &&
             need <= tables.size() - static_cast<std::uint64_t>(at));
  const auto* first = reinterpret_cast<const std::int32_t*>(tables.data() + at);
  const auto* second = first + out;
  const bool sums = f.resampling == Resampling::kFixedPoint;
  for (int i = 0; i < out; ++i) {
    SF_REQUIRE(first[i] >= 0 && first[i] < in && second[i] >= 0 && second[i] <= in);
    SF_REQUIRE(sums ? second[i] <= taps && second[i] <= in - first[i] : second[i] < in);
  }
  return nullptr;
}

const char* broken(const Frame& f, std::span<const std::byte> tables, std::uint64_t bytes, int image) {
  SF_REQUIRE(image > 0 && f.width > 0 && f.height > 0 && f.pixels >= 0 && f.pixels % 4 == 0);
  const bool ready = f.resampling == Resampling::kReady;
  SF_REQUIRE(!ready || (f.width == image && f.height == image));
  SF_REQUIRE(ready || (f.width <= kMaxFrameSide && f.height <= kMaxFrameSide));
  const std::uint64_t need = std::uint64_t{3} * static_cast<std::uint64_t>(f.width) *
                             static_cast<std::uint64_t>(f.height) * (ready ? sizeof(float) : 1);
  SF_REQUIRE(ready || need <= kMaxFrameBytes);
  SF_REQUIRE(static_cast<std::uint64_t>(f.pixels) <= bytes &&
             need <= bytes - static_cast<std::uint64_t>(f.pixels));
  if (ready) return nullptr;
  SF_REQUIRE(f.resampling == Resampling::kFixedPoint || (f.column_taps == 1 && f.row_taps == 1));
  SF_REQUIRE(f.columns > 0 && f.left >= 0 && f.columns <= image - f.left);
  SF_REQUIRE(f.rows > 0 && f.top >= 0 && f.rows <= image - f.top);
  if (const char* b = broken_axis(f, tables, f.column_table, f.column_taps, f.width, f.columns)) return b;
  return broken_axis(f, tables, f.row_table, f.row_taps, f.height, f.rows);
}

const char* broken(const PatchRows& op) {
  SF_REQUIRE(op.pixels != nullptr && op.pictures.capacity > 0 && op.patch > 0 && op.image > 0 &&
             op.image % op.patch == 0);
  const int tokens = (op.image / op.patch) * (op.image / op.patch);
  const int values = 3 * op.patch * op.patch;
  SF_REQUIRE(usable(op.out) && (op.out.dtype == DType::kF32 || op.out.dtype == DType::kBF16));
  SF_REQUIRE(op.out.dtype == DType::kF32 ? op.out.cols == values
                                         : op.out.cols == 2 * values || op.out.cols == 3 * values);
  SF_REQUIRE(op.out.rows >= op.pictures.capacity * tokens);
  return nullptr;
}

const char* broken(const ScaleRows& op) {
  SF_REQUIRE(usable(op.x) && usable(op.y) && op.x.cols == op.y.cols && op.rows.capacity > 0);
  SF_REQUIRE(op.x.dtype == DType::kF32 || op.x.dtype == DType::kBF16);
  SF_REQUIRE(op.y.dtype == DType::kF32);
  SF_REQUIRE(op.ids != nullptr || fits(op.rows, op.x));
  SF_REQUIRE(op.row_map != nullptr || fits(op.rows, op.y));
  return nullptr;
}

const char* broken(const Matmul& op) {
  SF_REQUIRE(op.w != nullptr && op.w->data != nullptr && usable(op.x) && usable(op.y) && fits(op.rows, op.x));
  const Epilogue& e = op.epilogue;
  SF_REQUIRE(op.x.cols == op.w->k);
  SF_REQUIRE(!e.geglu || op.w->paired);
  SF_REQUIRE(op.y.cols == (e.geglu ? op.w->n / 2 : op.w->n));
  SF_REQUIRE(e.row_map != nullptr || fits(op.rows, op.y));
  SF_REQUIRE(!e.accumulate || op.y.dtype == DType::kF32);
  SF_REQUIRE(e.gate == nullptr || usable(*e.gate, op.y.cols));
  SF_REQUIRE(e.row_bias == nullptr || e.row_bias_period > 0);
  SF_REQUIRE(!e.geglu || (e.activation == Activation::kNone && e.bias == nullptr && e.row_bias == nullptr));
  return nullptr;
}

const char* broken(const LayerNorm& op) {
  SF_REQUIRE(usable(op.x) && usable(op.y) && op.x.cols == op.y.cols && fits(op.rows, op.x) &&
             fits(op.rows, op.y));
  SF_REQUIRE(op.x.dtype == DType::kF32 && op.weight != nullptr && op.bias != nullptr && op.eps > 0);
  return nullptr;
}

const char* broken(const RmsNorm& op) {
  SF_REQUIRE(usable(op.x) && usable(op.y) && op.x.cols == op.y.cols && fits(op.rows, op.x) &&
             fits(op.rows, op.y));
  SF_REQUIRE(op.x.dtype == DType::kF32 && op.eps > 0);
  SF_REQUIRE((op.weight != nullptr) != (op.modulation != nullptr));
  SF_REQUIRE(op.modulation == nullptr || usable(*op.modulation, op.x.cols));
  return nullptr;
}

const char* broken(const SplitQkv& op) {
  SF_REQUIRE(usable(op.qkv) && op.qkv.dtype == DType::kF32 && usable(op.segments) && op.q != nullptr);
  SF_REQUIRE(usable(op.cache, op.layer, op.segments));
  SF_REQUIRE(op.heads > 0 && op.heads % op.cache->kv_heads == 0);
  SF_REQUIRE(op.qkv.cols == (op.heads + 2 * op.cache->kv_heads) * op.cache->head_dim);
  SF_REQUIRE(op.rope == nullptr ||
             (op.rope->half * 2 == op.cache->head_dim && op.segments.max_keys <= op.rope->positions));
  return nullptr;
}

const char* broken(const Attention& op) {
  SF_REQUIRE(op.q != nullptr && usable(op.segments) && usable(op.cache, op.layer, op.segments) &&
             usable(op.out));
  SF_REQUIRE(op.heads > 0 && op.heads % op.cache->kv_heads == 0 &&
             op.out.cols == op.heads * op.cache->head_dim);
  return nullptr;
}

const char* broken(const TimeEmbedding& op) {
  SF_REQUIRE(op.times != nullptr && op.steps > 0 && op.width > 0 && op.width % 2 == 0 && usable(op.out));
  SF_REQUIRE(op.out.dtype == DType::kF32 && op.out.rows >= op.steps && op.out.cols == op.width);
  SF_REQUIRE(op.min_period > 0 && op.max_period > 0);
  return nullptr;
}

const char* broken(const EulerStep& op) {
  SF_REQUIRE(usable(op.x) && usable(op.v) && op.x.cols == op.v.cols && fits(op.rows, op.x) &&
             fits(op.rows, op.v));
  SF_REQUIRE(op.x.dtype == DType::kF32 && op.v.dtype == DType::kF32);
  return nullptr;
}

#undef SF_REQUIRE
}  // namespace

Status check_frame(const Frame& frame, std::span<const std::byte> tables, std::uint64_t bytes, int image) {
  const char* b = broken(frame, tables, bytes, image);
  if (b == nullptr) return {};
  return Status::invalid("a frame of " + std::to_string(frame.width) + "x" + std::to_string(frame.height) +
                         " pixels cannot become a picture: contract broken: " + b);
}

#define SF_CHECKED(method, Op)                       \
  void Backend::method(const Op& op) {               \
    if (check(#method, broken(op))) do_##method(op); \
  }
SF_CHECKED(letterbox, Letterbox)
SF_CHECKED(patch_rows, PatchRows)
SF_CHECKED(scale_rows, ScaleRows)
SF_CHECKED(layer_norm, LayerNorm)
SF_CHECKED(rms_norm, RmsNorm)
SF_CHECKED(split_qkv, SplitQkv)
SF_CHECKED(attention, Attention)
SF_CHECKED(time_embedding, TimeEmbedding)
SF_CHECKED(euler_step, EulerStep)
#undef SF_CHECKED

void Backend::matmul(const Matmul& op) {
  if (!check("matmul", broken(op))) return;
  if (observer_ != nullptr) observer_->before(op);
  do_matmul(op);
}

}  // namespace servoflow::ops
