"""Writes src/ops/cuda/attention_shapes.cuh: the forms of the warpgroup matrix instruction that attention takes."""
import sys


def lines_of(items, per_line, indent="      "):
    rows = [", ".join(items[i:i + per_line]) for i in range(0, len(items), per_line)]
    return (",\n" + indent).join(rows)


def instruction(n, first_operand, a, transposed, fresh):
    names = [f"%{i + first_operand}" for i in range(n // 2)]
    text = ', "\n      "'.join(", ".join(names[i:i + 16]) for i in range(0, len(names), 16))
    tail = "0" if transposed is None else str(transposed)
    a_major = ", 0" if a.startswith("%") else ""
    return (f'      "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{"\n'
            f'      "{text}}}, {a}, %{n // 2 + (4 if not a_major else 1)}, {0 if fresh else 1}, 1, 1{a_major}, {tail};"')


def from_shared(n, fresh):
    outs = lines_of([f'"{"=" if fresh else "+"}f"(d[{i}])' for i in range(n // 2)], 6)
    return f"""template <>
__device__ __forceinline__ void wgmma_{"first" if fresh else "next"}<{n}>(float (&d)[{n // 2}], std::uint64_t a, std::uint64_t b) {{
  asm volatile(
{instruction(n, 0, f"%{n // 2}", 0, fresh)}
      : {outs}
      : "l"(a), "l"(b));
}}
"""


def from_registers(name, n, transposed, fresh):
    outs = lines_of([f'"{"=" if fresh else "+"}f"(d[{i}])' for i in range(n // 2)], 6)
    r = n // 2
    return f"""__device__ __forceinline__ void {name}(float (&d)[{r}], const std::uint32_t* a, std::uint64_t b) {{
  asm volatile(
{instruction(n, 0, f"{{%{r}, %{r + 1}, %{r + 2}, %{r + 3}}}", transposed, fresh)}
      : {outs}
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}}
"""


widths = (80,)
sys.stdout.write("""// Written by attention_shapes.py beside it. Scores: d = or += a · bᵀ, b n x 16 bf16 in shared memory,
// a 64 x 16 there or in registers. Values: d += a · b, a in registers and b 16 x n in shared memory.
#pragma once

// clang-format off
#include <cstdint>

namespace servoflow::ops::cuda {

template <int kN>
__device__ __forceinline__ void wgmma_first(float (&d)[kN / 2], std::uint64_t a, std::uint64_t b);
template <int kN>
__device__ __forceinline__ void wgmma_next(float (&d)[kN / 2], std::uint64_t a, std::uint64_t b);

""" + "\n".join(from_shared(n, fresh) for n in widths for fresh in (True, False)) + "\n" +
    from_registers("wgmma_scores_first", 128, 0, True) + "\n" + from_registers("wgmma_scores_next", 128, 0, False) +
    "\n" + "\n".join(from_registers("wgmma_values", n, 1, False) for n in (16, 64, 256)) + """
}  // namespace servoflow::ops::cuda
// clang-format on
""")
