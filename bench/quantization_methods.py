#!/usr/bin/env python3
"""Each method of `servoflow quantize` against round-to-nearest: on its own metric, and on observations nothing was calibrated on.

`policy` takes a trained checkpoint and two folders of recorded cases. It calibrates on the first, quantizes by every method, takes
the method's own metric from the quantize report (on the calibration's inputs) and compares actions and velocities with float32 on the
second. `layer` does GPTQ of one layer (or of layers fused with it) at real size: errors, wall time, peak memory, and on cases held out
what the layer's change does to the input of the layer behind it. `table` prints a result as Markdown.
Results: bench/results/quantization-methods-NAME.json.

  quantization_methods.py policy metaworld-nano models/metaworld-nano --calibrate build/calibration --judge build/heldout
  quantization_methods.py layer build/synth-pi05 --cases tests/golden/openpi-tiny/cases --layer '*language_model.layers.8.mlp.down_proj'
  quantization_methods.py table bench/results/quantization-methods-metaworld-nano.json

How the cases are recorded: docs/quantization.md, "The methods". `policy` takes about 5 minutes on two cores, `layer` 20.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench" / "peers"))
from run import machine  # noqa: E402

WEIGHTS = {
    "nearest": [],
    "least-squares": ["--scales", "least-squares"],
    "awq": ["--smooth", "awq"],
    "gptq": ["--rounding", "gptq"],
    "least-squares, gptq": ["--scales", "least-squares", "--rounding", "gptq"],
    "awq, least-squares, gptq": ["--smooth", "awq", "--scales", "least-squares", "--rounding", "gptq"],
    "bias correction": ["--correct-bias"],
    "least-squares, gptq, bias correction": [
        "--scales",
        "least-squares",
        "--rounding",
        "gptq",
        "--correct-bias",
    ],
}
INPUTS_TOO = {
    "nearest": ["--smooth", "none"],
    "smoothquant": ["--smooth", "smoothquant"],
    "gptq": ["--smooth", "none", "--rounding", "gptq"],
    "smoothquant, gptq": ["--smooth", "smoothquant", "--rounding", "gptq"],
    "bias correction": ["--smooth", "none", "--correct-bias"],
}
PLAN = {
    "int4-g128-w4a16": WEIGHTS,
    "nvfp4-w4a16": WEIGHTS,
    "int8-w8a8": INPUTS_TOO,
}
# What a method minimises: the report's field, and which layers it is about.
OWN = {
    "nearest": "output",
    "least-squares": "weighted",
    "awq": "smoothing",
    "smoothquant": "smoothing",
}
METRICS = {
    "output": "squared error of outputs over their size, all correlations of inputs (Xᵀ X)",
    "weighted": "squared error of weights, each weighted with its input's mean square, over their size",
    "smoothing": "what the search minimises, per site: AWQ output error; SmoothQuant the error of weights and of 8-bit inputs",
    "bias": "squared error of outputs over their size after their mean error is taken out; layers with a bias",
}


class Commands:
    """Runs the tool, and keeps what was run without this machine's paths."""

    def __init__(self, binary: str, names: dict[str, str]) -> None:
        self.binary = binary
        self.names = names
        self.log: list[str] = []

    def run(self, *arguments: str) -> tuple[float, int]:
        """Wall seconds and peak bytes of one call."""
        command = [self.binary, *arguments, "--log-level", "error"]
        begin = time.time()
        with tempfile.TemporaryFile() as err:
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=err)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode != 0:
                err.seek(0)
                tail = err.read().decode("utf-8", "replace")[-2000:]
                raise SystemExit(f"{' '.join(command)}\nexited with {process.returncode}:\n{tail}")
        shown = "servoflow " + " ".join(arguments)
        for path, name in self.names.items():
            shown = shown.replace(path, name)
        self.log.append(shown)
        return time.time() - begin, usage.ru_maxrss * 1024


def own_metric(method: str, layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over layers, the geometric mean of the ratios to round-to-nearest, and in how many layers it won."""
    kind = "bias" if method == "bias correction" else OWN.get(method, "output")
    field = "smoothing_error" if kind == "smoothing" else "output_error"
    judged = [layer for layer in layers if layer.get(field) is not None]
    if kind == "bias":
        judged = [layer for layer in judged if layer["method"].endswith("bias")]
    pairs = [(layer[field], layer[f"{field}_nearest"]) for layer in judged]
    logs = [math.log(after / before) for after, before in pairs if after > 0 and before > 0]
    return {
        "metric": kind,
        "layers": len(pairs),
        "mean": sum(after for after, _ in pairs) / len(pairs),
        "mean_nearest": sum(before for _, before in pairs) / len(pairs),
        "ratio": math.exp(sum(logs) / len(logs)),
        "better": sum(after < before for after, before in pairs),
        "equal": sum(after == before for after, before in pairs),
        "worse": sum(after > before for after, before in pairs),
    }


def by_width(layers: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean errors of layers by their input channels, which may be fewer than a group holds or no multiple of it."""
    out: dict[str, dict[str, float]] = {}
    for k in sorted({layer["shape"][1] for layer in layers}):
        some = [layer for layer in layers if layer["shape"][1] == k and layer["output_error"] is not None]
        if not some:
            continue
        out[str(k)] = {
            "layers": len(some),
            "bits_per_weight": sum(layer["bits_per_weight"] for layer in some) / len(some),
            "weight_error": sum(layer["weight_error"] for layer in some) / len(some),
            "output_error": sum(layer["output_error"] for layer in some) / len(some),
        }
    return out


def judged(report: dict[str, Any]) -> dict[str, Any]:
    metrics = report["metrics"]
    steps = [k for k in metrics if k.startswith("velocity.cosine.all.step")]
    return {
        "cases": len(report["cases"]),
        "calibrated_on": int(metrics.get("cases.calibrated_on", 0)),
        "actions_mae": report["actions"]["all"]["mae"],
        "actions_mae_by_column": {c["label"]: c["mae"] for c in report["actions"]["columns"]},
        "actions_max_abs": report["actions"]["all"]["max_abs"],
        "actions_1_minus_cosine": 1 - metrics["actions.cosine.all"],
        "velocity_1_minus_cosine": 1 - metrics["velocity.cosine.all"],
        "velocity_1_minus_cosine_first_step": 1 - metrics["velocity.cosine.all.step0"],
        "velocity_1_minus_cosine_worst_step": 1 - min(metrics[k] for k in steps),
        "prefix_1_minus_cosine": 1 - metrics["prefix.cosine"],
        "weight_bytes": report["b"]["weight_bytes"],
    }


def header(commands: Commands, begin: float) -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": {k: v for k, v in machine().items() if k != "flags"},
        "seconds": round(time.time() - begin, 1),
        "metrics": METRICS,
        "commands": commands.log,
    }


def write(name: str, result: dict[str, Any]) -> None:
    path = ROOT / "bench" / "results" / f"quantization-methods-{name}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(result))
    print(f"\n{path.relative_to(ROOT)}", file=sys.stderr)


def policy(o: argparse.Namespace) -> None:
    begin = time.time()
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(o.work or folder)
        work.mkdir(parents=True, exist_ok=True)
        names = {
            str(work): "WORK",
            o.calibrate: "CALIBRATION",
            o.judge: "HELDOUT",
            o.checkpoint: o.name.upper(),
        }
        tool = Commands(o.binary, names)

        def say(text: str) -> None:
            print(f"[{time.time() - begin:5.0f} s] {text}", file=sys.stderr, flush=True)

        say("calibrating, with second moments and without")
        moments, plain = str(work / "moments.stats"), str(work / "plain.stats")
        tool.run("calibrate", o.checkpoint, moments, "--cases", o.calibrate, "--moments", "*")
        tool.run("calibrate", o.checkpoint, plain, "--cases", o.calibrate)

        def compare(candidate: list[str]) -> dict[str, Any]:
            report = work / "compare.json"
            arguments = ["--cases", o.judge, "--device-a", "cpu", "--device-b", "cpu", "--no-layers"]
            tool.run("compare", o.checkpoint, *candidate, *arguments, "--json", str(report))
            return judged(json.loads(report.read_text(encoding="utf-8")))

        say("bf16, which all recipes compute in")
        floor = compare(["--precision-b", "bf16"])
        rows: list[dict[str, Any]] = []
        calibration: dict[str, Any] = {}
        for recipe, methods in PLAN.items():
            for method, arguments in methods.items():
                say(f"{recipe}: {method}")
                layers: list[dict[str, Any]] = []
                out = work / "out"
                # Without moments the report's output error is the metric that scales are searched by.
                for statistics in [plain, moments] if OWN.get(method) == "weighted" else [moments]:
                    shutil.rmtree(out, ignore_errors=True)
                    tool.run(
                        "quantize",
                        o.checkpoint,
                        str(out),
                        "--recipe",
                        recipe,
                        "--statistics",
                        statistics,
                        *arguments,
                    )
                    made = json.loads((out / "quantization_report.json").read_text(encoding="utf-8"))
                    layers = layers or made["layers"]
                calibration = made["calibration"]
                # Of a combination the part that is judged is all of it, by the outputs.
                row = {"recipe": recipe, "method": method, "own": own_metric(method, layers)}
                row["output"] = own_metric("gptq", made["layers"])
                row["kept_nearest"] = sum(
                    layer.get("note", "").startswith("round-to-nearest beats") for layer in made["layers"]
                )
                row["worse_with_multipliers"] = sum(
                    "without multipliers" in layer.get("note", "") for layer in made["layers"]
                )
                row["by_width"] = by_width(made["layers"])
                row["heldout"] = compare([str(out)])
                rows.append(row)
                shutil.rmtree(out)
    result = header(tool, begin) | {
        "part": "policy",
        "checkpoint": o.name,
        "calibration": {
            "cases": len(calibration["cases"]),
            "denoise_steps": calibration["denoise_steps"],
            "precision": calibration["precision"],
        },
        "bf16": floor,
        "rows": rows,
    }
    write(o.name, result)


def layer(o: argparse.Namespace) -> None:
    begin = time.time()
    rows: list[dict[str, Any]] = []
    names = {o.checkpoint: "PI05", o.cases: "CASES"}
    tool = Commands(o.binary, names)
    cases = sorted(pathlib.Path(ROOT / o.cases).glob("*.safetensors"))
    if len(cases) < o.limit + o.judge:
        raise SystemExit(
            f"{o.cases}: {len(cases)} cases; {o.limit} to calibrate on and {o.judge} to judge by are asked for"
        )
    for globs, behind in o.layers:
        with tempfile.TemporaryDirectory(dir=o.work) as folder:
            work = pathlib.Path(folder)
            names[str(work)] = "WORK"
            kept = pathlib.Path(o.work) if o.work else work
            names[str(kept)] = "WORK"
            plan = work / "plan.toml"
            rules = "".join(f'\n[[rules]]\nmatch = "{glob}"\nformat = "{o.format}"\n' for glob in globs)
            plan.write_text(
                f'precision_plan = 1\nname = "one-layer"\ndefault = "bf16"\n{rules}', encoding="utf-8"
            )
            statistics = str(kept / f"{globs[0].strip('*').split('.')[-1]}.stats")
            print(f"[{time.time() - begin:5.0f} s] {globs[0]}: calibrating", file=sys.stderr, flush=True)
            cost = pathlib.Path(f"{statistics}.cost.json")
            if not cost.exists():
                wanted = ["--limit", str(o.limit), "--moments", globs[0]]
                seconds, peak = tool.run("calibrate", o.checkpoint, statistics, "--cases", o.cases, *wanted)
                took = {"seconds": round(seconds, 1), "peak_bytes": peak, "command": tool.log[-1]}
                cost.write_text(json.dumps(took), encoding="utf-8")
            row: dict[str, Any] = {
                "layers": globs,
                "format": o.format,
                "plan": plan.read_text(encoding="utf-8"),
                "calibrate": json.loads(cost.read_text(encoding="utf-8")),
                "statistics_bytes": pathlib.Path(statistics).stat().st_size,
                "methods": {},
            }
            methods = {"nearest": [], "gptq": ["--rounding", "gptq"]}
            if not behind:  # the report of gptq has round-to-nearest's errors too
                methods.pop("nearest")
            for method, arguments in methods.items():
                print(f"[{time.time() - begin:5.0f} s] {globs[0]}: {method}", file=sys.stderr, flush=True)
                out = work / "out"
                seconds, peak = tool.run(
                    "quantize",
                    o.checkpoint,
                    str(out),
                    "--recipe",
                    str(plan),
                    "--statistics",
                    statistics,
                    *arguments,
                )
                made = json.loads((out / "quantization_report.json").read_text(encoding="utf-8"))
                row["calibration_cases"] = [case["name"] for case in made["calibration"]["cases"]]
                one: dict[str, Any] = {
                    "seconds": round(seconds, 1),
                    "peak_bytes": peak,
                    "layers": made["layers"],
                }
                if behind:
                    heldout = work / "heldout"
                    shutil.rmtree(heldout, ignore_errors=True)
                    heldout.mkdir()
                    others = [case for case in cases if case.stem not in row["calibration_cases"]][: o.judge]
                    for case in others:
                        shutil.copy(case, heldout)
                    row["heldout_cases"] = [case.stem for case in others]
                    report = work / "compare.json"
                    arguments = ["--precision-a", "bf16", "--cases", str(heldout), "--json", str(report)]
                    tool.run(
                        "compare",
                        o.checkpoint,
                        str(out),
                        *arguments,
                        "--device-a",
                        "cpu",
                        "--device-b",
                        "cpu",
                    )
                    tensors = json.loads(report.read_text(encoding="utf-8"))["tensors"]
                    found = next((t for t in tensors if behind in t["name"]), None)
                    if found is None:
                        raise SystemExit(
                            f"--layer …:{behind}: no such tensor; there are {[t['name'] for t in tensors]}"
                        )
                    one["heldout"] = {k: found[k] for k in ("name", "relative", "cosine", "mae", "max_abs")}
                row["methods"][method] = one
                shutil.rmtree(out)
            rows.append(row)
            names.pop(str(work))
    result = header(tool, begin) | {"part": "layer", "rows": rows}
    before = ROOT / "bench" / "results" / f"quantization-methods-{o.name}.json"
    if before.exists():  # rows of other layers stay
        old = json.loads(before.read_text(encoding="utf-8"))
        result["commands"] = old["commands"] + result["commands"]
        result["rows"] = [
            row for row in old["rows"] if row["layers"] not in [r["layers"] for r in rows]
        ] + rows
    write(o.name, result)


def table(result: dict[str, Any]) -> str:
    if result["part"] == "policy":
        lines = [
            "| recipe | method | own metric, of round-to-nearest's | layers better, worse | output error, of round-to-nearest's "
            "| actions, MAE | velocity, 1 - cosine (first step) | velocity (all) |",
            "|---|---|--:|--:|--:|--:|--:|--:|",
        ]
        floor = result["bf16"]
        lines.append(
            f"| bf16 | - | | | | {floor['actions_mae']:.2e} | {floor['velocity_1_minus_cosine_first_step']:.1e} "
            f"| {floor['velocity_1_minus_cosine']:.1e} |"
        )
        for row in result["rows"]:
            own, held = row["own"], row["heldout"]
            cells = [row["recipe"], row["method"]]
            cells += [
                f"{own['ratio']:.2f} ({own['metric']})",
                f"{own['better']}, {own['worse']} of {own['layers']}",
            ]
            cells += [f"{row['output']['ratio']:.2f}", f"{held['actions_mae']:.2e}"]
            cells += [
                f"{held['velocity_1_minus_cosine_first_step']:.1e}",
                f"{held['velocity_1_minus_cosine']:.1e}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)
    lines = [
        "| layer | method | shape | output error | weight error | held out, behind it | seconds | peak memory, GB |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        if "nearest" not in row["methods"]:
            for made in row["methods"]["gptq"]["layers"]:
                shape = " x ".join(str(n) for n in made["shape"])
                cells = [made["name"].split("layers.")[-1], "nearest", shape]
                cells += [
                    f"{made['output_error_nearest']:.3g}",
                    f"{made['weight_error_nearest']:.3g}",
                    "",
                    "",
                    "",
                ]
                lines.append("| " + " | ".join(cells) + " |")
        for method, one in row["methods"].items():
            for i, made in enumerate(one["layers"]):
                shape = " x ".join(str(n) for n in made["shape"])
                held = f"{one['heldout']['relative']:.3g}" if one.get("heldout") and i == 0 else ""
                cells = [made["name"].split("layers.")[-1], method, shape, f"{made['output_error']:.3g}"]
                cells += [f"{made['weight_error']:.3g}", held]
                cells += [f"{one['seconds']:.0f}", f"{one['peak_bytes'] / 1e9:.1f}"] if i == 0 else ["", ""]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--binary", default=str(ROOT / "build/release/servoflow"))
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("policy", help="all methods on a trained checkpoint")
    one.add_argument("name", help="of the result file")
    one.add_argument("checkpoint")
    one.add_argument("--calibrate", required=True, metavar="DIR", help="recorded cases to calibrate on")
    one.add_argument("--judge", required=True, metavar="DIR", help="recorded cases of other episodes")
    one.add_argument("--work", metavar="DIR", help="keeps the statistics, which then are not gathered again")
    one = commands.add_parser("layer", help="GPTQ of single layers at real size")
    one.add_argument("checkpoint")
    one.add_argument("--name", default="real-size-layer", help="of the result file")
    one.add_argument("--cases", required=True, metavar="DIR")
    one.add_argument("--limit", type=int, default=4, metavar="N", help="cases to calibrate on")
    one.add_argument("--judge", type=int, default=2, metavar="N", help="other cases, to judge by")
    one.add_argument("--format", default="int4-g128-w4a16")
    one.add_argument(
        "--work",
        metavar="DIR",
        help="for temporary files (10 GB); keeps the statistics, which then are not gathered again",
    )
    one.add_argument(
        "--layer",
        action="append",
        required=True,
        dest="layers",
        metavar="GLOB[,GLOB][:BEHIND]",
        type=lambda text: (text.split(":")[0].split(","), text.partition(":")[2]),
        help="layers that read the same inputs; BEHIND names the tensor of `compare` to judge them by",
    )
    one = commands.add_parser("table", help="print a result as Markdown")
    one.add_argument("result")
    o = parser.parse_args()
    if o.command == "policy":
        policy(o)
    elif o.command == "layer":
        layer(o)
    else:
        print(table(json.loads(pathlib.Path(o.result).read_text(encoding="utf-8"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
