// Fetching the tensors of one layer, with every contradiction named.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "quant/checkpoint.h"

namespace servoflow::quant {

class LayerReader {
 public:
  LayerReader(std::string layer, const TensorLookup& lookup) : layer_(std::move(layer)), lookup_(lookup) {}

  std::string full(const std::string& part) const { return layer_ + "." + part; }
  bool has(const std::string& part) const { return lookup_(full(part)).has_value(); }
  Status error(const std::string& part, const std::string& cause) const {
    return Status::invalid("tensor " + full(part) + ": " + cause);
  }
  // The tensor, if its type is among `dtypes`, its shape among `shapes` and its bytes as many as those say.
  Result<TensorView> get(const std::string& part, std::initializer_list<DType> dtypes,
                         const std::vector<Shape>& shapes) const;
  // Its elements as binary32, finite; F32, BF16 and F16.
  Result<std::vector<float>> floats(const std::string& part, const std::vector<Shape>& shapes) const;
  // One positive finite number, shape [] or [1], whose inverse is finite too.
  Result<float> positive(const std::string& part) const;
  Result<std::vector<std::int32_t>> int32s(const std::string& part, const Shape& shape) const;

 private:
  std::string layer_;
  const TensorLookup& lookup_;
};

// Storage for what cannot be a view of the file.
struct OwnedBytes {
  std::vector<std::uint8_t> codes, scales;
};

inline std::span<const std::uint8_t> as_u8(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size()};
}

// Sets m.scales (a view; F16 is widened into `owned`) and m.format.weight.scale by the tensor's type, and
// refuses NaN, infinity and negative scales.
Status read_scales(const LayerReader& reader, const std::string& part, std::initializer_list<DType> dtypes,
                   const std::vector<Shape>& shapes, OwnedBytes& owned, QuantizedMatrix& m);
// FP8 codes that are NaN have no place in weights.
Status check_fp8_codes(const LayerReader& reader, const std::string& part,
                       std::span<const std::uint8_t> codes);

// The layer's tensors in each library's layout. `m` has format, rows, cols and scale shape set.
Status read_compressed_tensors(const LayerReader& reader, const ConfigGroup& group, OwnedBytes& owned,
                               QuantizedMatrix& m);
Status read_modelopt(const LayerReader& reader, const ConfigGroup& group, OwnedBytes& owned,
                     QuantizedMatrix& m);
Result<std::vector<StoredTensor>> write_compressed_tensors(const std::string& layer,
                                                           const QuantizedMatrix& m);
Result<std::vector<StoredTensor>> write_modelopt(const std::string& layer, const QuantizedMatrix& m);

// For writers.
StoredTensor floats_tensor(const std::string& name, const Shape& shape, std::span<const float> values);
// Codes as the files store them: rows of `cols` elements, zeros (under the zero point, if any) from m.cols
// on.
std::vector<std::uint8_t> padded_codes(const QuantizedMatrix& m, std::int64_t cols);
StoredTensor scales_tensor(const std::string& name, const Shape& shape, const QuantizedMatrix& m);

}  // namespace servoflow::quant
