#!/usr/bin/env python3
"""The pi0.5 network in PyTorch, timed: the peer that servoflow is measured against.

usage: pytorch_pi05.py [--model pi05|FILE.json] [--variant eager|compiled] [--views 2] [--tokens 200] [--horizon 50]
                       [--steps 10] [--repeat 5] [--warmup 1] [--threads N] [--json FILE] [--check]
       pytorch_pi05.py --device cuda --variant eager|graph|graph-fp32|compiled …

Work is what servoflow does for one inference: frames and token ids in, normalised actions out. What may be left out
without changing the result is left out here too, so that engines are compared and not omissions: padding tokens and
missing cameras are never computed, the last prefix layer stops at its keys and values, and the AdaRMS modulations,
which depend on the time alone, are made for all steps at once. Precision follows the reference: BF16 weights and
activations; FP32 for the patch embedding, the norms, the modulations, the time MLP and the action projections. Weights
are random.

`compiled` is torch.compile with freezing, which packs weights ahead of time. --check also runs eager and compares.
On a CUDA device (pi05_cuda.py) `graph` is the whole inference in one CUDA graph, `graph-fp32` the same without TF32 in
the FP32 parts, `compiled` a graph of blocks that torch.compile has fused; modulations are made ahead.
FILE.json holds an `architecture` block as in a checkpoint's config.json.
"""

import argparse
import json
import platform
import resource
import time

import torch

from pi05_network import ACTION_DIM, PI05, Pi05


def statistics(samples):
    ordered = torch.tensor(samples, dtype=torch.float64)
    quantile = {f"p{q}": torch.quantile(ordered, q / 100).item() for q in (50, 95, 99)}
    return {"min": min(samples), "mean": ordered.mean().item(), "std": ordered.std(correction=0).item(), **quantile,
            "samples": samples}


def run_cuda(args, sizes):
    import pi05_cuda

    start = time.perf_counter()
    model = pi05_cuda.CudaPi05(sizes, args.seed, args.views, args.tokens, args.horizon, args.steps)
    ready = time.perf_counter() - start
    expected = None
    if args.check:
        model.measure("eager", 1, 0)
        expected = model.out_host.clone()
    measured = model.measure(args.variant, args.repeat, args.warmup)
    if args.check:
        check(args.variant, model.out_host, expected, model.host[2])
    free, total = torch.cuda.mem_get_info()
    return {
        "device": "cuda", "hardware": torch.cuda.get_device_name(), "ready_s": ready + measured["prepare_s"],
        "compile_s": measured["prepare_s"] if args.variant == "compiled" else None,
        "device_bytes": torch.cuda.max_memory_allocated(), "device_bytes_taken": total - free,
        "end_to_end_ms": statistics(measured["end_to_end_ms"]),
        "stages_ms": {name: statistics(samples) for name, samples in measured["stages_ms"].items()},
        "tf32": args.variant != "graph-fp32", "attention": model.attention,
        "state_before": measured["state_before"], "state_after": measured["state_after"],
    }


def check(variant, actual, expected, noise):
    """The flow of this variant against eager's; leaves with 1 when they differ by more than BF16 does."""
    error = ((actual - expected).norm() / (expected - noise).norm()).item()
    print(f"{variant} against eager: relative difference of the flow {error:.2e}")
    if not error < 0.02:
        raise SystemExit(1)


def run_cpu(args, sizes):
    start = time.perf_counter()
    model = Pi05(sizes, args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    image = sizes["vision"]["image"]
    frames = torch.randint(0, 256, (args.views, image, image, 3), dtype=torch.uint8, generator=generator)
    ids = torch.randint(3, sizes["prefix"]["vocab"], (args.tokens,), generator=generator)
    noise = torch.randn(args.horizon, ACTION_DIM, generator=generator)
    work = (frames, ids, noise, args.steps)

    expected = model.infer(*work)[0] if args.check else None
    compile_start = time.perf_counter()
    if args.variant == "compiled":
        model.compile()
        model.infer(*work)
    compile_s = time.perf_counter() - compile_start
    ready_s = time.perf_counter() - start
    if args.check:
        check(args.variant, model.infer(*work)[0], expected, noise)

    runs = [model.infer(*work)[1] for _ in range(args.warmup + args.repeat)][args.warmup:]
    stages = {name: statistics([run[name] for run in runs]) for name in ("vision", "prefix", "modulation", "denoise")}
    stages["step"] = statistics([t for run in runs for t in run["step"]])
    return {
        "device": "cpu", "threads": torch.get_num_threads(), "ready_s": ready_s,
        "compile_s": compile_s if args.variant == "compiled" else None,
        "end_to_end_ms": statistics([run["end_to_end"] for run in runs]), "stages_ms": stages,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pi05")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--variant", choices=("eager", "compiled", "graph", "graph-fp32"), default="eager")
    for name, default in (("views", 2), ("tokens", 200), ("horizon", 50), ("steps", 10), ("repeat", 5), ("warmup", 1),
                          ("threads", 0), ("seed", 0)):
        parser.add_argument("--" + name, type=int, default=default)
    parser.add_argument("--json")
    parser.add_argument("--check", action="store_true", help="compare with eager; exit 1 if they differ")
    args = parser.parse_args()
    if args.device == "cpu" and args.variant.startswith("graph"):
        parser.error(f"--variant {args.variant} needs --device cuda")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)

    sizes = PI05
    if args.model != "pi05":
        with open(args.model, encoding="utf-8") as file:
            sizes = json.load(file)
        sizes = sizes.get("architecture", sizes)
    report = {
        "work": {"views": args.views, "tokens": args.tokens, "horizon": args.horizon, "steps": args.steps, "batch": 1},
        "model": args.model, "precision": "bf16", **(run_cpu if args.device == "cpu" else run_cuda)(args, sizes),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "build": {"torch": torch.__version__, "python": platform.python_version(), "variant": args.variant},
    }
    kind = "min" if args.device == "cpu" else "p50"
    line = ", ".join(f"{name} {stage[kind]:.2f}" for name, stage in report["stages_ms"].items())
    print(f"pytorch {args.variant}: {report['end_to_end_ms'][kind]:.2f} ms ({kind} of {args.repeat}): {line}")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
