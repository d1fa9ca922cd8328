"""The engine behind lerobot's way of calling a policy. Needs neither lerobot nor torch; speaks torch if spoken to in it.

lerobot's policies stand between a preprocessor and a postprocessor. The engine does the work of all three, so
`LeRobotPolicy` takes the observation as it is *before* the preprocessor and returns actions as they are *after* the
postprocessor. In a loop that calls all three, `LeRobotPolicy.preprocessor` and `.postprocessor` pass things through.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
import sys
import types
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from . import _observation
from ._errors import InvalidInput
from ._policy import Policy, _integer, infer_batch


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _on_host(value: Any) -> Any:
    return value.detach().cpu() if _is_tensor(value) else value


class LeRobotPolicy:
    """lerobot's `select_action` and `predict_action_chunk` on an open `Policy`.

    An observation is lerobot's dict: `observation.images.*` uint8 or float frames [batch, 3, height, width] (floats as
    lerobot makes them, bytes / 255), `observation.state` [batch, width] and `task`, a str or a list of one per row;
    with a contract of another robot, that robot's keys. Without the batch dimension it is one row. Each row is a robot
    with its own noise: row i has the seed `seed + i`. Results are float32, torch tensors on the host if any part of
    the observation is one, else NumPy arrays.

    `n_action_steps`: how many actions of a chunk `select_action` hands out before it infers again; the whole chunk if
    not given. lerobot's own policies take theirs from config.json.
    """

    name = "pi05"

    def __init__(
        self,
        policy: Policy,
        *,
        n_action_steps: SupportsIndex | None = None,
        seed: SupportsIndex = 0,
        robot: str = "",
    ) -> None:
        horizon = policy.info["horizon"]
        steps = horizon if n_action_steps is None else _integer(n_action_steps, "n_action_steps", 1, horizon)
        self._policy = policy
        self._seed = _integer(seed, "seed", 0, 2**64 - 1)
        self._robot = robot
        self._sessions = [policy.new_session(robot=robot, seed=self._seed)]
        self._contract = self._sessions[0]._contract
        self._queue: deque[npt.NDArray[np.float32]] = deque()
        self.config = types.SimpleNamespace(chunk_size=horizon, n_action_steps=steps)

    @staticmethod
    def preprocessor(observation: Any) -> Any:
        """What goes in comes out: the engine prepares its inputs itself."""
        return observation

    @staticmethod
    def postprocessor(action: Any) -> Any:
        """What goes in comes out: actions are in robot units already."""
        return action

    def eval(self) -> LeRobotPolicy:
        """Nothing to do: the engine only infers."""
        return self

    def reset(self) -> None:
        """A new episode: queued actions are dropped and every row's noise starts anew."""
        self._queue.clear()
        for session in self._sessions:
            session.reset()

    def predict_action_chunk(
        self, batch: Mapping[str, Any], *, noise: Any = None, num_steps: SupportsIndex | None = None
    ) -> Any:
        """Actions [batch, horizon, action_dim] in robot units. `noise`: [batch, horizon, model_action_dim]."""
        chunk, tensors = self._predict(batch, noise, num_steps)
        return self._answer(chunk, tensors)

    def select_action(
        self, batch: Mapping[str, Any], *, noise: Any = None, num_steps: SupportsIndex | None = None
    ) -> Any:
        """The next action [batch, action_dim] of the current chunk; infers when there is none left."""
        if self._queue:
            rows, tensors = self._rows(batch)
            if len(rows) != self._queue[0].shape[0]:
                raise InvalidInput(
                    f"batch: {len(rows)} rows; the current chunk has {self._queue[0].shape[0]}. Call reset() first"
                )
        else:
            chunk, tensors = self._predict(batch, noise, num_steps)
            self._queue.extend(chunk[:, i] for i in range(self.config.n_action_steps))
        return self._answer(self._queue.popleft(), tensors)

    @staticmethod
    def _answer(array: npt.NDArray[np.float32], tensors: bool) -> Any:
        if not tensors:
            return array
        return sys.modules["torch"].from_numpy(np.ascontiguousarray(array))

    def _predict(
        self, batch: Mapping[str, Any], noise: Any, num_steps: SupportsIndex | None
    ) -> tuple[npt.NDArray[np.float32], bool]:
        rows, tensors = self._rows(batch)
        while len(self._sessions) < len(rows):
            seed = (self._seed + len(self._sessions)) % 2**64
            self._sessions.append(self._policy.new_session(robot=self._robot, seed=seed))
        shape = (len(rows), *self._sessions[0]._noise_shape)
        given = None if noise is None else _observation.to_noise(_on_host(noise), shape)
        out = []
        most = self._policy._max_batch
        for first in range(0, len(rows), most):
            part = slice(first, min(first + most, len(rows)))
            part_noise = None if given is None else given[part]
            out += infer_batch(self._sessions[part], rows[part], noise=part_noise, steps=num_steps)
        return np.stack([r["actions"].astype(np.float32) for r in out]), tensors

    def _rows(self, batch: Mapping[str, Any]) -> tuple[list[dict[str, Any]], bool]:
        """One observation per row, and whether torch was spoken."""
        flat = {key: _on_host(value) for key, value in _observation.flatten(batch).items()}
        tensors = any(map(_is_tensor, flat.values()))
        if "observation.language.tokens" in flat:
            raise InvalidInput(
                "batch: has been through lerobot's preprocessor (it holds observation.language.tokens); hand over the "
                "observation as it was before: the engine normalizes and tokenizes itself"
            )
        arrays = {}
        for key, width in self._contract.state:
            if key not in flat:
                raise InvalidInput(f"{key}: missing; robot {self._contract.name} needs {width} numbers a row")
            arrays[key] = _observation.to_array(flat.pop(key), key)
        keys = {key for camera in self._contract.cameras for key in camera}
        for key in sorted(keys & flat.keys()):
            if not isinstance(flat[key], (bytes, bytearray, memoryview, list)):
                arrays[key] = _observation.to_array(flat.pop(key), key)
        count = self._count(arrays)
        if count is None:
            return [{**flat, **arrays}], tensors
        return [self._row(flat, arrays, keys, i, count) for i in range(count)], tensors

    def _count(self, arrays: Mapping[str, npt.NDArray[Any]]) -> int | None:
        """Rows of a batch; None without a batch dimension. All arrays must agree."""
        states = {key for key, _ in self._contract.state}
        counts: dict[str, int | None] = {}
        for key, array in arrays.items():
            batched = array.ndim == (2 if key in states else 4)
            counts[key] = array.shape[0] if batched else None
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{key} {list(arrays[key].shape)}" for key in counts)
            raise InvalidInput(f"batch: the first dimensions do not agree: {told}")
        count = next(iter(counts.values()), None)
        if count == 0:
            raise InvalidInput("batch: has no rows")
        return count

    def _row(
        self,
        flat: Mapping[str, Any],
        arrays: Mapping[str, npt.NDArray[Any]],
        keys: set[str],
        i: int,
        count: int,
    ) -> dict[str, Any]:
        row = {key: value for key, value in flat.items() if key not in keys}
        for key in keys & flat.keys():  # encoded frames
            row[key] = self._item(flat[key], key, i, count)
        row.update({key: array[i] for key, array in arrays.items()})
        if self._contract.prompt in flat:
            row[self._contract.prompt] = self._item(
                flat[self._contract.prompt], self._contract.prompt, i, count
            )
        return row

    @staticmethod
    def _item(value: Any, field: str, i: int, count: int) -> Any:
        if not isinstance(value, (list, tuple)):
            return value  # one for all rows
        if len(value) != count:
            raise InvalidInput(f"{field}: {len(value)} items for {count} rows")
        return value[i]
