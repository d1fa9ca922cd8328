"""Quantized layers exchanged with compressed-tensors and NVIDIA ModelOpt, both ways, and handed to ggml.

usage: interop_test.py QUANT_FILE        (the program interop_quant_file; `make test-interop` does it all)

Ours to them: every format is written by servoflow; compressed-tensors loads the folder as Transformers would (config applied,
state dict loaded strictly, decompressed), ModelOpt's tensor classes decode theirs. Theirs to ours: make_golden.py's layers on
other weights, and a model that the library compressed and whose config it saved. Decoded weights must agree to the roundings
stated at each place.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import unittest

import gguf
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.entrypoints.convert.converters import ModelOptNvfp4Converter
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor
from safetensors.torch import load_file, save_file

import make_golden

ROWS, COLS = make_golden.ROWS, make_golden.COLS
PROGRAM = ""
EXTRA = ("decoded", "gguf", "gguf_scale")  # what quant_file adds for the tests
Tensors = dict[str, torch.Tensor]


def run(*args: object) -> None:
    subprocess.run([PROGRAM, *map(str, args)], check=True)


def config_of(document: dict) -> QuantizationConfig:
    # Transformers' CompressedTensorsConfig takes these three off before the library sees the rest.
    inner = {k: v for k, v in document.items() if k not in ("version", "sparsity_config", "transform_config")}
    return QuantizationConfig.model_validate(inner)


def model_of(layers: list[str]) -> torch.nn.Module:
    model = torch.nn.Module()
    for layer in layers:
        model.add_module(layer, torch.nn.Linear(COLS, ROWS, bias=False))
    return model


def close(ours: torch.Tensor, theirs: torch.Tensor, relative: float) -> bool:
    return bool(((ours - theirs).abs() <= relative * theirs.abs()).all())


class Interop(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.path = pathlib.Path(self.folder.name)
        self.source = make_golden.weights(seed=99)
        save_file({"source": self.source}, self.path / "source.safetensors")

    def tearDown(self) -> None:
        self.folder.cleanup()

    def write(self, library: str) -> tuple[Tensors, dict, dict[str, str]]:
        run("write", library, self.path / "source.safetensors", self.path)
        tensors = load_file(self.path / "model.safetensors")
        return (
            tensors,
            json.loads((self.path / "config.json").read_text()),
            json.loads((self.path / "layers.json").read_text()),
        )

    def test_ours_in_compressed_tensors(self) -> None:
        tensors, document, layers = self.write("compressed-tensors")
        self.assertGreaterEqual(len(layers), 20)
        config = config_of(document)
        model = model_of(list(layers))
        apply_quantization_config(model, config)
        compressor = ModelCompressor(quantization_config=config)
        compressor.compress_model(model)
        stored = {k: v for k, v in tensors.items() if k.rsplit(".")[-1] not in EXTRA}
        missing, unexpected = model.load_state_dict(stored, strict=False)
        # Buffers that the library keeps beside a compressed layer and no file has.
        self.assertEqual([m for m in missing if "observer" not in m], [])
        self.assertEqual(unexpected, [])
        compressor.decompress_model(model)
        for layer, name in layers.items():
            ours, theirs = tensors[f"{layer}.decoded"], model.get_submodule(layer).weight.float()
            # FP4 is decompressed in bfloat16: scale, quotient and product round (2^-9 each); BF16 scales: the product.
            low = "fp4" in name or stored[f"{layer}.weight_scale"].dtype == torch.bfloat16
            relative = 3 * 2**-8 if low else 2**-22
            self.assertTrue(close(ours, theirs, relative), name)
            print(f"ours -> compressed-tensors  {name:40} worst {worst(ours, theirs):.2e}")

    def test_ours_in_ggml(self) -> None:
        tensors, _, layers = self.write("compressed-tensors")
        kinds = {"nvfp4": gguf.GGMLQuantizationType.NVFP4, "mxfp4": gguf.GGMLQuantizationType.MXFP4}
        seen = 0
        for layer, name in layers.items():
            if name[:5] not in kinds:
                continue
            blocks = tensors[f"{layer}.gguf"].numpy().reshape(ROWS, -1)
            theirs = (
                torch.from_numpy(gguf.dequantize(blocks, kinds[name[:5]])) * tensors[f"{layer}.gguf_scale"]
            )
            # scale and global scale are multiplied in another order
            self.assertTrue(close(tensors[f"{layer}.decoded"], theirs, 2**-22), name)
            print(
                f"ours -> ggml                {name:40} worst {worst(tensors[f'{layer}.decoded'], theirs):.2e}"
            )
            seen += 1
        self.assertGreaterEqual(seen, 6)

    def test_ours_in_modelopt(self) -> None:
        tensors, document, layers = self.write("modelopt")
        self.assertEqual(document["quantization"]["quant_algo"], "MIXED_PRECISION")
        for layer, name in layers.items():
            get = {k.split(".")[1]: v for k, v in tensors.items() if k.startswith(layer + ".")}
            algorithm = document["quantization"]["quantized_layers"][layer]["quant_algo"]
            theirs = modelopt_decode(algorithm, get)
            self.assertTrue(torch.equal(get["decoded"], theirs), name)
            print(f"ours -> modelopt            {name:40} equal ({algorithm})")

    def test_modelopt_file_through_the_other_librarys_converter(self) -> None:
        tensors, document, layers = self.write("modelopt")
        layer = next(k for k, v in layers.items() if v == "nvfp4-w4a4")
        source = {
            k: v for k, v in tensors.items() if k.startswith(layer + ".") and k.rsplit(".")[-1] not in EXTRA
        }
        converted = ModelOptNvfp4Converter(targets=[layer]).process(dict(source))
        save_file(
            {k: v.reshape(1) if v.ndim == 0 else v for k, v in converted.items()},
            self.path / "ct.safetensors",
        )
        w = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
        group = {"targets": [layer], "weights": w, "input_activations": {**w, "dynamic": "local"}}
        ct = {"quant_method": "compressed-tensors", "config_groups": {"g": group}}
        ct["format"] = "nvfp4-pack-quantized"
        (self.path / "ct.json").write_text(json.dumps({"quantization_config": ct}))
        run(
            "read",
            self.path / "ct.json",
            self.path / "ct.safetensors",
            ROWS,
            COLS,
            self.path / "out.safetensors",
        )
        ours = load_file(self.path / "out.safetensors")[layer]
        # Two reciprocals in binary32.
        self.assertTrue(close(ours, tensors[f"{layer}.decoded"], 2**-22))

    def test_a_model_the_library_compressed_and_saved(self) -> None:
        golden = config_of(make_golden.compressed_tensors()[1]["quantization_config"])
        layers = [layer for layer in golden.config_groups if not layer.endswith("bf16")]
        golden.config_groups = {k: v for k, v in golden.config_groups.items() if k in layers}
        model = model_of(layers)
        apply_quantization_config(model, golden)
        for layer in layers:
            module = model.get_submodule(layer)
            args = module.quantization_scheme.weights
            w = self.source.clone()
            module.weight.data = w
            low, high = make_golden.extremes(w, args)
            global_scale = None
            if args.strategy == "tensor_group":
                global_scale = generate_gparam(w.amin(), w.amax())
                module.weight_global_scale.data = global_scale
            scale, zero = calculate_qparams(low, high, args, global_scale)
            module.weight_scale.data = scale
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.data = zero
            for name in ("input_scale", "input_global_scale"):
                if hasattr(module, name):
                    getattr(module, name).data = torch.tensor([0.25])
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        (self.path / "config.json").write_text("{}")
        compressor.update_config(str(self.path))
        save_file(
            {k: v.contiguous() for k, v in model.state_dict().items()}, self.path / "theirs.safetensors"
        )
        out = self.path / "out.safetensors"
        run("read", self.path / "config.json", self.path / "theirs.safetensors", ROWS, COLS, out)
        ours = load_file(out)
        self.assertEqual(sorted(ours), sorted(layers))
        compressor.decompress_model(model)
        for layer in layers:
            theirs = model.get_submodule(layer).weight.float()
            relative = 3 * 2**-8 if "fp4" in layer else 2**-22
            self.assertTrue(close(ours[layer], theirs, relative), layer)
            print(f"compressed-tensors -> ours  {layer:40} worst {worst(ours[layer], theirs):.2e}")

    def test_layers_of_modelopt(self) -> None:
        tensors = make_golden.modelopt(seed=98)
        algorithms = {
            "nvfp4": "NVFP4",
            "w4a8": "W4A8_NVFP4_FP8",
            "fp8": "FP8",
            "int8_sq": "W8A8_SQ_PER_CHANNEL",
            "int4_awq": "W4A16_AWQ",
            "mxfp8": "MXFP8",
        }
        document = {
            "producer": {"name": "modelopt", "version": "0.47.0"},
            "quantization": {
                "quant_algo": "MIXED_PRECISION",
                "kv_cache_quant_algo": None,
                "quantized_layers": {k: {"quant_algo": v} for k, v in algorithms.items()},
            },
        }
        (self.path / "hf_quant_config.json").write_text(json.dumps(document))
        save_file({k: v.contiguous() for k, v in tensors.items()}, self.path / "theirs.safetensors")
        out = self.path / "out.safetensors"
        run("read", self.path / "hf_quant_config.json", self.path / "theirs.safetensors", ROWS, COLS, out)
        ours = load_file(out)
        for layer in algorithms:
            self.assertTrue(torch.equal(ours[layer], tensors[f"{layer}.decoded"]), layer)
            print(f"modelopt -> ours            {layer:40} equal")


def worst(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    nonzero = theirs != 0
    return float(((ours - theirs).abs()[nonzero] / theirs.abs()[nonzero]).max())


def modelopt_decode(algorithm: str, get: Tensors) -> torch.Tensor:
    weight, scale = get["weight"], get["weight_scale"]
    if "NVFP4" in algorithm:
        tensor = NVFP4QTensor(torch.Size([ROWS, COLS]), torch.float32, weight)
        return tensor.dequantize(scale=scale, double_scale=get["weight_scale_2"], block_sizes={-1: 16})
    if algorithm == "W4A16_AWQ":
        # unpack as the library packs: two output rows a byte, two's complement
        low, high = (weight & 15).to(torch.int8), (weight >> 4).to(torch.int8)
        codes = torch.stack([low, high], 1).reshape(ROWS, COLS)
        codes = torch.where(codes > 7, codes - 16, codes).float()
        return codes * scale.repeat_interleave(COLS // scale.shape[1], 1)
    if algorithm == "MXFP8":
        return weight.float() * torch.exp2(scale.float() - 127).repeat_interleave(32, 1)
    return weight.float() * (scale[:, None] if scale.ndim == 1 else scale)


if __name__ == "__main__":
    PROGRAM = sys.argv.pop(1)
    unittest.main(verbosity=2)
