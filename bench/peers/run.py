#!/usr/bin/env python3
"""servoflow against PyTorch on the same work and machine, in turns: A B C, A B C, ... (`make bench-peers`).

usage: run.py [--name NAME] [--rounds 3] [--repeat 3] [--model pi05|FILE.json] [--views 2] [--tokens 200] [--horizon 50]
              [--steps 10] [--variants eager,eager-malloc,compiled] [--python PATH] [--binary build/release/servoflow]
       run.py --device cuda [--repeat 200] [--peer-repeat 100] [--variants graph,graph-fp32,compiled,eager:1] …

Every turn is a process of its own. A ratio is taken within a round, so that a machine that slows down, slows both.
Variants: `eager` is PyTorch as installed; `eager-malloc` keeps freed memory instead of handing it back to the system
between layers; `compiled` is torch.compile with freezing. Without --python a virtual environment with the pinned
PyTorch is made under build/. The table goes to stdout, everything measured to bench/results/NAME.json.

On a CUDA device the variants are those of pi05_cuda.py, each checked against its own eager run in the first round, and
medians are compared (minima on a CPU). `eager:1` takes part in the first round alone. --python is then the interpreter
whose PyTorch sees the GPU (default: this one), --binary build/device-cuda/servoflow.
"""

import argparse
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
REQUIREMENTS = ("torch==2.13.0", "numpy")
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
PEERS = {
    "cpu": {
        "eager": (["--variant", "eager"], {}),
        "eager-malloc": (["--variant", "eager"], MALLOC),
        "compiled": (["--variant", "compiled"], {}),
    },
    "cuda": {v: (["--device", "cuda", "--variant", v], {}) for v in ("graph", "graph-fp32", "compiled", "eager")},
}
DEFAULT_VARIANTS = {"cpu": ",".join(PEERS["cpu"]), "cuda": "graph,graph-fp32,compiled,eager:1"}
STATISTIC = {"cpu": "min", "cuda": "p50"}
SMI_FIELDS = ("name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,"
              "clocks_throttle_reasons.active,memory.used")
OURS = "servoflow"


class TurnFailed(Exception):
    pass


def without_noise(report):
    """Samples to 10 ns, and none of what is derived: a recorded inference has no times of its steps of its own."""
    for distribution in (report["end_to_end_ms"], *report["stages_ms"].values()):
        distribution["samples"] = [round(ms, 5) for ms in distribution["samples"]]
    if report["device"].startswith("cuda"):
        report["stages_ms"]["step"]["samples"] = "denoise / steps"
    return report


def dense_json(value):
    """JSON with one line per key and lists of numbers in one line."""
    text = json.dumps(value, indent=1)
    return re.sub(r"\[\s+([-0-9.,e+\s]+?)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", text)


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


def gpu_state():
    """What nvidia-smi reports of every GPU, by field; read, never set."""
    try:
        done = subprocess.run(["nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader"], capture_output=True,
                              text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return [dict(zip(SMI_FIELDS.split(","), line.split(", "))) for line in done.stdout.strip().splitlines()]


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


def turn(command, extra_environment, gpu):
    """Runs one process with --json and returns its report, with the GPU's state around it."""
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.json"
        before = gpu_state() if gpu else None
        load, start = os.getloadavg()[0], time.time()
        done = subprocess.run([*command, "--json", str(report)], cwd=ROOT, env=os.environ | extra_environment,
                              capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise TurnFailed(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        around = {"load_before": load, "wall_s": time.time() - start, "said": done.stdout.strip().splitlines()[:1]}
        if gpu:
            around |= {"gpus_before": before, "gpus_after": gpu_state()}
        return around | without_noise(json.loads(report.read_text(encoding="utf-8")))


def table(rounds, names, statistic):
    """One line per engine: milliseconds, time against ours round by round, stages, memory, time to ready."""
    heads = "".join(f"{title:>9}" for title in ("vision", "prefix", "step", "GPU GiB", "host GiB", "ready s"))
    lines = [f"{'engine':<22}{statistic + ' ms':>10}  {'time / ours, per round':<28}{heads}"]
    for name in names:
        turns = [one[name] for one in rounds if name in one]
        best = min(t["end_to_end_ms"][statistic] for t in turns)
        ratios = [one[name]["end_to_end_ms"][statistic] / one[OURS]["end_to_end_ms"][statistic]
                  for one in rounds if name in one]
        stages = "".join(f"{min(t['stages_ms'][stage][statistic] for t in turns):>9.2f}"
                         for stage in ("vision", "prefix", "step"))
        device = max(t.get("device_bytes") or 0 for t in turns) / 2**30
        peak = max(t["peak_rss_bytes"] for t in turns) / 2**30
        ready = min(t["ready_s"] for t in turns)
        lines.append(f"{name:<22}{best:>10.2f}  {'  '.join(f'{r:.3f}' for r in ratios):<28}{stages}{device:>9.2f}"
                     f"{peak:>9.2f}{ready:>9.1f}")
    return "\n".join(lines)


def parse_variants(text, known, rounds):
    """{name: rounds it takes part in} of "graph,eager:1"."""
    out = {}
    for part in text.split(","):
        name, _, count = part.partition(":")
        if name not in known or (count and not count.isdigit()):
            raise SystemExit(f"--variants: \"{part}\"; there are {sorted(known)}, each with or without :ROUNDS")
        out[name] = min(rounds, int(count)) if count else rounds
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name")
    parser.add_argument("--model", default="pi05")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--variants")
    parser.add_argument("--python", help="an interpreter that has PyTorch")
    parser.add_argument("--binary", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "bench" / "results", help="folder of the JSON file")
    for name, default in (("rounds", 3), ("repeat", None), ("peer-repeat", None), ("warmup", None), ("views", 2),
                          ("tokens", 200), ("horizon", 50), ("steps", 10), ("threads", 0)):
        parser.add_argument("--" + name, type=int, default=default)
    args = parser.parse_args()
    cuda = args.device == "cuda"
    repeat = args.repeat or (200 if cuda else 3)
    peer_repeat = args.peer_repeat or (100 if cuda else repeat)
    warmup = args.warmup if args.warmup is not None else (10 if cuda else 1)
    variants = parse_variants(args.variants or DEFAULT_VARIANTS[args.device], PEERS[args.device], args.rounds)
    binary = (args.binary or ROOT / "build" / ("device-cuda" if cuda else "release") / "servoflow").resolve()
    if not binary.is_file():
        parser.error(f"{binary} is not there: run `make {'device-cuda' if cuda else 'build'}` first")

    work = []
    for name in ("views", "tokens", "horizon", "steps", *(["threads"] if args.threads else [])):
        work += ["--" + name, str(getattr(args, name))]
    work += ["--warmup", str(warmup)]
    python = args.python or (sys.executable if cuda else environment_python())
    script = str(ROOT / "bench" / "peers" / "pytorch_pi05.py")
    ours = [str(binary), "bench", "--synthetic", args.model, "--precision", "bf16", "--device", args.device, *work]
    engines = {OURS: ([*ours, "--repeat", str(repeat)], {}, args.rounds)}
    for variant, turns in variants.items():
        options, extra = PEERS[args.device][variant]
        command = [python, script, "--model", args.model, *options, *work, "--repeat", str(peer_repeat)]
        engines[f"pytorch {variant}"] = (command, extra, turns)

    statistic = STATISTIC[args.device]
    rounds, failures = [], {}
    for number in range(args.rounds):
        rounds.append({})
        for name, (command, extra, turns) in engines.items():
            if number >= turns:
                continue
            check = ["--check"] if cuda and number == 0 and name not in (OURS, "pytorch eager") else []
            if name in failures:
                continue
            try:
                report = turn([*command, *check], extra, cuda)
            except TurnFailed as failure:
                if name == OURS:
                    raise SystemExit(str(failure)) from None
                failures[name] = str(failure)[-4000:]
                print(f"round {number + 1}/{args.rounds}: {name} failed: {failure}", file=sys.stderr)
                continue
            rounds[-1][name] = report
            took = report["end_to_end_ms"][statistic]
            print(f"round {number + 1}/{args.rounds}: {name}: {took:.2f} ms", file=sys.stderr)

    engines = {name: engine for name, engine in engines.items() if any(name in one for one in rounds)}
    print(table(rounds, engines, statistic))
    model = pathlib.Path(args.model).stem
    prefix = "peers-cuda" if cuda else "peers"
    name = args.name or f"{prefix}-{model}-v{args.views}-t{args.tokens}-h{args.horizon}-s{args.steps}"
    out = args.out.resolve() / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=False)
    commands = {
        name: {"arguments": [part.removeprefix(f"{ROOT}/") for part in command[1:]], "environment": extra}
        for name, (command, extra, _) in engines.items()
    }
    result = {
        "date": time.strftime("%Y-%m-%d"), "commit": commit.stdout.strip(), "machine": machine(),
        "gpus": gpu_state() if cuda else None,
        "protocol": f"one process per turn, engines in turns within each round; {statistic} of repeats",
        "commands": commands, "rounds": rounds,
        "failures": failures,
    }
    out.write_text(dense_json(result) + "\n", encoding="utf-8")
    print(f"written: {out}")


if __name__ == "__main__":
    main()
