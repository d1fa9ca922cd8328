"""Writes src/ops/cuda/wgmma_shapes.cuh: one thin wrapper per form of the warpgroup matrix instruction in use."""
import sys

WIDTHS = (32, 64, 80, 120, 128, 176, 184, 192, 200, 240)


def lines_of(items, per_line):
    return ",\n      ".join(", ".join(items[i:i + per_line]) for i in range(0, len(items), per_line))


def wrapper(head, n, in_registers=False, fresh=False, transposed=False):
    """`fresh`: d = and not d +=. `transposed`: b lies with its n along the rows."""
    r = n // 2
    names = [f"%{i}" for i in range(r)]
    registers = ', "\n      "'.join(", ".join(names[i:i + 16]) for i in range(0, r, 16))
    a = f"{{%{r}, %{r + 1}, %{r + 2}, %{r + 3}}}" if in_registers else f"%{r}"
    majors = f"{int(transposed)}" if in_registers else f"0, {int(transposed)}"
    outs = lines_of([f'"{"=" if fresh else "+"}f"(d[{i}])' for i in range(r)], 6)
    ins = '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)' if in_registers else '"l"(a), "l"(b)'
    kind = "const std::uint32_t*" if in_registers else "std::uint64_t"
    return f"""{head}(float (&d)[{r}], {kind} a, std::uint64_t b) {{
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{"
      "{registers}}}, {a}, %{r + (4 if in_registers else 1)}, {int(not fresh)}, 1, 1, {majors};"
      : {outs}
      : {ins});
}}
"""


DEVICE = "__device__ __forceinline__ void "
parts = [wrapper(f"template <>\n{DEVICE}wgmma<{n}>", n) for n in WIDTHS]
parts += [wrapper(f"template <>\n{DEVICE}wgmma_first<{n}>", n, fresh=True) for n in (80,)]
parts += [wrapper(f"{DEVICE}wgmma_scores_{name}", 128, in_registers=True, fresh=name == "first")
          for name in ("first", "next")]
parts += [wrapper(f"{DEVICE}wgmma_of_registers{name}", 56, in_registers=True, fresh=name != "")
          for name in ("", "_first")]
parts += [wrapper(f"{DEVICE}wgmma_values", n, in_registers=True, transposed=True) for n in (16, 64, 256)]
sys.stdout.write("""// Written by wgmma_shapes.py beside it. wgmma and wgmma_first: d += and d = a · bᵀ, a 64 x 16 and b n x 16
// bf16 in shared memory. Attention's own forms have a in registers: of_registers and scores are
// d += or = a · bᵀ as above, values d += a · b with b 16 x n.
#pragma once

// clang-format off
#include <cstdint>

namespace servoflow::ops::cuda {

template <int kN>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], std::uint64_t a, std::uint64_t b);
template <int kN>
__device__ __forceinline__ void wgmma_first(float (&d)[kN / 2], std::uint64_t a, std::uint64_t b);

""" + "\n".join(parts) + """
}  // namespace servoflow::ops::cuda
// clang-format on
""")
