"""One file of results per arm: a line that says what was measured, then one JSON object per episode.

Lines are appended and synced one by one, so a run that is cut off loses the episodes in flight and nothing else; a last
line without its end is dropped on the next opening. A file that was written under another protocol is refused: its
episodes and new ones must not be mixed.
"""

from __future__ import annotations

from collections.abc import Mapping
import json
import os
import pathlib
from types import TracebackType
from typing import IO, Any

from .arms import protocol_hash
from .errors import EvalError

_FIELDS = {
    "task": str,
    "episode": int,
    "success": bool,
    "steps": int,
    "replans": int,
    "infer_s": (int, float),
    "wall_s": (int, float),
    "trace": str,
}
MAX_BYTES = 1 << 30


def read(file: pathlib.Path) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    """(header, episodes, bytes that are whole lines). Raises EvalError that names the line."""
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise EvalError(f"{file}: {size} bytes; a results file has at most {MAX_BYTES}")
    data = file.read_bytes()
    whole = data.rfind(b"\n") + 1
    lines = data[:whole].splitlines()
    if not lines:
        return {}, [], 0
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise EvalError(f"{file}:{number}: not JSON ({error}); remove the line or the file") from None
        if not isinstance(record, dict):
            raise EvalError(f"{file}:{number}: expected an object")
        records.append(record)
    header, episodes = records[0], records[1:]
    if not isinstance(header.get("protocol"), dict) or header.get("hash") != protocol_hash(
        header["protocol"]
    ):
        raise EvalError(f"{file}:1: not the first line of a results file, or changed by hand")
    seen: set[tuple[str, int]] = set()
    for number, record in enumerate(episodes, 2):
        for field, kind in _FIELDS.items():
            value = record.get(field)
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):  # type: ignore[arg-type]
                raise EvalError(f"{file}:{number}: {field} is missing or of the wrong kind")
        key = (record["task"], record["episode"])
        if key in seen:
            raise EvalError(f"{file}:{number}: {key[0]} {key[1]} stands there twice")
        seen.add(key)
    return header, episodes, whole


class ArmFile:
    """An arm's results, open for more."""

    def __init__(self, file: pathlib.Path, protocol: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """`protocol`: what results depend on; `about`: what else is worth knowing (machine, date), from the first run."""
        self.file = file
        wanted = json.loads(json.dumps(protocol, default=str))
        self.done: dict[tuple[str, int], dict[str, Any]] = {}
        header: dict[str, Any] = {}
        whole = 0
        if file.exists():
            header, episodes, whole = read(file)
            self.done = {(e["task"], e["episode"]): e for e in episodes}
        if header and header["hash"] != protocol_hash(wanted):
            changed = differences(header["protocol"], wanted)
            raise EvalError(
                f"{file}: holds episodes of another protocol ({'; '.join(changed)}). Use another --out, or remove the file"
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        self._stream: IO[bytes] = file.open("r+b" if file.exists() else "x+b")
        self._stream.truncate(whole)
        self._stream.seek(whole)
        if not header:
            self._write({"protocol": wanted, "hash": protocol_hash(wanted), **about})

    def _write(self, record: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(record, separators=(",", ":")).encode("utf-8") + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one episode so that it survives a crash. An episode that is there already is an error."""
        key = (record["task"], record["episode"])
        if key in self.done:
            raise EvalError(f"{self.file}: {key[0]} {key[1]} is there already")
        self._write(record)
        self.done[key] = dict(record)

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> ArmFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """The first few places in which two protocols differ, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        out: list[str] = []
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                out += differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
        return out[:5]
    return [f"{where}: {str(old)[:40]} then, {str(new)[:40]} now"]
