// The CPU backend against the reference, on every instruction set that this machine has.
#include <hwy/highway.h>

#include "ops/attention_conformance.h"
#include "ops/block_conformance.h"
#include "ops/cpu/cpu_backend.h"
#include "ops/input_conformance.h"
#include "ops/low_bit_conformance.h"

namespace servoflow::ops {
namespace {

// `targets`: Highway instruction sets to allow, 0 for all. `dot`: use the bf16 dot product where the CPU has
// it.
void allow(std::int64_t targets) {
  hwy::SetSupportedTargetsForTest(targets);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}
Variant variant(const char* name, const char* precision, std::int64_t targets, bool dot) {
  return {
      name,
      [=] {
        allow(targets);
        return std::make_unique<cpu::CpuBackend>(
            precision, 3,
            dot ? cpu::CpuBackend::DotProducts() : cpu::CpuBackend::DotProducts{nullptr, nullptr, nullptr});
      },
      [] { allow(0); }};
}

constexpr std::int64_t kUpToSse4 = HWY_SSE4 | HWY_SSSE3, kUpToAvx2 = HWY_AVX2 | kUpToSse4;

TEST_P(Ops, NamesWhatRuns) {
  const std::string name = device.b->name();
  std::printf("  %s runs as %s\n", GetParam().name.c_str(), name.c_str());
  if (GetParam().name.ends_with("avx2")) {
    EXPECT_EQ(name, "cpu/avx2");
  } else if (GetParam().name.ends_with("sse4")) {
    EXPECT_EQ(name.find("avx"), std::string::npos) << name;
  }
  EXPECT_EQ(name.ends_with("_bf16"), act() == DType::kBF16);
}

// The widest instruction set of this machine, and the narrower ones that another robot's computer may have.
INSTANTIATE_TEST_SUITE_P(Variants, Ops,
                         testing::Values(variant("fp32", "fp32", 0, true), variant("bf16", "bf16", 0, true),
                                         variant("bf16_without_dot_product", "bf16", 0, false),
                                         variant("fp32_avx2", "fp32", kUpToAvx2, false),
                                         variant("bf16_avx2", "bf16", kUpToAvx2, false),
                                         variant("fp32_sse4", "fp32", kUpToSse4, false)),
                         [](const auto& info) { return info.param.name; });

// Integer and bf16 dot products, either alone, and neither.
Variant low_bit(const char* name, const char* precision, std::int64_t targets, bool bf16, bool int8) {
  return {name,
          [=] {
            allow(targets);
            cpu::CpuBackend::DotProducts dot;
            if (!bf16) dot.bf16 = nullptr;
            if (!int8) dot.int8 = nullptr;
            if (targets != 0) dot.unpack = nullptr;
            return std::make_unique<cpu::CpuBackend>(precision, 3, dot);
          },
          [] { allow(0); }};
}
INSTANTIATE_TEST_SUITE_P(Variants, LowBitOps,
                         testing::Values(low_bit("bf16", "bf16", 0, true, true),
                                         low_bit("bf16_without_vnni", "bf16", 0, true, false),
                                         low_bit("fp32", "fp32", 0, false, true),
                                         low_bit("bf16_avx2", "bf16", kUpToAvx2, false, false)),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace servoflow::ops
