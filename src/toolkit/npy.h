// NumPy's .npy container, as far as arrays of numbers cross the command line: float32 and float64, C order.
//
// Bytes: "\x93NUMPY", u8 major, u8 minor, header length (u16 little-endian in version 1, u32 in 2 and 3),
// then a Python dict literal {'descr': '<f8', 'fortran_order': False, 'shape': (10, 7), } padded with spaces
// and a newline, then data. Non-goals: other dtypes, big-endian data, Fortran order, pickled objects; each is
// an error that says how to convert.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "core/shape.h"
#include "servoflow/status.h"

namespace servoflow::toolkit {

struct NpyArray {
  Shape shape;
  std::vector<double> values;  // row-major; float32 files are widened, which is exact
};

// Parses a whole file's bytes; `where` (a path) starts every error message.
Result<NpyArray> parse_npy(std::span<const std::byte> bytes, const std::string& where);
// Reads a file of at most 256 MiB.
Result<NpyArray> read_npy(const std::string& path);

// A version-1 file with these values; `values` has as many elements as `shape`.
std::vector<std::byte> npy_bytes(const Shape& shape, std::span<const double> values);
std::vector<std::byte> npy_bytes(const Shape& shape, std::span<const float> values);

}  // namespace servoflow::toolkit
