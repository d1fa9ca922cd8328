#include "weights/scan.h"

#include <algorithm>
#include <cstring>

#include "core/status_macros.h"
#include "core/thread_pool.h"
#include "weights/file_source.h"
#include "weights/manifest.h"

namespace servoflow::weights {
namespace {

constexpr std::size_t kPart = std::size_t{4} << 20;  // bytes of one task
constexpr std::size_t kPartsAtOnce = 16;             // 64 MiB resident at a time
constexpr std::size_t kBlock = 2048;                 // elements looked at before counting one by one

struct Count {
  std::uint64_t nans = 0, infinities = 0, first = 0;
  bool any() const { return nans + infinities > 0; }
};

// An element is not finite when its exponent bits are all ones, and a NaN when mantissa bits are set besides.
template <typename Bits>
Count count_bits(std::span<const std::byte> bytes, Bits exponent, Bits mantissa) {
  Count out;
  const std::size_t elements = bytes.size() / sizeof(Bits);
  Bits block[kBlock];
  for (std::size_t begin = 0; begin < elements; begin += kBlock) {
    const std::size_t n = std::min(kBlock, elements - begin);
    std::memcpy(block, bytes.data() + begin * sizeof(Bits), n * sizeof(Bits));  // the file may be unaligned
    unsigned bad = 0;
    for (std::size_t i = 0; i < n; ++i) bad += (block[i] & exponent) == exponent ? 1u : 0u;
    if (bad == 0) continue;
    for (std::size_t i = 0; i < n; ++i) {
      if ((block[i] & exponent) != exponent) continue;
      if (!out.any()) out.first = begin + i;
      ((block[i] & mantissa) != 0 ? out.nans : out.infinities) += 1;
    }
  }
  return out;
}

Count count_bad(DType dtype, std::span<const std::byte> bytes) {
  switch (dtype) {
    case DType::kBF16:
      return count_bits<std::uint16_t>(bytes, 0x7f80, 0x007f);
    case DType::kF16:
      return count_bits<std::uint16_t>(bytes, 0x7c00, 0x03ff);
    case DType::kF64:
      return count_bits<std::uint64_t>(bytes, 0x7ff0000000000000u, 0x000fffffffffffffu);
    default:
      return count_bits<std::uint32_t>(bytes, 0x7f800000u, 0x007fffffu);
  }
}

}  // namespace

Result<std::vector<NonFinite>> scan_weights(const Checkpoint& checkpoint, const ProgressFunction& progress,
                                            int threads) {
  const std::vector<TensorSpec> specs = manifest(checkpoint.architecture);
  const auto* files = dynamic_cast<const FileSource*>(checkpoint.source.get());
  std::uint64_t total = 0, done = 0;
  for (const TensorSpec& spec : specs) {
    SF_ASSIGN_OR_RETURN(const TensorData data, checkpoint.source->get(spec.name));
    total += data.bytes.size();
  }
  ThreadPool pool(threads);
  std::vector<NonFinite> out;
  std::vector<Count> counts(kPartsAtOnce);
  for (const TensorSpec& spec : specs) {
    SF_ASSIGN_OR_RETURN(const TensorData data, checkpoint.source->get(spec.name));
    NonFinite found{.name = spec.name};
    for (std::size_t begin = 0; begin < data.bytes.size(); begin += kPart * kPartsAtOnce) {
      const std::span<const std::byte> some =
          data.bytes.subspan(begin, std::min(kPart * kPartsAtOnce, data.bytes.size() - begin));
      const std::size_t parts = (some.size() + kPart - 1) / kPart;
      pool.parallel_for(static_cast<int>(parts), [&](int part, int) {
        const std::size_t at = static_cast<std::size_t>(part) * kPart;
        counts[static_cast<std::size_t>(part)] =
            count_bad(data.dtype, some.subspan(at, std::min(kPart, some.size() - at)));
      });
      for (std::size_t part = 0; part < parts; ++part) {
        const Count& count = counts[part];
        if (count.any() && found.nans + found.infinities == 0)
          found.first_index = (begin + part * kPart) / dtype_size(data.dtype) + count.first;
        found.nans += count.nans;
        found.infinities += count.infinities;
      }
      if (files != nullptr) files->release_part(spec.name, some);
      done += some.size();
      if (progress) progress(done, total);
    }
    if (found.nans + found.infinities > 0) out.push_back(std::move(found));
  }
  return out;
}

}  // namespace servoflow::weights
