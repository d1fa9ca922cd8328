// Products with weights of 8 and 4 bits: how they lie in memory, and the inner loops over them.
//
// Two ways. int8 weights with int8 inputs and no scale along K are multiplied as integers (VPDPBUSD): exact
// sums, one scale per row and column afterwards. Everything else becomes bf16 (or float32) panels that the
// ordinary products read, once per block of rows: codes of 8 bits and less are exact in bf16, and so is an
// E2M1 code times its E4M3 or E8M0 scale; scales that are not go onto the sum of their group. So a product
// never sees a weight rounded a second time, and inputs that are rounded to 8 bits or less enter as their
// codes.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "ops/cpu/kernels.h"
#include "quant/matrix.h"

namespace servoflow::ops::cpu {

// Layouts of a panel of 32 columns.
enum class Codes : std::uint8_t {
  kQuads8,  // [ceil(k/4)][32][4] int8, four k side by side
  kPairs8,  // [ceil(k/2)][32][2] bytes: an entry of `table` each
  kPairs4,  // [ceil(k/2)][32] bytes; byte i: low nibble column i / 2, high nibble column 16 + i / 2, both k =
            // i % 2; E2M1 codes in the order of kE2M1Order
};
// Magnitudes of E2M1 by their code, so that the lowest bit says: no factor of 1.5 (0 0.5 1.5 1 3 2 6 4).
inline constexpr std::uint8_t kE2M1Order[8] = {0, 1, 3, 2, 5, 4, 7, 6};

// What Weight::layout points to.
struct LowBitWeight {
  quant::LinearFormat format;
  Codes codes = Codes::kQuads8;
  int k = 0, panels = 0;
  const std::byte* data = nullptr;
  std::int64_t panel_bytes = 0;
  // bf16 values of codes: 256, or 32 with index code + shift.
  std::vector<std::uint16_t> table;
  // Along K: `group` k's share a scale (0: none does), in `groups` groups, the last perhaps shorter.
  // [panels][groups][32]
  int group = 0, groups = 0;
  const std::uint16_t* folded = nullptr;  // bf16 scales that are multiplied into the panel
  // E2M1 codes times E4M3 scales, none of them zero: no product leaves bf16's normal numbers.
  bool adds_exponents = false;
  const float* scales = nullptr;         // or float32 scales of a group's sum
  const std::uint8_t* shifts = nullptr;  // of table indices: zero points
  // Per column, [panels * 32].
  const float* column_scale = nullptr;
  const std::int32_t* column_sum = nullptr;  // kQuads8: of the codes
  // Inputs.
  std::optional<float> input_scale;  // static
  int input_zero = 0;
  const float* input_multiplier = nullptr;  // [k]
};

// Inputs of this format leave their rounding as numbers that bf16 holds: codes beside one scale per row, or
// codes times scales of a few bits. The others have float scales along K.
bool bf16_holds(const quant::InputFormat& in);

// c[i][0..31] (+)= (a[i] as unsigned bytes) · panel for i in [0, m), in int32. a_pitch in bytes. What a holds
// beyond k up to a multiple of four is multiplied by zeros.
using Int8Product = void (*)(const std::uint8_t* a, std::int64_t a_pitch, int m, const std::byte* panel,
                             int quads, std::int32_t* c, std::int64_t c_pitch, bool accumulate);
// AVX-512 VNNI; null where the CPU or the build has none.
Int8Product int8_dot_product();

// As PanelProduct, but the sum over each `group` of k (even; the last may be shorter) counts times a scale of
// its column: scales [groups][32].
using GroupedProduct = void (*)(const void* a, std::int64_t a_pitch, int m, const void* panel, int k,
                                int group, const float* scales, float* c, std::int64_t c_pitch,
                                bool accumulate);
GroupedProduct bf16_dot_grouped_product();  // where bf16_dot_product() is

// A stretch of a panel's pairs from codes to bf16, [pairs][32][2]. It begins with a group.
struct UnpackBlock {
  Codes codes = Codes::kPairs8;
  quant::Code code = quant::Code::kInt8;
  const std::byte* data = nullptr;
  int pairs = 0;
  const std::uint16_t* table = nullptr;
  int group_pairs = 0;                    // 0: neither of the following
  const std::uint8_t* shifts = nullptr;   // [groups][32] or null
  const std::uint16_t* folded = nullptr;  // [groups][32] or null
  bool adds_exponents = false;            // as in LowBitWeight
  std::uint32_t* panel = nullptr;
};
using Unpack = void (*)(const UnpackBlock& block);
void unpack_plain(const UnpackBlock& block);
Unpack unpack_avx512();  // null where the CPU or the build has none

// Unpacking and product in one: c (+)= a · the block's panel, for bf16 a; with `scales` as in GroupedProduct.
using CodesProduct = void (*)(const void* a, std::int64_t a_pitch, int m, const UnpackBlock& block, int k,
                              const float* scales, float* c, std::int64_t c_pitch, bool accumulate);
CodesProduct bf16_dot_codes_product();  // null where the CPU or the build has none

// Whether a CodesProduct decodes such a panel while its first rows multiply, where there are at least ten.
inline bool decodes_in_place(Codes codes, bool adds_exponents, const float* scales) {
  return codes == Codes::kPairs4 && (adds_exponents || scales != nullptr);
}

// ---- rows, in the widest vectors the CPU has

// Rows of inputs become codes. `values`: [k] float32 of the thread's own.
struct InputRow {
  const void* x = nullptr;
  DType dtype = DType::kF32;
  int k = 0;
  const float* multiplier = nullptr;  // [k] or null
  std::optional<float> static_scale;
  float* values = nullptr;
};
// code + 128 + zero in [0, 255] into out, up to a multiple of four with 128; the row's scale. A row with a
// NaN or infinity gets the scale NaN, so that nothing hides it.
float int8_row(const InputRow& row, int zero, std::uint8_t* out);
// Codes as numbers, in `dtype` (bf16 or float32): int8, E4M3 with one scale per row; the row's scale.
float code_row(const InputRow& row, quant::Code code, void* out, DType dtype);
// E2M1 codes times their E4M3 scales of 16: numbers that bf16 holds; the row's second scale.
float nvfp4_row(const InputRow& row, void* out, DType dtype);
// x · multiplier into row.values.
void load_input_row(const InputRow& row);

// In place, c[i][j] from int32 to float32: (c - correction · column_sum[j]) · column_scale[j] · row_scale[i].
void scale_ints(std::int32_t* c, std::int64_t pitch, int rows, int cols, int correction,
                const std::int32_t* column_sum, const float* column_scale, const float* row_scale);
// c[i][j] *= column_scale[j] · row_scale[i]; either may be null.
void scale_floats(float* c, std::int64_t pitch, int rows, int cols, const float* column_scale,
                  const float* row_scale);

}  // namespace servoflow::ops::cpu
