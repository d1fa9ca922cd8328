"""Runs a matrix: finds what is missing, hands it to the workers, writes what comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import concurrent.futures
import dataclasses
import datetime
import fcntl
import json
import os
import pathlib
import sys
from typing import Any

from tqdm import tqdm

from .arms import Arm, Matrix
from .errors import EvalError
from .results import ArmFile
from .workers import Pool, machine

EPISODES_AT_ONCE = 4  # of one task, handed to a worker together: fewer changes of the simulator's model


@dataclasses.dataclass(frozen=True)
class Unit:
    """What one worker does next."""

    arm: str
    task: str
    episodes: tuple[int, ...]


def check_tasks(arm: Arm, known: Sequence[str]) -> tuple[str, ...]:
    """The arm's tasks; all of the benchmark's if it names none."""
    for task in (*arm.tasks, *(t for pair in arm.prompt_of for t in pair)):
        if task not in known:
            raise EvalError(f"arm {arm.name}: no task {task!r}; there are: {', '.join(known)}")
    return arm.tasks or tuple(known)


def missing(
    arm: Arm, tasks: Sequence[str], done: set[tuple[str, int]], task_by_task: bool = False
) -> Iterator[Unit]:
    """Episodes 0 to `arm.episodes` - 1 of every task that have no record. The first few of every task come first, so
    that a run that is cut off has seen all of them; `task_by_task` where changing the task costs the simulator much.
    """
    size = EPISODES_AT_ONCE * (3 if task_by_task else 1)
    blocks = [range(i, min(i + size, arm.episodes)) for i in range(0, arm.episodes, size)]
    if task_by_task:
        pairs = [(block, task) for task in tasks for block in blocks]
    else:
        pairs = [(block, task) for block in blocks for task in tasks]
    for block, task in pairs:
        left = tuple(i for i in block if (task, i) not in done)
        if left:
            yield Unit(arm.name, task, left)


def write_json(file: pathlib.Path, value: Any) -> None:
    """Under a temporary name first, so that a file is whole or not there."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1, sort_keys=True, default=str) + "\n", encoding="utf-8")
    temporary.replace(file)


def run_matrix(
    matrix: Matrix,
    out: pathlib.Path,
    pool: Pool,
    only: Sequence[str] = (),
    quiet: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Plays every missing episode of the arms (or of those named); returns how many were played.

    Raises EvalError for what is wrong with matrix, folder or environment. `stop` is asked between episodes.
    """
    arms = [arm for arm in matrix.arms if not only or arm.name in only]
    for name in only:
        matrix.arm(name)
    out.mkdir(parents=True, exist_ok=True)
    lock = (out / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise EvalError(f"{out}: another run is writing there") from None
    with lock:
        return _run_locked(matrix, out, pool, arms, quiet, stop)


def _run_locked(
    matrix: Matrix, out: pathlib.Path, pool: Pool, arms: Sequence[Arm], quiet: bool, stop: Callable[[], bool]
) -> int:
    about = pool.submit("about_benchmark").result()
    tasks = {arm.name: check_tasks(arm, about["tasks"]) for arm in arms}
    for name, group in matrix.groups.items():
        for task in group:
            if task not in about["tasks"]:
                raise EvalError(f"groups.{name}: no task {task!r}; there are: {', '.join(about['tasks'])}")
    for arm in arms:
        for task in tasks[arm.name]:
            if arm.episodes > about["scenes"][task]:
                raise EvalError(
                    f"arm {arm.name}: episodes = {arm.episodes}, but {task} has {about['scenes'][task]} scenes"
                )
    write_json(out / "matrix.json", {**matrix.as_json(), "about": about})
    header = {
        "machine": machine(),
        "workers": pool.workers,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    files: dict[str, ArmFile] = {}
    played = 0
    bar = tqdm(
        total=sum(len(tasks[a.name]) * a.episodes for a in arms),
        unit="ep",
        smoothing=0.02,
        disable=quiet,
        file=sys.stderr,
        mininterval=0.5 if sys.stderr.isatty() else 30,
        dynamic_ncols=True,
    )
    try:
        units = _units(arms, tasks, about["costly_switch"], out, pool, files, header, bar)
        waiting: dict[concurrent.futures.Future[Any], Unit] = {}
        exhausted = False
        while True:
            while not exhausted and len(waiting) < 2 * pool.workers and not stop():
                unit = next(units, None)
                if unit is None:
                    exhausted = True
                else:
                    waiting[pool.submit("play", unit.arm, unit.task, list(unit.episodes))] = unit
            if not waiting:
                return played
            ready, _ = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in ready:
                unit = waiting.pop(future)
                for record in future.result():
                    files[unit.arm].append(record)
                    played += 1
                    bar.update()
    except concurrent.futures.BrokenExecutor as error:
        raise EvalError(
            f"a worker died ({error}): out of memory, or the renderer crashed. What is finished is in {out}; run again to go on"
        ) from None
    finally:
        bar.close()
        for file in files.values():
            file.close()


def _units(
    arms: Sequence[Arm],
    tasks: dict[str, tuple[str, ...]],
    task_by_task: bool,
    out: pathlib.Path,
    pool: Pool,
    files: dict[str, ArmFile],
    header: dict[str, Any],
    bar: tqdm[Any],
) -> Iterator[Unit]:
    """Arms in the matrix's order; an arm's policy is opened, and its protocol compared, when its turn comes."""
    for arm in arms:
        bar.set_description(arm.name)
        protocol = pool.submit("protocol", arm.name).result()
        files[arm.name] = ArmFile(out / f"{arm.name}.jsonl", protocol, header)
        done = set(files[arm.name].done)
        bar.update(sum(1 for task in tasks[arm.name] for i in range(arm.episodes) if (task, i) in done))
        yield from missing(arm, tasks[arm.name], done, task_by_task)
