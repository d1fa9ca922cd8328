#!/usr/bin/env python3
"""What each recipe costs and changes: bytes, peak memory, latency, and the accuracy of actions, on one checkpoint.

usage: quantization_table.py NAME CHECKPOINT [--cases DIR | --random-cases N] [--recipes R,R,…] [--gates noise]

Every recipe is rounded at load from the float checkpoint, without calibration, and runs on the CPU. Latency and peak memory
come from `servoflow bench` (its own process each, the recipes in turn, --rounds times: of a recipe's rounds the one with the
smallest median counts), accuracy from `servoflow compare` against the
checkpoint in --reference. The result is bench/results/quantization-NAME.json with everything it was made from; the table
is printed as Markdown, and --table prints it again from results that are there.

  quantization_table.py tiny tests/golden/openpi-tiny --gates noise
  quantization_table.py --table bench/results/quantization-tiny.json
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench" / "peers"))
from run import machine  # noqa: E402

RECIPES = (
    "int8-w8a8",
    "int8-w8a16",
    "fp8-w8a8",
    "int4-g128-w4a16",
    "nvfp4-w4a16",
    "nvfp4-w4a8",
    "nvfp4-w4a4-dynamic",
    "mlp-int8",
    "mlp-int4",
    "mlp-nvfp4",
)


def servoflow(binary: str, *arguments: str, allowed: tuple[int, ...] = (0,)) -> tuple[dict[str, Any], int]:
    """The JSON a subcommand writes, and its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.json"
        command = [binary, *arguments, "--log-level", "error", "--json", str(report)]
        done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
        if done.returncode not in allowed or not report.exists():
            raise SystemExit(f"{' '.join(command)}\nexited with {done.returncode}:\n{done.stderr[-2000:]}")
        return json.loads(report.read_text(encoding="utf-8")), done.returncode


def measure(o: argparse.Namespace, precision: str) -> dict[str, Any]:
    work = ["--views", str(o.views), "--tokens", str(o.tokens), "--repeat", str(o.repeat), "--warmup", "1"]
    bench, _ = servoflow(o.binary, "bench", o.checkpoint, "--precision", precision, *work, "--no-peaks")
    return {
        key: bench.get(key)
        for key in ("end_to_end_ms", "stages_ms", "peak_rss_bytes", "device_bytes", "backend")
    }


def median(bench: dict[str, Any]) -> float:
    return float(bench["end_to_end_ms"]["p50"])


def accuracy(o: argparse.Namespace, precision: str) -> dict[str, Any]:
    cases = (
        ["--random-cases", str(o.random_cases)] if o.random_cases else ["--cases", o.cases] if o.cases else []
    )
    command = ["compare", o.checkpoint, "--precision-a", o.reference, "--precision-b", precision, *cases]
    command += ["--device-a", "cpu", "--device-b", "cpu"]
    if o.limit:
        command += ["--limit", str(o.limit)]
    if o.gates and precision not in ("fp32", "bf16"):  # they have no noise of a format
        command += ["--gates", o.gates]
    else:
        command += ["--no-layers"]
    report, code = servoflow(o.binary, *command, allowed=(0, 1))
    report.pop("tensors", None)  # large, and made again by the same command
    report["exit_code"] = code
    return report


def mean_absolute_error(report: dict[str, Any]) -> float:
    """Of the worst action column, in the columns' own units."""
    return max(column["mae"] for column in report["actions"]["columns"])


def table(result: dict[str, Any]) -> str:
    units = {row["accuracy"]["actions"]["units"] for row in result["rows"] if row["accuracy"]}
    unit = "robot units" if units == {"robot"} else "normalised"
    lines = [
        f"| recipe | weights, MB | peak memory, MB | CPU, ms | actions, 1 - cosine | velocity, 1 - cosine (worst step) "
        f"| max-abs, {unit} | MAE of the worst action, {unit} | noise band |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in result["rows"]:
        bench, report = row["bench"], row["accuracy"]
        cells = [row["precision"], f"{bench['weight_bytes'] / 1e6:.1f}" if bench.get("weight_bytes") else "-"]
        cells += [f"{bench['peak_rss_bytes'] / 1e6:.0f}", f"{bench['end_to_end_ms']['p50']:.2f}"]
        if report:
            metrics = report["metrics"]
            cells += [f"{1 - metrics['actions.cosine.all']:.1e}", f"{1 - metrics['velocity.cosine']:.1e}"]
            cells += [f"{max(c['max_abs'] for c in report['actions']['columns']):.3g}"]
            cells += [f"{mean_absolute_error(report):.3g}"]
            cells += ["-" if not report["gates"] else "inside" if report["passed"] else "OUTSIDE"]
        else:
            cells += ["reference", "", "", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help="of the result file")
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--binary", default=str(ROOT / "build/release/servoflow"))
    parser.add_argument("--cases", help="folder of recorded cases; default: the checkpoint's own")
    parser.add_argument("--random-cases", type=int, default=0, metavar="N")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="cases at most")
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--reference", default="fp32", help="precision that accuracy is measured against")
    parser.add_argument("--gates", help="noise: bands from the formats' own noise, for random weights")
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1, help="of latency, all recipes in each")
    parser.add_argument("--table", metavar="RESULT.json", help="print the table of a result")
    o = parser.parse_args()
    if o.table:
        print(table(json.loads(pathlib.Path(o.table).read_text(encoding="utf-8"))))
        return 0
    if not o.name or not o.checkpoint:
        parser.error("NAME and CHECKPOINT, or --table RESULT.json")

    begin = time.time()
    rows: list[dict[str, Any]] = []
    precisions = ["bf16", *[r for r in o.recipes.split(",") if r]]

    def say(what: str, i: int) -> None:
        clock = f"[{time.time() - begin:5.0f} s]"
        print(f"{clock} {what} {i + 1}/{len(precisions)} {precisions[i]}", file=sys.stderr, flush=True)

    benches: dict[str, list[dict[str, Any]]] = {precision: [] for precision in precisions}
    for number in range(o.rounds):
        for i, precision in enumerate(precisions):
            say(f"latency, round {number + 1} of {o.rounds}:", i)
            benches[precision].append(measure(o, precision))
    for i, precision in enumerate(precisions):
        say("accuracy:", i)
        report = None if precision == o.reference else accuracy(o, precision)
        bench = min(benches[precision], key=median)
        bench["medians_of_rounds_ms"] = [median(b) for b in benches[precision]]
        if report:
            bench["weight_bytes"] = report["b"]["weight_bytes"]
        rows.append({"precision": precision, "bench": bench, "accuracy": report})
    for row in rows:  # the reference has no comparison of its own
        if not row["bench"].get("weight_bytes"):
            row["bench"]["weight_bytes"] = next(
                (r["accuracy"]["a"]["weight_bytes"] for r in rows if r["accuracy"]), None
            )
    result = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "checkpoint": o.name,
        "protocol": {k: v for k, v in vars(o).items() if k not in ("binary", "table", "checkpoint", "cases")},
        "seconds": round(time.time() - begin, 1),
        "machine": machine(),
        "rows": rows,
    }
    path = ROOT / "bench" / "results" / f"quantization-{o.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))
    print(f"\n{path.relative_to(ROOT)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
