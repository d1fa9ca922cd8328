"""Which benchmarks there are. `name = "metaworld"`, `"libero"`, or `"module:factory"` for a user's own."""

from __future__ import annotations

from collections.abc import Mapping
import pathlib
from typing import Any

from .errors import EvalError
from .interfaces import Benchmark
from .policies import load_factory


def make(spec: Mapping[str, Any], folder: pathlib.Path) -> Benchmark:
    """The benchmark of a matrix's [benchmark] table; what else stands there is its options."""
    name = str(spec.get("name", ""))
    options = {key: value for key, value in spec.items() if key != "name"}
    try:
        if name == "metaworld":
            from .metaworld_benchmark import MetaWorldBenchmark

            return MetaWorldBenchmark(**options)
        if name == "libero":
            from .libero import LiberoBenchmark

            return LiberoBenchmark(**options)
        if ":" not in name:
            raise EvalError(f"benchmark {name!r}: there are metaworld, libero and module:factory")
        made: Benchmark = load_factory(name, folder, folder.parent)(**options)
        return made
    except ImportError as error:
        extra = name if name in ("metaworld", "libero") else "eval"
        raise EvalError(
            f"benchmark {name}: {error}; its packages: pip install 'servoflow[{extra}]'"
        ) from error
    except (TypeError, ValueError) as error:
        raise EvalError(f"benchmark {name}: {error}") from error


def check_tasks(bench: Benchmark, tasks: tuple[str, ...], where: str) -> tuple[str, ...]:
    """The tasks meant; all if none is named."""
    known = bench.tasks()
    for task in tasks:
        if task not in known:
            raise EvalError(f"{where}: no task {task!r}; there are: {', '.join(known)}")
    return tasks or known
