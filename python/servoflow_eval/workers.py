"""What plays the episodes: a worker that keeps simulator and policies, in as many processes as there are cores."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
import concurrent.futures
import json
import multiprocessing
import os
import platform
import signal
from typing import Any, Protocol

from . import benchmarks, episode, policies
from .arms import Matrix, arm_protocol
from .interfaces import Benchmark, Policy

_KEPT_POLICIES = 2
# A worker is one core: neither BLAS, nor the software renderer, nor Mesa's shader compiler may add threads of their own.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "LP_NUM_THREADS": "0",
    "MUJOCO_GL": "egl",
    "PYOPENGL_PLATFORM": "egl",
}


def set_environment() -> None:
    """What a simulator reads when it is imported; what the user has set stays."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def machine() -> dict[str, Any]:
    """What the times in a file were measured on."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as stream:
            model = next(
                (line.split(":", 1)[1].strip() for line in stream if line.startswith("model name")), model
            )
    except OSError:
        pass
    return {
        "cpu": model,
        "cores": available_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Worker:
    """One process's simulator and the policies it used last."""

    def __init__(self, matrix: Mapping[str, Any]) -> None:
        set_environment()
        self._matrix = Matrix.from_json(matrix)
        self._bench: Benchmark | None = None
        self._policies: OrderedDict[str, Policy] = OrderedDict()

    def _benchmark(self) -> Benchmark:
        if self._bench is None:
            self._bench = benchmarks.make(self._matrix.benchmark, self._matrix.folder)
        return self._bench

    def policy(self, arm_name: str) -> Policy:
        spec = self._matrix.policy_spec(self._matrix.arm(arm_name))
        key = json.dumps(spec, sort_keys=True, default=str)
        if key in self._policies:
            self._policies.move_to_end(key)
            return self._policies[key]
        while len(self._policies) >= _KEPT_POLICIES:
            self._policies.popitem(last=False)[1].close()
        made = policies.make(spec, self._matrix.folder)
        self._policies[key] = made
        return made

    def about_benchmark(self) -> dict[str, Any]:
        """Identity, tasks and the number of scenes of each."""
        bench = self._benchmark()
        tasks = bench.tasks()
        return {
            "identity": dict(bench.identity()),
            "tasks": list(tasks),
            "scenes": {task: bench.scenes(task) for task in tasks},
            "costly_switch": bool(getattr(bench, "costly_switch", False)),
        }

    def protocol(self, arm_name: str) -> dict[str, Any]:
        """What the arm's episodes depend on."""
        arm = self._matrix.arm(arm_name)
        return {
            **arm_protocol(arm),
            "policy": dict(self.policy(arm_name).identity()),
            "benchmark": dict(self._benchmark().identity()),
        }

    def play(self, arm_name: str, task: str, episodes: Sequence[int]) -> list[dict[str, Any]]:
        """The records of these episodes."""
        arm = self._matrix.arm(arm_name)
        bench, policy = self._benchmark(), self.policy(arm_name)
        return [episode.run(bench, policy, arm, task, i) for i in episodes]

    def close(self) -> None:
        """Lets go of simulator and policies. OpenGL complains where this is left to the end of the process."""
        if self._bench is not None:
            self._bench.close()
            self._bench = None
        while self._policies:
            self._policies.popitem()[1].close()


class Pool(Protocol):
    """Workers somewhere; `call` is one of Worker's methods."""

    workers: int

    def submit(self, call: str, *args: Any) -> concurrent.futures.Future[Any]:
        """Has one of the workers do it."""

    def close(self) -> None:
        """Ends the workers; what they are doing is given up."""


_worker: Worker | None = None


def _start(matrix: Mapping[str, Any]) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _worker = Worker(matrix)


def _call(call: str, args: tuple[Any, ...]) -> Any:
    assert _worker is not None
    return getattr(_worker, call)(*args)


class LocalPool:
    """Processes on this machine. Started anew, not forked: neither engine nor renderer survives a fork."""

    def __init__(self, matrix: Mapping[str, Any], workers: int) -> None:
        set_environment()
        self.workers = workers
        self._executor = concurrent.futures.ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), initializer=_start, initargs=(matrix,)
        )

    def submit(self, call: str, *args: Any) -> concurrent.futures.Future[Any]:
        return self._executor.submit(_call, call, args)

    def close(self) -> None:
        processes = list((self._executor._processes or {}).values())
        self._executor.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.terminate()


class HerePool:
    """No processes: everything in this one. For debugging and for tests."""

    workers = 1

    def __init__(self, matrix: Mapping[str, Any]) -> None:
        self._worker = Worker(matrix)

    def submit(self, call: str, *args: Any) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        try:
            future.set_result(getattr(self._worker, call)(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        self._worker.close()
