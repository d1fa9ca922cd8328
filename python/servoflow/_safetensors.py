"""Writes a safetensors file: an 8-byte length, a JSON header, the tensors' bytes. With NumPy alone."""

from __future__ import annotations

from collections.abc import Mapping
import json
import os
import pathlib
from typing import Any

import numpy as np
import numpy.typing as npt

_NAMES = {"f8": "F64", "f4": "F32", "i8": "I64", "i4": "I32", "u1": "U8", "b1": "BOOL"}


def write(path: pathlib.Path, tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """All of the file or nothing: it appears under its name when it is complete."""
    # Wide types first, so that every tensor begins at a multiple of its type's size.
    names = sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    blocks = []
    end = 0
    for name in names:
        array = np.ascontiguousarray(tensors[name])
        block = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        kind = f"{array.dtype.kind}{array.dtype.itemsize}"
        header[name] = {
            "dtype": _NAMES[kind],
            "shape": list(array.shape),
            "data_offsets": [end, end + len(block)],
        }
        end += len(block)
        blocks.append(block)
    text = json.dumps(header, ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for block in blocks:
                file.write(block)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
