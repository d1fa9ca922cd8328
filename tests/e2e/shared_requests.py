"""Requests that every way into the engine must answer with the same bits, and what `servoflow run` answers.

shared_requests.json holds them; paths in it are relative to the repository root. Used by the tests of the C interface and of
the Python package; standard library only.
"""

import json
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]


def load():
    """List of {name, checkpoint, robot ("" = the checkpoint's own), seed, images {request key: PNG file}, state, prompt}."""
    return json.loads((ROOT / "tests/e2e/shared_requests.json").read_text(encoding="utf-8"))


def run_command(binary, request, precision="fp32", threads=1):
    """What `servoflow run` says to a request, as its JSON: actions are rows of floats, printed with all their digits."""
    command = [
        str(binary),
        "run",
        request["checkpoint"],
        "--seed",
        str(request["seed"]),
        "--precision",
        precision,
        "--device",
        "cpu",
        "--threads",
        str(threads),
        "--prompt",
        request["prompt"],
        "--log-level",
        "warn",
        "--state=" + ",".join(map(repr, request["state"])),
        "--json",
        "-",
    ]
    command += ["--robot", request["robot"]] if request["robot"] else []
    for key, file in request["images"].items():
        command += ["--image", f"{key}={file}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        raise RuntimeError(f"{command}: {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout)
