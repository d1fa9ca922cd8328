#!/usr/bin/env python3
"""servoflow against PyTorch on the same work and machine, in turns: A B C, A B C, ... (`make bench-peers`).

usage: run.py [--name NAME] [--rounds 3] [--repeat 3] [--model pi05|FILE.json] [--views 2] [--tokens 200] [--horizon 50]
              [--steps 10] [--variants eager,eager-malloc,compiled] [--python PATH] [--binary build/release/servoflow]

Every turn is a process of its own. A ratio is taken within a round, so that a machine that slows down, slows both.
Variants: `eager` is PyTorch as installed; `eager-malloc` keeps freed memory instead of handing it back to the system
between layers; `compiled` is torch.compile with freezing. Without --python a virtual environment with the pinned
PyTorch is made under build/. The table goes to stdout, everything measured to bench/results/NAME.json.
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
REQUIREMENTS = ("torch==2.13.0", "numpy")
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
PEERS = {
    "eager": (["--variant", "eager"], {}),
    "eager-malloc": (["--variant", "eager"], MALLOC),
    "compiled": (["--variant", "compiled"], {}),
}
OURS = "servoflow"


def read(path, default=""):
    try:
        return pathlib.Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return default


def machine():
    cpu = dict(line.split(":", 1) for line in read("/proc/cpuinfo").split("\n\n")[0].splitlines() if ":" in line)
    cpu = {key.strip(): value.strip() for key, value in cpu.items()}
    memory = dict(line.split(":", 1) for line in read("/proc/meminfo").splitlines())
    return {
        "cpu": cpu.get("model name", platform.machine()), "family": cpu.get("cpu family"), "model": cpu.get("model"),
        "flags": cpu.get("flags", cpu.get("Features", "")), "cores": len(os.sched_getaffinity(0)),
        "memory": memory.get("MemTotal", "").strip(), "kernel": platform.release(),
        "governor": read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "not readable"),
        "huge_pages": read("/sys/kernel/mm/transparent_hugepage/enabled", "not readable"),
    }


def environment_python():
    """The interpreter of a virtual environment that holds the pinned PyTorch; made on first use."""
    folder = ROOT / "build" / "peers-venv"
    python = folder / "bin" / "python"
    stamp = folder / "installed"
    if read(stamp) != " ".join(REQUIREMENTS):
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, stdout=sys.stderr)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *REQUIREMENTS], check=True, stdout=sys.stderr)
        stamp.write_text(" ".join(REQUIREMENTS), encoding="utf-8")
    return str(python)


def turn(command, extra_environment):
    """Runs one process with --json and returns its report."""
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.json"
        load, start = os.getloadavg()[0], time.time()
        done = subprocess.run([*command, "--json", str(report)], cwd=ROOT, env=os.environ | extra_environment,
                              capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return {"load_before": load, "wall_s": time.time() - start} | json.loads(report.read_text(encoding="utf-8"))


def table(rounds, names):
    """One line per engine: best milliseconds, time against ours round by round, memory, time to ready."""
    lines = [f"{'engine':<22}{'min ms':>10}  {'time / ours, per round':<28}{'peak GiB':>9}{'ready s':>9}"]
    for name in names:
        turns = [one[name] for one in rounds]
        best = min(t["end_to_end_ms"]["min"] for t in turns)
        ratios = [one[name]["end_to_end_ms"]["min"] / one[OURS]["end_to_end_ms"]["min"] for one in rounds]
        peak = max(t["peak_rss_bytes"] for t in turns) / 2**30
        ready = min(t["ready_s"] for t in turns)
        lines.append(f"{name:<22}{best:>10.1f}  {'  '.join(f'{r:.3f}' for r in ratios):<28}{peak:>9.2f}{ready:>9.1f}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name")
    parser.add_argument("--model", default="pi05")
    parser.add_argument("--variants", default=",".join(PEERS))
    parser.add_argument("--python", help="an interpreter that has PyTorch; default: a virtual environment")
    parser.add_argument("--binary", default=str(ROOT / "build" / "release" / "servoflow"))
    for name, default in (("rounds", 3), ("repeat", 3), ("warmup", 1), ("views", 2), ("tokens", 200), ("horizon", 50),
                          ("steps", 10), ("threads", 0)):
        parser.add_argument("--" + name, type=int, default=default)
    args = parser.parse_args()
    variants = [v for v in args.variants.split(",") if v]
    if unknown := set(variants) - set(PEERS):
        parser.error(f"unknown variants {sorted(unknown)}; there are {sorted(PEERS)}")
    if not pathlib.Path(args.binary).is_file():
        parser.error(f"{args.binary} is not there: run `make build` first")

    work = []
    for name in ("views", "tokens", "horizon", "steps", "repeat", "warmup", *(["threads"] if args.threads else [])):
        work += ["--" + name, str(getattr(args, name))]
    python = args.python or environment_python()
    script = str(ROOT / "bench" / "peers" / "pytorch_pi05.py")
    engines = {OURS: ([args.binary, "bench", "--synthetic", args.model, "--precision", "bf16", *work], {})}
    for variant in variants:
        options, extra = PEERS[variant]
        engines[f"pytorch {variant}"] = ([python, script, "--model", args.model, *options, *work], extra)

    rounds = []
    for number in range(args.rounds):
        rounds.append({})
        for name, (command, extra) in engines.items():
            report = turn(command, extra)
            rounds[-1][name] = report
            print(f"round {number + 1}/{args.rounds}: {name}: {report['end_to_end_ms']['min']:.1f} ms", file=sys.stderr)

    print(table(rounds, engines))
    model = pathlib.Path(args.model).stem
    name = args.name or f"peers-{model}-v{args.views}-t{args.tokens}-h{args.horizon}-s{args.steps}"
    out = ROOT / "bench" / "results" / f"{name}.json"
    out.parent.mkdir(exist_ok=True)
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=False)
    commands = {
        name: {"arguments": [part.removeprefix(f"{ROOT}/") for part in command[1:]], "environment": extra}
        for name, (command, extra) in engines.items()
    }
    result = {
        "date": time.strftime("%Y-%m-%d"), "commit": commit.stdout.strip(), "machine": machine(),
        "protocol": "one process per turn, engines in turns within each round; minima of repeats",
        "commands": commands, "rounds": rounds,
    }
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {out.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
