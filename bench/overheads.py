#!/usr/bin/env python3
"""What the engine costs beside its kernels, and what a shared core does to it (`make bench-overheads`).

usage: overheads.py [--binary build/release/servoflow] [--zones build/release/bin/zones_bench] [--rounds 5] [--name overheads]

Three figures, written to bench/results/NAME.json with everything they were made from:
  call overhead   time of a tiny policy's inference that no kernel accounts for: what the trace leaves to the stages
                  themselves, recording the trace included; the least of all runs, since other processes only add to it
  tracing, off    zones of one inference times the measured cost of a zone that is switched off, as a share of the inference
  shared core     the same work alone and with a busy process pinned to one of the cores, in turns; the ratio within a round
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench" / "peers"))
from run import machine  # noqa: E402

STAGES = ("vision", "prefix", "denoise")


def bench(binary, *arguments):
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.json"
        command = [binary, "bench", *arguments, "--no-peaks", "--log-level", "warn", "--json", str(report)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        return json.loads(report.read_text(encoding="utf-8"))


def call_overhead(binary, threads, rounds):
    """Microseconds per inference outside every kernel zone, and the number of zones."""
    samples, zones = [], 0
    for _ in range(4 * rounds):
        report = bench(binary, "--synthetic", "tiny", "--repeat", "30", "--components", "--threads", str(threads))
        rows = {row["name"]: row for row in report["components"]}
        samples.append(1e3 * sum(rows[stage]["ms"] for stage in STAGES))
        zones = sum(row["calls"] for row in rows.values())
    return {"threads": threads, "samples_us": samples, "min_us": min(samples), "zones": zones}


def zone_cost(program):
    done = subprocess.run([program, "--benchmark_format=json"], check=True, capture_output=True, text=True)
    times = {run["name"]: run["real_time"] for run in json.loads(done.stdout)["benchmarks"]}
    return {name.split("/")[1]: ns for name, ns in times.items()}


def busy(core):
    code = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    return subprocess.Popen([sys.executable, "-c", code])


def shared_core(binary, rounds):
    work = ("--synthetic", "bench/peers/reduced.json", "--repeat", "3", "--warmup", "1")
    core = min(os.sched_getaffinity(0))
    out = []
    for _ in range(rounds):
        alone = bench(binary, *work)["end_to_end_ms"]["p50"]
        other = busy(core)
        try:
            shared = bench(binary, *work)["end_to_end_ms"]["p50"]
        finally:
            other.kill()
            other.wait()
        out.append({"alone_ms": alone, "shared_ms": shared, "ratio": shared / alone})
    return {"work": " ".join(work), "rounds": out, "median_ratio": statistics.median(r["ratio"] for r in out)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", default=str(ROOT / "build" / "release" / "servoflow"))
    parser.add_argument("--zones", default=str(ROOT / "build" / "release" / "bin" / "zones_bench"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="overheads")
    args = parser.parse_args()

    cores = len(os.sched_getaffinity(0))
    calls = [call_overhead(args.binary, threads, args.rounds) for threads in sorted({1, cores})]
    zone = zone_cost(args.zones)
    reduced = bench(args.binary, "--synthetic", "bench/peers/reduced.json", "--repeat", "2", "--components")
    reduced_zones = sum(row["calls"] for row in reduced["components"])
    share = reduced_zones * zone["on:0"] * 1e-6 / reduced["end_to_end_ms"]["p50"]
    shared = shared_core(args.binary, args.rounds)
    for call in calls:
        print(f"call overhead, tiny policy, {call['threads']} threads: {call['min_us']:.1f} us ({call['zones']} zones)")
    print(f"zone: {zone['on:0']:.2f} ns off, {zone['on:1']:.0f} ns on; tracing off costs {100 * share:.5f} % of an inference")
    print(f"one of {cores} cores busy: {shared['median_ratio']:.2f} times the time alone")

    out = ROOT / "bench" / "results" / f"{args.name}.json"
    out.parent.mkdir(exist_ok=True)
    result = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "call_overhead": calls, "zone_ns": zone,
              "tracing_off_share": share, "shared_core": shared, "build": reduced["build"]}
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {out.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
