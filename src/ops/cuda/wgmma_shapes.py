"""Writes src/ops/cuda/wgmma_shapes.cuh: one thin wrapper per width of the warpgroup matrix instruction."""
import sys

WIDTHS = (32, 64, 80, 120, 128, 176, 184, 240, 248)


def lines_of(items, per_line=12, indent="      "):
    rows = [", ".join(items[i:i + per_line]) for i in range(0, len(items), per_line)]
    return (",\n" + indent).join(rows)


def wrapper(n):
    r = n // 2
    names = [f"%{i}" for i in range(r)]
    text = [", ".join(names[i:i + 16]) for i in range(0, r, 16)]
    registers = ', "\n      "'.join(text)
    outs = lines_of([f'"+f"(d[{i}])' for i in range(r)], 6)
    return f"""template <>
__device__ __forceinline__ void wgmma<{n}>(float (&d)[{r}], std::uint64_t a, std::uint64_t b) {{
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{"
      "{registers}}}, %{r}, %{r + 1}, 1, 1, 1, 0, 0;"
      : {outs}
      : "l"(a), "l"(b));
}}
"""


sys.stdout.write("""// Written by wgmma_shapes.py beside it: d += a · bᵀ, a 64 x 16 and b n x 16 bf16 in shared memory.
#pragma once

// clang-format off
#include <cstdint>

namespace servoflow::ops::cuda {

template <int kN>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], std::uint64_t a, std::uint64_t b);

""" + "\n".join(wrapper(n) for n in WIDTHS) + """
}  // namespace servoflow::ops::cuda
// clang-format on
""")
