#include "stages/preprocess/resize.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>

#include "core/status_macros.h"

namespace servoflow::stages {
namespace {

// A policy sees a handful of frame sizes; the limit only keeps a stream of ever-changing ones from filling
// memory.
constexpr std::size_t kMaxCachedAxes = 32;
constexpr int kFractionBits = ops::kResamplingBits;  // Pillow's: 32 bits less 8 of a pixel and 2 of headroom
constexpr std::int32_t kHalf = std::int32_t{1} << (kFractionBits - 1);

// Each of the 256 pixel values in float32, by the references' own operations: x / 255, or x / 255 * 2 - 1.
struct PixelTables {
  std::array<float, 256> unit, symmetric;
  PixelTables() {
    for (int i = 0; i < 256; ++i) {
      unit[i] = static_cast<float>(i) / 255.0f;
      symmetric[i] = unit[i] * 2.0f - 1.0f;
    }
  }
};
const PixelTables& pixel_tables() {
  static const PixelTables kTables;
  return kTables;
}

std::uint8_t to_pixel(std::int32_t sum) {
  return static_cast<std::uint8_t>(std::clamp(sum >> kFractionBits, 0, 255));
}

Status check_frame(std::size_t bytes, int width, int height, int size) {
  if (size < 1 || size > kMaxImageSide)
    return Status::invalid("the model's image side " + std::to_string(size) + " is out of range");
  if (width < 1 || height < 1 || width > kMaxImageSide || height > kMaxImageSide ||
      std::int64_t{width} * height > kMaxImagePixels) {
    return Status::invalid("a frame of " + std::to_string(width) + "x" + std::to_string(height) +
                           " pixels; sides must lie between 1 and " + std::to_string(kMaxImageSide) +
                           ", with at most 64 Mpixel in all");
  }
  const std::size_t expected = std::size_t{3} * width * height;
  if (bytes != expected) {
    return Status::invalid(std::to_string(bytes) + " bytes; " + std::to_string(width) + "x" +
                           std::to_string(height) + " RGB pixels have " + std::to_string(expected));
  }
  return Status::ok_status();
}

// Output i is a weighted sum of inputs first[i] … first[i] + second[i] - 1.
void build_pillow(AxisTable& axis) {
  const double scale = static_cast<double>(axis.in) / axis.out;
  const double filter_scale = std::max(scale, 1.0);
  const double support = filter_scale;  // the triangle's radius is 1
  axis.taps = static_cast<int>(std::ceil(support)) * 2 + 1;
  axis.table.assign(static_cast<std::size_t>(axis.out) * (2 + axis.taps), 0);
  std::int32_t *first = axis.table.data(), *second = first + axis.out, *weights = second + axis.out;
  std::vector<double> weight(axis.taps);
  const double inverse = 1.0 / filter_scale;
  for (int i = 0; i < axis.out; ++i, weights += axis.taps) {
    const double center = (i + 0.5) * scale;
    const int low = std::max(static_cast<int>(center - support + 0.5), 0);
    const int high = std::min(static_cast<int>(center + support + 0.5), axis.in);
    double total = 0;
    for (int k = low; k < high; ++k) {
      const double distance = std::abs((k - center + 0.5) * inverse);
      weight[k - low] = distance < 1.0 ? 1.0 - distance : 0.0;
      total += weight[k - low];
    }
    first[i] = low;
    second[i] = high - low;
    for (int k = 0; k < high - low; ++k) {
      const double normalized = total != 0 ? weight[k] / total : weight[k];
      weights[k] = static_cast<std::int32_t>(0.5 + normalized * (1 << kFractionBits));
    }
  }
}

// Output i is (1 - weight[i]) * in[first[i]] + weight[i] * in[second[i]].
void build_torch(AxisTable& axis) {
  const float scale = static_cast<float>(axis.in) / static_cast<float>(axis.out);
  axis.taps = 1;
  axis.table.resize(static_cast<std::size_t>(axis.out) * 3);
  std::int32_t *first = axis.table.data(), *second = first + axis.out, *weights = second + axis.out;
  for (int i = 0; i < axis.out; ++i) {
    // torch is compiled with this multiplication and subtraction fused; unfused ones are 2e-6 away from it.
    const float x = std::max(std::fma(scale, static_cast<float>(i) + 0.5f, -0.5f), 0.0f);
    const int low = std::min(static_cast<int>(x), axis.in - 1);
    first[i] = low;
    second[i] = std::min(low + 1, axis.in - 1);
    weights[i] = std::bit_cast<std::int32_t>(
        axis.in == axis.out ? 0.0f : std::clamp(x - static_cast<float>(low), 0.0f, 1.0f));
  }
}

}  // namespace

Result<Placement> fit(int width, int height, int size) {
  // The references' own float64 expressions, truncations included.
  const double ratio = std::max(static_cast<double>(width) / size, static_cast<double>(height) / size);
  Placement place;
  place.width = static_cast<int>(width / ratio);
  place.height = static_cast<int>(height / ratio);
  if (place.width < 1 || place.height < 1) {
    return Status::invalid("a frame of " + std::to_string(width) + "x" + std::to_string(height) +
                           " pixels is too narrow: its shorter side vanishes at model size " +
                           std::to_string(size));
  }
  place.left = (size - place.width) / 2;
  place.top = (size - place.height) / 2;
  return place;
}

const AxisTable& Letterbox::axis(int in, int out) {
  for (const auto& axis : cache_.axes) {
    if (axis->in == in && axis->out == out) return *axis;
  }
  if (cache_.axes.size() < kMaxCachedAxes) {
    cache_.axes.push_back(std::make_unique<AxisTable>());
    cache_.next = cache_.axes.size() - 1;
  } else {
    cache_.next = (cache_.next + 1) % kMaxCachedAxes;
  }
  AxisTable& axis = *cache_.axes[cache_.next];
  axis.in = in;
  axis.out = out;
  if (mode_ == contract::Resize::kPillow)
    build_pillow(axis);
  else
    build_torch(axis);
  return axis;
}

Letterbox::Letterbox(contract::Resize mode) : mode_(mode) {}

void Letterbox::resize_pillow(const std::uint8_t* rgb, int width, int height, const Placement& place,
                              int size, std::uint8_t* out) {
  const std::uint8_t* rows = rgb;  // [height, place.width, 3] after the horizontal pass
  if (place.width != width) {
    const AxisTable& axis = this->axis(width, place.width);
    const std::int32_t *first = axis.table.data(), *count = first + axis.out;
    narrow_.resize(std::size_t{3} * place.width * height);
    std::uint8_t* target = narrow_.data();
    for (int y = 0; y < height; ++y) {
      const std::uint8_t* row = rgb + std::size_t{3} * width * y;
      const std::int32_t* weights = count + axis.out;
      for (int x = 0; x < place.width; ++x, weights += axis.taps, target += 3) {
        const std::uint8_t* pixel = row + 3 * first[x];
        std::int32_t r = kHalf, g = kHalf, b = kHalf;
        for (int k = 0; k < count[x]; ++k, pixel += 3) {
          r += pixel[0] * weights[k];
          g += pixel[1] * weights[k];
          b += pixel[2] * weights[k];
        }
        target[0] = to_pixel(r);
        target[1] = to_pixel(g);
        target[2] = to_pixel(b);
      }
    }
    rows = narrow_.data();
  }

  const std::size_t stride = std::size_t{3} * place.width;
  std::uint8_t* target = out + (std::size_t{3} * place.top * size + 3 * place.left);
  if (place.height == height) {
    for (int y = 0; y < height; ++y, target += std::size_t{3} * size)
      std::memcpy(target, rows + stride * y, stride);
    return;
  }
  const AxisTable& axis = this->axis(height, place.height);
  const std::int32_t *first = axis.table.data(), *count = first + axis.out;
  sums_.resize(stride);
  for (int y = 0; y < place.height; ++y, target += std::size_t{3} * size) {
    const std::int32_t* weights = count + axis.out + static_cast<std::size_t>(y) * axis.taps;
    std::int32_t* sums = sums_.data();
    std::fill(sums_.begin(), sums_.end(), kHalf);
    for (int k = 0; k < count[y]; ++k) {
      const std::uint8_t* row = rows + stride * (first[y] + k);
      const std::int32_t weight = weights[k];
      for (std::size_t x = 0; x < stride; ++x) sums[x] += row[x] * weight;
    }
    for (std::size_t x = 0; x < stride; ++x) target[x] = to_pixel(sums[x]);
  }
}

void Letterbox::resize_torch(const std::uint8_t* rgb, int width, int height, const Placement& place, int size,
                             float* out) {
  const bool openpi = mode_ == contract::Resize::kOpenpiFloat;
  const std::array<float, 256>& table = openpi ? pixel_tables().symmetric : pixel_tables().unit;
  const AxisTable& columns = axis(width, place.width);
  const AxisTable& rows = axis(height, place.height);
  const std::int32_t *x_low = columns.table.data(), *x_high = x_low + columns.out,
                     *x_fraction = x_high + columns.out;
  const std::int32_t *y_low = rows.table.data(), *y_high = y_low + rows.out, *y_fraction = y_high + rows.out;
  std::fill(out, out + std::size_t{3} * size * size, -1.0f);  // lerobot's border of 0 becomes -1 as well
  for (int y = 0; y < place.height; ++y) {
    const std::uint8_t* upper = rgb + std::size_t{3} * width * y_low[y];
    const std::uint8_t* lower = rgb + std::size_t{3} * width * y_high[y];
    const float down = std::bit_cast<float>(y_fraction[y]), up = 1.0f - down;
    float* target = out + (std::size_t{3} * size * (place.top + y) + 3 * place.left);
    for (int x = 0; x < place.width; ++x) {
      const int low = 3 * x_low[x], high = 3 * x_high[x];
      const float right = std::bit_cast<float>(x_fraction[x]), left = 1.0f - right;
      for (int c = 0; c < 3; ++c) {
        const float top = table[upper[low + c]] * left + table[upper[high + c]] * right;
        const float bottom = table[lower[low + c]] * left + table[lower[high + c]] * right;
        const float value = top * up + bottom * down;
        *target++ = openpi ? std::clamp(value, -1.0f, 1.0f) : std::clamp(value, 0.0f, 1.0f) * 2.0f - 1.0f;
      }
    }
  }
}

Status Letterbox::run_u8(std::span<const std::uint8_t> rgb, int width, int height, int size,
                         std::span<std::uint8_t> out) {
  SF_RETURN_IF_ERROR(check_frame(rgb.size(), width, height, size));
  if (out.size() != std::size_t{3} * size * size)
    return Status::invalid("the picture's buffer has the wrong size");
  if (width == size && height == size) {
    std::copy(rgb.begin(), rgb.end(), out.begin());
    return Status::ok_status();
  }
  SF_ASSIGN_OR_RETURN(const Placement place, fit(width, height, size));
  if (place.width != size || place.height != size) std::fill(out.begin(), out.end(), std::uint8_t{0});
  resize_pillow(rgb.data(), width, height, place, size, out.data());
  return Status::ok_status();
}

Status Letterbox::run(std::span<const std::uint8_t> rgb, int width, int height, int size,
                      std::span<float> pixels) {
  SF_RETURN_IF_ERROR(check_frame(rgb.size(), width, height, size));
  if (pixels.size() != std::size_t{3} * size * size)
    return Status::invalid("the picture's buffer has the wrong size");
  std::span<const std::uint8_t> source = rgb;
  if (width != size || height != size) {
    if (mode_ != contract::Resize::kPillow) {
      SF_ASSIGN_OR_RETURN(const Placement place, fit(width, height, size));
      resize_torch(rgb.data(), width, height, place, size, pixels.data());
      return Status::ok_status();
    }
    square_.resize(pixels.size());
    SF_RETURN_IF_ERROR(run_u8(rgb, width, height, size, square_));
    source = square_;
  }
  const std::array<float, 256>& table = pixel_tables().symmetric;
  for (std::size_t i = 0; i < source.size(); ++i) pixels[i] = table[source[i]];
  return Status::ok_status();
}

bool Letterbox::fits_device(int width, int height) {
  return width > 0 && height > 0 && width <= ops::kMaxFrameSide && height <= ops::kMaxFrameSide &&
         std::uint64_t{3} * static_cast<std::uint64_t>(width) * static_cast<std::uint64_t>(height) <=
             ops::kMaxFrameBytes;
}

Status Letterbox::describe(std::span<const std::uint8_t> bytes, int width, int height, bool planes, int size,
                           RawFrame& out) {
  SF_RETURN_IF_ERROR(check_frame(bytes.size(), width, height, size));
  // A frame that is at model size already goes the same way: its weights are 1 and 0.
  SF_ASSIGN_OR_RETURN(const Placement place, fit(width, height, size));
  const ops::Resampling kind = mode_ == contract::Resize::kPillow        ? ops::Resampling::kFixedPoint
                               : mode_ == contract::Resize::kOpenpiFloat ? ops::Resampling::kSymmetric
                                                                         : ops::Resampling::kUnit;
  const auto take = [&](AxisTable& to, int from, int count) {
    if (to.in != from || to.out != count || out.frame.resampling != kind) to = axis(from, count);
  };
  take(out.columns, width, place.width);
  take(out.rows, height, place.height);
  out.bytes = bytes;
  out.frame = {.resampling = kind,
               .width = width,
               .height = height,
               .planes = planes ? 1 : 0,
               .left = place.left,
               .top = place.top,
               .columns = place.width,
               .rows = place.height,
               .column_taps = out.columns.taps,
               .row_taps = out.rows.taps};
  return Status::ok_status();
}

}  // namespace servoflow::stages
