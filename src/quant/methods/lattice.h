// The values that the codes of a number format stand for, before any scale: what rounding means to the
// methods of this folder. The codecs themselves (bytes, packing) are in quant/formats.h; the tests hold both
// together.
#pragma once

#include <cstdint>
#include <vector>

namespace servoflow::quant {

// Symmetric about zero, but for the one extra negative code of two's complement. Rounding is to the nearest
// value, ties to the even code, saturating at both ends: what PyTorch's casts (after a clamp) and torch.round
// do.
class Lattice {
 public:
  // 2 to 8 bits, two's complement: -2^(b-1) … 2^(b-1) - 1.
  static Lattice integer(int bits);
  static Lattice e2m1();
  static Lattice e4m3();
  static Lattice e5m2();

  float snap(float x) const;
  float max() const { return magnitudes_.back(); }
  float lowest() const { return lowest_; }
  // The magnitude the code just above zero has.
  float smallest() const { return magnitudes_[1]; }
  const std::vector<float>& magnitudes() const { return magnitudes_; }  // ascending from 0

 private:
  explicit Lattice(std::vector<float> magnitudes, bool uniform, float lowest);
  std::vector<float> magnitudes_;
  bool uniform_ = false;  // integers: rounding is arithmetic
  float lowest_ = 0;
};

}  // namespace servoflow::quant
