"""Makes tests/golden/quant with the public libraries: what PyTorch, compressed-tensors and ModelOpt write and decode.

usage: make_golden.py [OUT]        (needs requirements.txt, torch first; no GPU)

  scalars.safetensors             float8 casts of PyTorch, FP4 casts of both libraries
  compressed_tensors.safetensors  one layer per layout, as the library's compressors write it, and what they decode
  compressed_tensors.json         the library's own config.json for them
  modelopt.safetensors            the same of ModelOpt's export functions
"""

import json
import pathlib
import sys
import warnings

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from modelopt.torch.export.quant_utils import (
    get_scaling_factor_from_weight,
    pack_int4_in_uint8,
    to_quantized_weight,
)
from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor
from modelopt.torch.quantization.qtensor import MXFP8QTensor
from safetensors.torch import save_file

ROWS, COLS = 12, 256
Tensors = dict[str, torch.Tensor]


def neighbours(x: torch.Tensor) -> torch.Tensor:
    up = torch.nextafter(x, torch.tensor(torch.inf))
    down = torch.nextafter(x, torch.tensor(-torch.inf))
    return torch.cat([down, x, up])


def cast_inputs(dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Every finite value, every midpoint between neighbours, both beside it, and random values in range."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(dtype).float()
    finite = values[torch.isfinite(values) & (values >= 0)].sort().values.unique()
    mid = (finite[1:] + finite[:-1]) / 2
    top = torch.finfo(dtype).max
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp2(torch.rand(400, generator=generator) * 40 - 24)
    positive = torch.cat([finite, neighbours(mid), spread])
    positive = positive[positive <= top]
    return torch.cat([positive, -positive, torch.tensor([torch.nan])])


def scalars() -> Tensors:
    out: Tensors = {}
    for name, dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        x = cast_inputs(dtype, 1)
        out[f"{name}.x"] = x
        out[f"{name}.code"] = x.to(dtype).view(torch.uint8)
        out[f"{name}.values"] = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    bounds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 100.0, 1e-30])
    x = torch.cat([neighbours(bounds), values])
    x = torch.cat([x, -x])
    out["e2m1.x"] = x
    out["e2m1.value"] = FP4_E2M1_DATA.cast_to_fp4(x.clone())
    out["e2m1.code"] = NVFP4QTensor._cast_fp4(x.clone())
    return out


def weights(seed: int = 0) -> torch.Tensor:
    """Normal weights with the cases that layouts trip over: a group of zeros, a tiny group, outliers, exact ties, -0."""
    w = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(seed)) * 0.05
    w[1, :128] = 0.0
    w[2, 16:32] = 1e-9
    w[3, 40] = 4.0
    w[4, ::7] *= 30
    w[5, 0:16] = torch.arange(16) / 16 - 0.5
    w[6, 3] = -0.0
    w[7, :] = w[7, :].abs()
    w[8, :] = -w[8, :].abs()
    return w


def args(**kwargs: object) -> QuantizationArgs:
    return QuantizationArgs(**kwargs)


INT4 = dict(num_bits=4, type="int", strategy="group", group_size=128)
NVFP4 = dict(
    num_bits=4,
    type="float",
    strategy="tensor_group",
    group_size=16,
    scale_dtype=torch.float8_e4m3fn,
    zp_dtype=torch.float8_e4m3fn,
)
MX = dict(type="float", strategy="group", group_size=32, scale_dtype=torch.uint8, zp_dtype=torch.uint8)
FP8 = dict(num_bits=8, type="float")
INT8 = dict(num_bits=8, type="int")
# layer name -> (layout, weights, input activations)
LAYERS: dict[str, tuple[str, dict, dict | None]] = {
    "nvfp4": ("nvfp4-pack-quantized", NVFP4, None),
    "nvfp4_a4": ("nvfp4-pack-quantized", NVFP4, {**NVFP4, "dynamic": "local"}),
    "int4_sym": ("pack-quantized", INT4, None),
    "int4_asym": ("pack-quantized", {**INT4, "symmetric": False}, None),
    "int4_asym_bf16": ("pack-quantized", {**INT4, "symmetric": False}, None),
    "int8_group": ("pack-quantized", {**INT8, "strategy": "group", "group_size": 128}, None),
    "int8_channel": ("pack-quantized", {**INT8, "strategy": "channel"}, None),
    "fp8_tensor": ("float-quantized", {**FP8, "strategy": "tensor"}, {**FP8, "strategy": "tensor"}),
    "fp8_channel": (
        "float-quantized",
        {**FP8, "strategy": "channel"},
        {**FP8, "strategy": "token", "dynamic": True},
    ),
    "fp8_block": (
        "float-quantized",
        {**FP8, "strategy": "block", "block_structure": [128, 128]},
        {**FP8, "strategy": "group", "group_size": 128, "dynamic": True},
    ),
    "int8_w8a8": (
        "int-quantized",
        {**INT8, "strategy": "channel"},
        {**INT8, "strategy": "token", "dynamic": True},
    ),
    "int8_static": (
        "int-quantized",
        {**INT8, "strategy": "channel"},
        {**INT8, "strategy": "tensor", "symmetric": False},
    ),
    "fp8_w8a16": ("naive-quantized", {**FP8, "strategy": "channel"}, None),
    "mxfp4": ("mxfp4-pack-quantized", {**MX, "num_bits": 4}, None),
    "mxfp8": ("mxfp8-quantized", {**MX, "num_bits": 8}, {**MX, "num_bits": 8, "dynamic": True}),
}


def extremes(w: torch.Tensor, a: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    if a.strategy in ("group", "tensor_group"):
        g = w.unflatten(-1, (-1, a.group_size))
        return g.amin(-1), g.amax(-1)
    if a.strategy == "channel":
        return w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    if a.strategy == "block":
        h, b = a.block_structure
        rows, cols = -(-w.shape[0] // h), -(-w.shape[1] // b)
        p = torch.nn.functional.pad(w, (0, cols * b - w.shape[1], 0, rows * h - w.shape[0]))
        p = p.reshape(rows, h, cols, b)
        return p.amin((1, 3)), p.amax((1, 3))
    return w.amin().reshape(1), w.amax().reshape(1)


def compressed_tensors() -> tuple[Tensors, dict]:
    out: Tensors = {"source": weights(), "source_bf16": weights().bfloat16()}
    groups = {}
    for layer, (layout, weight_args, input_args) in LAYERS.items():
        w = out["source_bf16"] if layer.endswith("bf16") else out["source"]
        scheme = QuantizationScheme(
            targets=[layer],
            weights=args(**weight_args),
            input_activations=args(**input_args) if input_args else None,
            format=layout,
        )
        low, high = extremes(w, scheme.weights)
        state: Tensors = {"weight": w.clone()}
        if scheme.weights.strategy == "tensor_group":
            state["weight_global_scale"] = generate_gparam(w.amin(), w.amax())
        scale, zero = calculate_qparams(low, high, scheme.weights, state.get("weight_global_scale"))
        state["weight_scale"], state["weight_zero_point"] = scale, zero
        compressor = BaseCompressor.get_value_from_registry(layout)
        stored = compressor.compress(state, scheme)
        if layer == "nvfp4_a4":
            stored["input_global_scale"] = torch.tensor([2688.0 / 7.5])
        if layer == "fp8_tensor":
            stored["input_scale"] = torch.tensor([0.0125])
        if layer == "int8_static":
            stored["input_scale"] = torch.tensor([0.03])
            stored["input_zero_point"] = torch.tensor([-17], dtype=torch.int8)
        for name, tensor in stored.items():
            out[f"{layer}.{name}"] = tensor.contiguous()
        if "fp4" in layer:  # its decompressor computes in bfloat16; the same functions in float32
            unpacked = unpack_fp4_from_uint8(stored["weight_packed"], ROWS, COLS, torch.float32)
            decoded = dequantize(
                unpacked, scale.float(), args=scheme.weights, global_scale=state.get("weight_global_scale")
            )
        else:
            decoded = compressor.decompress({k: v.clone() for k, v in stored.items()}, scheme)["weight"]
        out[f"{layer}.decoded"] = decoded.float().contiguous()
        groups[layer] = scheme
    config = QuantizationConfig(
        config_groups=groups, format="mixed-precision", quantization_status="compressed", ignore=["lm_head"]
    )
    return out, {"quantization_config": json.loads(config.model_dump_json())}


def modelopt(seed: int = 0) -> Tensors:
    w = weights(seed)
    amax = w.abs().max()
    out: Tensors = {"source": w}

    def fp4(layer: str, scale2: torch.Tensor) -> None:
        scale, _ = NVFP4QTensor.get_weights_scaling_factor(w.clone(), 16, scale2)
        packed = to_quantized_weight(w.clone(), scale, "nvfp4", scale2, 16)
        out.update(
            {f"{layer}.weight": packed, f"{layer}.weight_scale": scale, f"{layer}.weight_scale_2": scale2}
        )
        decoded = NVFP4QTensor(w.shape, torch.float32, packed).dequantize(
            scale=scale, double_scale=scale2, block_sizes={-1: 16}
        )
        out[f"{layer}.decoded"] = decoded

    fp4("nvfp4", amax / 2688.0)
    out["nvfp4.input_scale"] = torch.tensor(7.5 / 2688.0)
    fp4("w4a8", amax / 448.0)
    out["w4a8.input_scale"] = torch.tensor(0.02)

    scale = amax / 448.0
    out["fp8.weight"] = to_quantized_weight(w.clone(), scale, "fp8")
    out["fp8.weight_scale"] = scale
    out["fp8.input_scale"] = torch.tensor(0.0125)
    out["fp8.decoded"] = out["fp8.weight"].float() * scale

    scale = get_scaling_factor_from_weight(w.clone(), 0)
    out["int8_sq.weight"] = to_quantized_weight(w.clone(), scale, "int8_sq")
    out["int8_sq.weight_scale"] = scale
    out["int8_sq.input_scale"] = torch.tensor(0.03)
    out["int8_sq.pre_quant_scale"] = torch.linspace(0.5, 2.0, COLS)
    out["int8_sq.decoded"] = out["int8_sq.weight"].float() * scale[:, None]

    scale = get_scaling_factor_from_weight(w.clone(), 128)
    out["int4_awq.weight"] = pack_int4_in_uint8(w.clone(), scale, 128)
    out["int4_awq.weight_scale"] = scale
    out["int4_awq.pre_quant_scale"] = torch.linspace(0.5, 2.0, COLS)
    codes = (w / scale.repeat_interleave(128, 1)).round().clamp(-8, 7)
    out["int4_awq.decoded"] = codes * scale.repeat_interleave(128, 1)

    scale = MXFP8QTensor.get_weights_scaling_factor(w.clone())
    out["mxfp8.weight"] = MXFP8QTensor.quantize_with_scale(w.clone(), scale)
    out["mxfp8.weight_scale"] = scale
    out["mxfp8.decoded"] = out["mxfp8.weight"].float() * torch.exp2(scale.float() - 127).repeat_interleave(
        32, 1
    )
    return out


def main() -> None:
    warnings.filterwarnings("ignore")
    out = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "tests/golden/quant")
    out.mkdir(parents=True, exist_ok=True)
    save_file(scalars(), out / "scalars.safetensors")
    tensors, config = compressed_tensors()
    save_file(tensors, out / "compressed_tensors.safetensors")
    (out / "compressed_tensors.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file({k: v.contiguous() for k, v in modelopt().items()}, out / "modelopt.safetensors")


if __name__ == "__main__":
    main()
