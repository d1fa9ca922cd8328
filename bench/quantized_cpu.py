#!/usr/bin/env python3
"""Quantized recipes against bf16 on this CPU, interleaved (`make bench-quantized`).

usage: quantized_cpu.py [--recipes int8-w8a8,nvfp4-w4a16,...] [--rounds 2] [--repeat 2] [--model pi05] [--views 2] [--tokens 200]
                        [--horizon 50] [--steps 10] [--threads 0] [--binary build/release/servoflow] [--name cpu-quantized-pi05]

Each round opens the same random network once per precision, bf16 first, in a process of its own: one inference of
warm-up, then --repeat that count. Rounds are repeated so that a machine that slows down meets all of them. Ratios are
between the minima of all rounds; every sample is in bench/results/NAME.json too. Peak memory is the process's, loading
included; weights are rounded while they are loaded. About 12 minutes at the published size on two cores.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench" / "peers"))
from run import machine  # noqa: E402

RECIPES = "int8-w8a8,int8-w8a16,fp8-w8a8,int4-g128-w4a16,nvfp4-w4a16,nvfp4-w4a8"
STAGES = ("vision", "prefix", "denoise", "step")
# What is asked of the recipes: end to end against bf16, the slowest stage against bf16, bytes of peak memory.
GOALS = {
    "int8-w8a8": {"speedup": 1.5, "stage": 0.9, "peak_rss_bytes": int(3.6 * 2**30)},
    "int4-g128-w4a16": {"stage": 0.9, "peak_rss_bytes": 3 * 10**9},
    "nvfp4-w4a16": {"stage": 0.9, "peak_rss_bytes": 3 * 10**9},
    "nvfp4-w4a8": {"stage": 0.9, "peak_rss_bytes": 3 * 10**9},
}


def bench(o: argparse.Namespace, precision: str, peaks: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.json"
        command = [o.binary, "bench", "--synthetic", o.model, "--device", "cpu", "--precision", precision]
        for name in ("views", "tokens", "horizon", "steps", "threads", "repeat"):
            command += [f"--{name}", str(getattr(o, name))]
        command += ["--warmup", "1", "--log-level", "warn", "--json", str(report)]
        command += [] if peaks else ["--no-peaks"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")
        return json.loads(report.read_text(encoding="utf-8"))


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Least and median milliseconds of all rounds, and what the runs say of memory and precision."""
    out: dict[str, Any] = {"stages_ms": {}}

    def put(target: dict[str, Any], samples: list[float], medians: list[float]) -> None:
        target.update({"min": min(samples), "median_of_rounds": statistics.median(medians)})

    out["end_to_end_ms"] = {}
    put(
        out["end_to_end_ms"],
        [r["end_to_end_ms"]["min"] for r in runs],
        [r["end_to_end_ms"]["p50"] for r in runs],
    )
    for stage in STAGES:
        out["stages_ms"][stage] = {}
        put(
            out["stages_ms"][stage],
            [r["stages_ms"][stage]["min"] for r in runs],
            [r["stages_ms"][stage]["p50"] for r in runs],
        )
    out["peak_rss_bytes"] = max(r["peak_rss_bytes"] for r in runs)
    out["weight_bytes"] = runs[0]["weight_bytes"]
    out["ready_s"] = min(r["ready_s"] for r in runs)
    out["backend"] = runs[0]["backend"]
    out["precisions"] = runs[0]["precisions"]
    out["actions_hash"] = sorted({r["actions"]["hash"] for r in runs})
    return out


def compare(name: str, one: dict[str, Any], base: dict[str, Any]) -> None:
    one["speedup"] = base["end_to_end_ms"]["min"] / one["end_to_end_ms"]["min"]
    one["stage_speedups"] = {s: base["stages_ms"][s]["min"] / one["stages_ms"][s]["min"] for s in STAGES}
    goals = GOALS.get(name, {})
    one["goals"] = {
        key: {"goal": goal, "met": met}
        for key, goal, met in (
            ("speedup", goals.get("speedup"), one["speedup"] >= goals.get("speedup", 0)),
            ("stage", goals.get("stage"), min(one["stage_speedups"].values()) >= goals.get("stage", 0)),
            (
                "peak_rss_bytes",
                goals.get("peak_rss_bytes"),
                one["peak_rss_bytes"] <= goals.get("peak_rss_bytes", 1 << 62),
            ),
        )
        if goal is not None
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        f"{'precision':<18}{'ms':>8}{'x bf16':>8}{'vision':>9}{'prefix':>9}{'step':>9}{'peak GiB':>10}{'weights GiB':>13}"
    ]
    for name, one in results.items():
        stages = one["stages_ms"]
        lines.append(
            f"{name:<18}{one['end_to_end_ms']['min']:>8.0f}{one['speedup']:>8.2f}{stages['vision']['min']:>9.0f}"
            f"{stages['prefix']['min']:>9.0f}{stages['step']['min']:>9.1f}{one['peak_rss_bytes'] / 2**30:>10.2f}"
            f"{one['weight_bytes'] / 2**30:>13.2f}"
            + "".join(f"  {key}: MISSED" for key, goal in one["goals"].items() if not goal["met"])
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", default=RECIPES)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--model", default="pi05")
    for option, default in (("views", 2), ("tokens", 200), ("horizon", 50), ("steps", 10), ("threads", 0)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--binary", default=str(ROOT / "build" / "release" / "servoflow"))
    parser.add_argument("--name", default="cpu-quantized-pi05")
    o = parser.parse_args()
    precisions = ["bf16", *o.recipes.split(",")]
    runs: dict[str, list[dict[str, Any]]] = {p: [] for p in precisions}
    began = time.monotonic()
    for round_number in range(o.rounds):
        for precision in precisions:
            peaks = round_number == 0 and precision == "bf16"
            report = bench(o, precision, peaks)
            runs[precision].append(report)
            print(
                f"[{time.monotonic() - began:5.0f} s] round {round_number + 1} of {o.rounds}: {precision}"
                f" {report['end_to_end_ms']['min']:.0f} ms, ready in {report['ready_s']:.1f} s",
                file=sys.stderr,
                flush=True,
            )
    results = {p: summary(r) for p, r in runs.items()}
    for name, one in results.items():
        compare(name, one, results["bf16"])
    out = {
        "what": "quantized recipes against bf16 on the CPU, interleaved",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine(),
        "protocol": f"{o.rounds} rounds, a process per precision and round, 1 warm-up and {o.repeat} runs each; minima",
        "work": {key: getattr(o, key) for key in ("model", "views", "tokens", "horizon", "steps", "threads")},
        "peaks": runs["bf16"][0]["peaks"],
        "results": results,
        "samples": {
            p: [
                {"end_to_end_ms": r["end_to_end_ms"], "stages_ms": r["stages_ms"], "rates": r["rates"]}
                for r in of
            ]
            for p, of in runs.items()
        },
    }
    path = ROOT / "bench" / "results" / f"{o.name}.json"
    temporary = path.with_suffix(".json.part")
    temporary.write_text(json.dumps(out, indent=2) + "\n", encoding="utf-8")
    temporary.rename(path)
    print(table(results))
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
