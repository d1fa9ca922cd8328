#!/usr/bin/env python3
"""Recomputes recorded calls of openpi through the Python package, and says how far off the actions are.

A recording (tests/golden/README.md) holds frames, state, prompt and noise, and what openpi's PyTorch code made of them. Each goes
through `Policy.infer` in float32; the largest difference of the flow's actions, as a share of their root mean square, must stay
below the gate that the recording brings. `servoflow verify` compares every stage between, too.

  check_recordings.py                                    # tests/golden/openpi-tiny
  check_recordings.py CHECKPOINT --cases FOLDER --device cuda

Exit code 1 if one is beyond its gate.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np

import servoflow

ROOT = pathlib.Path(__file__).resolve().parents[1]
DTYPES = {"F64": "<f8", "F32": "<f4", "I32": "<i4", "U8": "|u1", "BOOL": "|b1"}
# The recordings are of LIBERO's statistics with cameras and prompts of all kinds: pictures come under the model's own names.
CONTRACT = """
name = "recording"
asset = "physical-intelligence/libero"
[cameras]
base_0_rgb = {{ key = "base_0_rgb", required = false }}
left_wrist_0_rgb = {{ key = "left_wrist_0_rgb", required = false }}
right_wrist_0_rgb = {{ key = "right_wrist_0_rgb", required = false }}
[state]
parts = [{{ key = "state", width = {state_width} }}]
[prompt]
key = "prompt"
state_in_prompt = {state_in_prompt}
max_tokens = {max_tokens}
[actions]
width = {action_width}
transforms = []
"""


def read(path: pathlib.Path) -> tuple[dict[str, str], dict[str, np.ndarray[Any, Any]]]:
    """(metadata, tensors) of a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    body = data[8 + length :]
    return metadata, {
        name: np.frombuffer(body[slice(*t["data_offsets"])], DTYPES[t["dtype"]]).reshape(t["shape"])
        for name, t in header.items()
    }


def check(policy: servoflow.Policy, path: pathlib.Path, folder: pathlib.Path) -> tuple[str, bool]:
    """(a line of the table, whether it is within its gate)."""
    metadata, tensors = read(path)
    contract = folder / f"{path.stem}.toml"
    state = tensors["input/state"]
    contract.write_text(
        CONTRACT.format(
            state_width=len(state),
            state_in_prompt=str(metadata["prompt_mode"] == "state").lower(),
            max_tokens=metadata["max_tokens"],
            action_width=metadata["action_width"],
        ),
        encoding="utf-8",
    )
    pictures = {slot: tensors[f"input/image/{slot}"] for slot in metadata["slots"].split()}
    session = policy.new_session(robot=contract)
    reply = session.infer(
        {**pictures, "state": state, "prompt": metadata["prompt"]},
        noise=tensors["input/noise"],
        steps=int(metadata["steps"]),
    )
    expected = tensors["expect/actions_normalized"].astype(np.float64)
    difference = np.abs(reply["servoflow"]["normalized"] - expected).max()
    size = np.sqrt(np.mean(expected**2))
    gate = json.loads(metadata["tolerances"])["fp32"]["actions_normalized"]["max"]
    robot = np.abs(reply["actions"] - tensors["expect/actions"]).max()
    good = bool(difference <= gate * size)
    line = (
        f"{path.stem:16} {len(pictures):5} {reply['servoflow']['prefix_tokens']:7} {int(metadata['steps']):5}"
        f" {difference / size:11.1e} {gate:8.1e} {robot:13.1e}  {'pass' if good else 'FAIL'}"
    )
    return line, good


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?", type=pathlib.Path, default=ROOT / "tests/golden/openpi-tiny")
    parser.add_argument("--cases", type=pathlib.Path, help="default: CHECKPOINT/cases")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda (default: cpu)")
    o = parser.parse_args()
    folder_of_cases = o.cases or o.checkpoint / "cases"
    cases = sorted(folder_of_cases.glob("*.safetensors"))
    if not cases:
        parser.error(f"{folder_of_cases}: no recordings (*.safetensors)")
    try:
        policy = servoflow.Policy.open(o.checkpoint, robot="libero", device=o.device, precision="fp32")
    except (servoflow.InvalidInput, servoflow.RuntimeFailure) as error:
        parser.error(str(error))
    print("recording        views  prefix steps   error/rms     gate   robot units")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for path in cases:
            try:
                line, good = check(policy, path, pathlib.Path(folder))
            except (servoflow.InvalidInput, servoflow.RuntimeFailure, KeyError, ValueError) as error:
                line, good = f"{path.stem}: cannot be recomputed: {error}  FAIL", False
            print(line)
            results.append(good)
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
