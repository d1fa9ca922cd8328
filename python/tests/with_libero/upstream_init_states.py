"""Writes upstream_init_states.json from a checkout of LIBERO itself: a SHA-256 of every task's stored initial states.

    python upstream_init_states.py LIBERO_CHECKOUT [COMMIT] > upstream_init_states.json

LIBERO's files are what torch.save makes of a NumPy array: a ZIP archive with a pickle, read here without PyTorch and
without letting the pickle name anything but what an array needs.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import subprocess
import sys
from typing import Any
import zipfile

import numpy as np

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
FOLDER = "libero/libero/init_files"


class _Arrays(pickle.Unpickler):
    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} has no business in an array")
        return super().find_class(module, name)


def digest(states: np.ndarray) -> str:
    """Of shape, type and bytes."""
    states = np.ascontiguousarray(states)
    return hashlib.sha256(f"{states.dtype.str} {states.shape} ".encode() + states.tobytes()).hexdigest()


def main() -> None:
    checkout, commit = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "HEAD"

    def git(*arguments: str) -> bytes:
        return subprocess.run(["git", "-C", checkout, *arguments], check=True, capture_output=True).stdout

    out: dict[str, Any] = {
        "source": "https://github.com/Lifelong-Robot-Learning/LIBERO",
        "commit": git("rev-parse", commit).decode().strip(),
        "suites": {},
    }
    for suite in SUITES:
        files = git("ls-tree", "--name-only", commit, f"{FOLDER}/{suite}/").decode().split()
        tasks = {}
        for file in sorted(f for f in files if f.endswith(".pruned_init")):
            with zipfile.ZipFile(io.BytesIO(git("show", f"{commit}:{file}"))) as archive:
                states = _Arrays(io.BytesIO(archive.read("archive/data.pkl"))).load()
            tasks[file.rsplit("/", 1)[1].removesuffix(".pruned_init")] = digest(states)
        out["suites"][suite] = tasks
    json.dump(out, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
