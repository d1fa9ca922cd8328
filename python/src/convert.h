// What crosses between Python and the C++ API: arrays in, a chunk out, a status as an exception.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "servoflow/action_chunk.h"
#include "servoflow/observation.h"
#include "servoflow/status.h"

namespace servoflow::python {

namespace nb = nanobind;

// C-contiguous arrays in host memory, read-only allowed. Whoever calls (servoflow/_observation.py) has
// checked and converted; a mismatch here is a TypeError.
template <typename T, typename... Shape>
using HostArray = nb::ndarray<const T, nb::c_contig, nb::device::cpu, Shape...>;
using ImageArray = HostArray<std::uint8_t>;  // [height, width, 3], [3, height, width] or the bytes of a file
using StateArray = HostArray<double, nb::ndim<1>>;
using TokenArray = HostArray<std::int32_t, nb::ndim<1>>;
using NoiseArray = HostArray<float>;

// Raises the exception of servoflow/_errors.py that goes with the code.
[[noreturn]] void raise_status(const Status& status);
inline void check(const Status& status) {
  if (!status.ok()) raise_status(status);
}

// One observation as _observation.py hands it over; holds references to the arrays, copies nothing.
struct ObservationArgs {
  std::vector<std::tuple<std::string, int, ImageArray>> images;  // name, ImageLayout, pixels
  StateArray state;
  nb::object prompt;  // str or None
  nb::object tokens;  // int32 array or None
};

// The C++ observation and the memory it borrows from besides the arrays.
class Borrowed {
 public:
  explicit Borrowed(const ObservationArgs& args);
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;
  const Observation& observation() const { return observation_; }

 private:
  std::string prompt_;
  TokenArray tokens_;
  Observation observation_;
};

// The dict that Session.infer returns. The arrays own the chunk's memory.
nb::dict chunk_to_dict(ActionChunk chunk);

}  // namespace servoflow::python
