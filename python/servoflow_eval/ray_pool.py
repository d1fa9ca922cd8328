"""The same workers as actors of a Ray cluster: `servoflow-eval run --ray`.

Every node needs this package, the benchmark's packages and the checkpoint under the same path. Episodes depend on nothing
but the matrix, so where they are played changes times and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
import concurrent.futures
import logging
import socket
from typing import Any

from .errors import EvalError
from .workers import Worker


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes before it says that nobody is there."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        raise EvalError(f"--ray {address}: expected HOST:PORT, ray://HOST:PORT or auto")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise EvalError(f"no Ray cluster at {address}: {error}") from None


class RayPool:
    """One actor per core that the cluster offers, or `workers` of them. `address` "" starts Ray on this machine."""

    def __init__(self, matrix: Mapping[str, Any], workers: int, address: str = "") -> None:
        try:
            import ray
        except ImportError as error:
            raise EvalError(f"Ray is not installed here ({error}); pip install 'servoflow[ray]'") from None
        self._ray: Any = ray
        if address and address != "auto":
            _check_reachable(address)
        self._started = not ray.is_initialized()
        if self._started:
            try:
                ray.init(
                    address=address or None,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
            except (ConnectionError, ValueError) as error:
                raise EvalError(f"no Ray cluster at {address!r}: {error}") from None
        self.workers = workers or max(1, int(self._ray.cluster_resources().get("CPU", 1)))
        actor = ray.remote(num_cpus=1)(Worker)
        self._actors = [actor.remote(dict(matrix)) for _ in range(self.workers)]
        self._busy = [0] * self.workers

    def submit(self, call: str, *args: Any) -> concurrent.futures.Future[Any]:
        least = min(range(self.workers), key=self._busy.__getitem__)
        self._busy[least] += 1
        out: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def done(future: concurrent.futures.Future[Any]) -> None:
            self._busy[least] -= 1
            error = future.exception()
            if error is None:
                out.set_result(future.result())
            else:
                # Ray wraps what an actor raised; the harness tells apart what a user can mend.
                out.set_exception(getattr(error, "cause", None) or error)

        getattr(self._actors[least], call).remote(*args).future().add_done_callback(done)
        return out

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        if self._started:
            self._ray.shutdown()
